// Attention over the slot cache, straight from its entries: no mask, no padding. Keys are visited in blocks of 16 and chunks of 256 at
// logical positions (committed entries, then the ancestors by depth), so a token's bits do not depend on which entries hold its tree.

// Rotate one head (rotate-half convention), after normalising it if `weight` says so. y may be x.
static void rotate(const float* x, float* y, int64_t head_dim, const float* cos, const float* sin, const float* weight, float eps) {
    float normal[WIDEST_HEAD];
    if (weight) {
        norm(x, weight, nullptr, normal, head_dim, eps, false);
        x = normal;
    }
    const int64_t half = head_dim / 2;
    for (int64_t i = 0; i < half; i += 16) {
        const int64_t rest = half - i;
        V a = load_some(x + i, rest), b = load_some(x + half + i, rest);
        V c = load_some(cos + i, rest), s = load_some(sin + i, rest);
        store_some(y + i, sub(mul(a, c), mul(b, s)), rest);
        store_some(y + half + i, fma(a, s, mul(b, c)), rest);
    }
}

template <int F>
struct Heads {
    const AttentionCall& call;
    int64_t head_dim, padded, words, size, entry_stride;  // `padded`: to 32 elements; `size`: bytes per element
    int32_t group;

    explicit Heads(const AttentionCall& c)
        : call(c),
          head_dim(c.cache->head_dim),
          padded((head_dim + PANEL - 1) / PANEL * PANEL),
          words(padded / per_word<F>()),
          size(F == FR_BF16 ? 2 : 4),
          entry_stride(c.cache->kv_heads * head_dim * size),
          group(c.heads / c.cache->kv_heads) {}

    uint8_t* base(int32_t which, int32_t slot, int32_t head) const {
        const fr_cache& cache = *call.cache;
        const int64_t slots = (int64_t(call.layer) * 2 + which) * cache.slots + slot;
        return cache.store + (slots * cache.capacity * cache.kv_heads + head) * head_dim * size;
    }
};

// Write the keys and values of tokens [begin, end) of one head to the cache.
template <int F>
static void append(const Heads<F>& heads, int64_t begin, int64_t end, int32_t kv_head) {
    const AttentionCall& call = heads.call;
    const int64_t dim = heads.head_dim;
    float key[WIDEST_HEAD];
    for (int64_t t = begin; t < end; ++t) {
        const Token& token = call.tokens->list[size_t(t)];
        const float* row = call.qkv + t * call.qkv_stride;
        const float* angles[2] = {call.cos + token.position * (dim / 2), call.sin + token.position * (dim / 2)};
        rotate(row + (call.heads + kv_head) * dim, key, dim, angles[0], angles[1], call.k_norm, call.eps);
        store_row<F>(heads.base(0, token.slot, kv_head) + token.entry * heads.entry_stride, key, dim);
        store_row<F>(heads.base(1, token.slot, kv_head) + token.entry * heads.entry_stride,
                     row + (call.heads + call.cache->kv_heads + kv_head) * dim, dim);
    }
}

// The queries of tokens [begin, end) that share a key head, [token, group][padded], rotated if they are not yet.
template <int F>
static void gather_queries(const Heads<F>& heads, int64_t begin, int64_t end, int32_t kv_head, uint8_t* queries) {
    const AttentionCall& call = heads.call;
    const int64_t dim = heads.head_dim;
    float rotated[WIDEST_HEAD + PANEL] = {0};
    for (int64_t t = begin; t < end; ++t) {
        const Token& token = call.tokens->list[size_t(t)];
        for (int32_t g = 0; g < heads.group; ++g, queries += heads.padded * heads.size) {
            const int32_t head = kv_head * heads.group + g;
            if (call.qkv) {
                rotate(call.qkv + t * call.qkv_stride + head * dim, rotated, dim, call.cos + token.position * (dim / 2),
                       call.sin + token.position * (dim / 2), call.q_norm, call.eps);
                store_row<F>(queries, rotated, heads.padded);
            } else {
                __builtin_memset(queries, 0, size_t(heads.padded * heads.size));
                __builtin_memcpy(queries, call.q + (int64_t(token.place) * call.heads + head) * dim * heads.size,
                                 size_t(dim * heads.size));
            }
        }
    }
}

// Sixteen keys (null: zeros) as weights of a product: [words][16 keys], `step` bytes from word to word.
template <int F>
static void pack_keys(const Heads<F>& heads, const uint8_t* const rows[BLOCK], uint8_t* to, int64_t step) {
    const int64_t bytes = heads.head_dim * heads.size;
#if FR_ISA >= 2
    for (int64_t w = 0; w < heads.words; w += 16) {
        const Mask mask = first_halves((bytes - w * 4) / 2);
        W r[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) r[i] = rows[i] ? load_halves(mask, rows[i] + w * 4) : all_words(0);
        transpose(r, to + w * step, step);
    }
#else
    for (int64_t w = 0; w < heads.words; ++w) {
        for (int i = 0; i < BLOCK; ++i) {
            uint32_t word = 0;
            const int64_t rest = bytes - w * 4;
            if (rows[i] && rest > 0) __builtin_memcpy(&word, rows[i] + w * 4, size_t(rest < 4 ? rest : 4));
            __builtin_memcpy(to + w * step + i * 4, &word, 4);
        }
    }
#endif
}

// Sixteen values (null: zeros) as weights of a product with the keys as inputs: [16 / per_word][padded dims].
template <int F>
static void pack_values(const Heads<F>& heads, const uint8_t* const rows[BLOCK], uint8_t* to) {
    const int64_t bytes = heads.head_dim * heads.size, step = heads.padded * 4;
    if (F == FR_F32) {
        for (int i = 0; i < BLOCK; ++i) {
            __builtin_memset(to + i * step, 0, size_t(step));
            if (rows[i]) __builtin_memcpy(to + i * step, rows[i], size_t(bytes));
        }
        return;
    }
    for (int i = 0; i < BLOCK; i += 2, to += step) {
#if FR_ISA >= 2
        for (int64_t e = 0; e < heads.padded; e += 32) {
            const Mask mask = first_halves(heads.head_dim - e);
            const W a = rows[i] ? load_halves(mask, rows[i] + e * 2) : all_words(0);
            const W b = rows[i + 1] ? load_halves(mask, rows[i + 1] + e * 2) : all_words(0);
            store_words(to + e * 4, interleave(a, b, 0));
            store_words(to + e * 4 + 64, interleave(a, b, 16));
        }
#else
        uint16_t* pairs = (uint16_t*)to;
        for (int64_t e = 0; e < heads.padded; ++e) {
            pairs[2 * e] = rows[i] && e < heads.head_dim ? ((const uint16_t*)rows[i])[e] : 0;
            pairs[2 * e + 1] = rows[i + 1] && e < heads.head_dim ? ((const uint16_t*)rows[i + 1])[e] : 0;
        }
#endif
    }
}

// Where the sixteen keys (or values) of one block lie for one token; null for those it does not see.
template <int F>
static void rows_of_block(const Heads<F>& heads, const Token& token, int32_t kv_head, int32_t which, int32_t block, int32_t first,
                          const uint8_t* rows[BLOCK]) {
    const uint8_t* base = heads.base(which, token.slot, kv_head);
    for (int32_t i = 0; i < BLOCK; ++i) {
        const int32_t key = block * BLOCK + i;
        rows[i] = key >= first && key <= token.logical ? base + token.entry_of(key) * heads.entry_stride : nullptr;
    }
}

// The running softmax of some queries: largest score, sum of exponentials, and the sum of values [padded] of each.
struct Running {
    float* largest;
    float* sum;
    float* mixed;
    int64_t stride;
};

// Scores that are all minus infinity weigh nothing; they must not become NaN before a finite one has come.
static inline float finite(float largest) { return largest == -__builtin_inff() ? 0.0f : largest; }

// Fold the next chunk of keys into what came before. Always from the left, so any split of the work gives the same bits.
static void fold(const Running& into, const Running& next, int64_t query, int64_t padded) {
    float* mixed = into.mixed + query * into.stride;
    const float* more = next.mixed + query * next.stride;
    if (into.sum[query] < 0) {  // nothing came before
        into.largest[query] = next.largest[query];
        into.sum[query] = next.sum[query];
        for (int64_t e = 0; e < padded; e += 16) store(mixed + e, load(more + e));
        return;
    }
    const float largest = into.largest[query] > next.largest[query] ? into.largest[query] : next.largest[query];
    const V before = exponential(all(into.largest[query] - finite(largest)));
    const V now = exponential(all(next.largest[query] - finite(largest)));
    float weights[2][16];
    store(weights[0], before);
    store(weights[1], now);
    into.largest[query] = largest;
    into.sum[query] = into.sum[query] * weights[0][0] + next.sum[query] * weights[1][0];
    for (int64_t e = 0; e < padded; e += 16)
        store(mixed + e, fma(load(more + e), now, mul(load(mixed + e), before)));
}

static void fold_all(const Running& into, const Running& next, int64_t queries, int64_t padded) {
    for (int64_t q = 0; q < queries; ++q)
        if (!(next.sum[q] < 0)) fold(into, next, q, padded);  // below zero: it saw nothing of this chunk
}

// Tokens [begin, end) of one row and one key head: who sees what, in blocks of 16 keys at logical positions.
template <int F>
struct Strip {
    const Heads<F>& heads;
    int64_t begin, end;
    int32_t kv_head;
    int32_t first_shared, last_shared;  // blocks [first, last) that every one of these tokens sees completely, in the same place

    Strip(const Heads<F>& h, int64_t b, int64_t e, int32_t head) : heads(h), begin(b), end(e), kv_head(head) {
        int32_t from = 0, to = 0x7fffffff;
        for (int64_t t = begin; t < end; ++t) {
            const Token& token = at(t);
            const int32_t low = (first_key(token) + BLOCK - 1) / BLOCK;
            const int32_t high = (token.path ? token.length : token.logical + 1) / BLOCK;
            from = low > from ? low : from;
            to = high < to ? high : to;
        }
        first_shared = from;
        last_shared = to > from ? to : from;
    }
    const Token& at(int64_t t) const { return heads.call.tokens->list[size_t(t)]; }
    int32_t first_key(const Token& token) const {
        const int32_t window = heads.call.window;
        return window > 0 && token.logical >= window ? token.logical - window + 1 : 0;
    }
    int64_t queries() const { return (end - begin) * heads.group; }
};

// One chunk of CHUNK keys for the queries of a strip: scores of all of them, a softmax of its own, and the values mixed by it. Blocks that
// every token of the strip sees whole are packed once; the ends of what a token sees are packed for it alone, with zeros for the rest.
template <int F>
struct Chunk {
    const Strip<F>& strip;
    const Heads<F>& heads;
    const Running& out;
    const uint8_t* queries;
    const int32_t begin, end;               // blocks of this chunk
    const int32_t first_shared, last_shared;  // of these, the shared ones
    const int64_t query_bytes, key_step = CHUNK * 4, weight_stride, value_words = BLOCK / per_word<F>(), value_step;
    uint8_t *keys, *values, *weights, *block;
    float* scores;

    Chunk(const Strip<F>& s, int32_t chunk, const uint8_t* q, const Running& o, Shelf& own)
        : strip(s),
          heads(s.heads),
          out(o),
          queries(q),
          begin(chunk * (CHUNK / BLOCK)),
          end(begin + CHUNK / BLOCK),
          first_shared(s.first_shared > begin ? s.first_shared : begin),
          last_shared(limited(s.last_shared < end ? s.last_shared : end, first_shared)),
          query_bytes(heads.padded * heads.size),
          weight_stride(CHUNK * heads.size),
          value_step(heads.padded * 4),
          keys(own.keys.get<uint8_t>(heads.words * CHUNK * 4)),
          values(own.values.get<uint8_t>(CHUNK / per_word<F>() * heads.padded * 4)),
          weights(own.weights.get<uint8_t>(s.queries() * CHUNK * heads.size)),
          block(own.block.get<uint8_t>(BLOCK * heads.padded * 4)),
          scores(own.scores.get<float>(s.queries() * CHUNK)) {}

    static int32_t limited(int32_t last, int32_t first) { return last > first ? last : first; }
    bool is_shared(int32_t b) const { return b >= first_shared && b < last_shared; }
    int64_t query_of(int64_t t) const { return (t - strip.begin) * heads.group; }
    int32_t column(int32_t b) const { return (b - begin) * BLOCK; }

    // The blocks of this chunk that a token sees something of: [first, last).
    int32_t first_of(const Token& token) const { return limited(strip.first_key(token) / BLOCK, begin); }
    int32_t last_of(const Token& token) const {
        const int32_t after = token.logical / BLOCK + 1;
        return after < end ? after : end;
    }

    void pack_shared() const {
        const uint8_t* rows[BLOCK];
        const int32_t slot = strip.at(strip.begin).slot;
        for (int32_t b = first_shared; b < last_shared; ++b) {
            for (int32_t which = 0; which < 2; ++which) {
                const uint8_t* base = heads.base(which, slot, strip.kv_head) + int64_t(b) * BLOCK * heads.entry_stride;
                for (int32_t i = 0; i < BLOCK; ++i) rows[i] = base + i * heads.entry_stride;
                if (which == 0) pack_keys<F>(heads, rows, keys + column(b) * 4, key_step);
                else pack_values<F>(heads, rows, values + (b - begin) * value_words * value_step);
            }
        }
    }

    void score_shared() const {
        if (first_shared == last_shared) return;
        const int32_t at = column(first_shared);
        tiles<F>({keys + at * 4, key_step, heads.words, queries, query_bytes, scores + at, CHUNK, true}, strip.queries(),
                 last_shared - first_shared);
    }

    void score_own(int64_t t) const {
        const Token& token = strip.at(t);
        const int64_t query = query_of(t);
        const uint8_t* rows[BLOCK];
        for (int32_t b = first_of(token); b < last_of(token); ++b) {
            if (is_shared(b)) continue;
            rows_of_block<F>(heads, token, strip.kv_head, 0, b, strip.first_key(token), rows);
            pack_keys<F>(heads, rows, block, 64);
            tiles<F>({block, 64, heads.words, queries + query * query_bytes, query_bytes, scores + query * CHUNK + column(b), CHUNK, true},
                     heads.group, 1);
        }
    }

    // Scores -> weights of one query; leaves sum < 0 where it sees nothing of this chunk.
    void soften(const Token& token, int64_t query) const {
        const int32_t low = strip.first_key(token), first = first_of(token), last = last_of(token);
        float* row = scores + query * CHUNK;
        if (first >= last) {
            out.sum[query] = -1;
            return;
        }
        V most = all(-__builtin_inff());
        for (int32_t b = first; b < last; ++b) {
            float* lane = row + column(b);
            store(lane, mul(load(lane), all(heads.call.scale)));
            for (int32_t i = 0, key = b * BLOCK; i < BLOCK && (key < low || key + BLOCK - 1 > token.logical); ++i)
                if (key + i < low || key + i > token.logical) lane[i] = -__builtin_inff();
            most = larger(load(lane), most);
        }
        out.largest[query] = largest_of(most);
        V sum = zero();
        for (int32_t b = first; b < last; ++b) {
            const V weight = exponential(sub(load(row + column(b)), all(finite(out.largest[query]))));
            sum = add(sum, weight);
            uint8_t* to = weights + query * weight_stride + column(b) * heads.size;
            if (F == FR_BF16) to_bf16((uint16_t*)to, weight);
            else store((float*)to, weight);
        }
        out.sum[query] = sum_of(sum);
        for (int64_t e = 0; e < heads.padded; e += 16) store(out.mixed + query * out.stride + e, zero());
    }

    void mix_own(int64_t t, int32_t from, int32_t to) const {
        const Token& token = strip.at(t);
        const int64_t query = query_of(t);
        const uint8_t* rows[BLOCK];
        for (int32_t b = from; b < to; ++b) {
            rows_of_block<F>(heads, token, strip.kv_head, 1, b, strip.first_key(token), rows);
            pack_values<F>(heads, rows, block);
            mix(block, value_words, query, b, heads.group);
        }
    }

    void mix(const uint8_t* packed, int64_t words, int64_t query, int32_t b, int64_t count) const {
        tiles<F>({packed, value_step, words, weights + query * weight_stride + column(b) * heads.size, weight_stride,
                  out.mixed + query * out.stride, out.stride, false, value_words},
                 count, int(heads.padded / 16));
    }

    void run() const {
        pack_shared();
        score_shared();
        for (int64_t t = strip.begin; t < strip.end; ++t) {
            score_own(t);
            for (int32_t g = 0; g < heads.group; ++g) soften(strip.at(t), query_of(t) + g);
        }
        // In ascending order of keys: a token's own blocks below, the shared ones, its own above.
        const bool shares = first_shared < last_shared;
        for (int64_t t = strip.begin; t < strip.end; ++t)
            mix_own(t, first_of(strip.at(t)), shares ? first_shared : last_of(strip.at(t)));
        if (!shares) return;
        mix(values + (first_shared - begin) * value_words * value_step, (last_shared - first_shared) * value_words, 0, first_shared,
            strip.queries());
        for (int64_t t = strip.begin; t < strip.end; ++t) mix_own(t, last_shared, last_of(strip.at(t)));
    }
};

// Divide by the sums and hand the heads on.
template <int F>
static void deliver(const Strip<F>& strip, const Running& state) {
    const Heads<F>& heads = strip.heads;
    const AttentionCall& call = heads.call;
    for (int64_t query = 0; query < strip.queries(); ++query) {
        const int64_t t = strip.begin + query / heads.group;
        const int64_t head = strip.kv_head * heads.group + query % heads.group;
        float* mixed = state.mixed + query * state.stride;
        const V whole = all(state.sum[query]);
        for (int64_t e = 0; e < heads.padded; e += 16) store(mixed + e, div(load(mixed + e), whole));
        if (call.out_floats) {
            __builtin_memcpy(call.out_floats + t * call.out_stride + head * heads.head_dim, mixed, size_t(heads.head_dim) * 4);
        } else {
            uint8_t* row = call.out->data + t * call.out->stride;
            if (call.out->format == FR_BF16) store_row<FR_BF16>(row + head * heads.head_dim * 2, mixed, heads.head_dim);
            else store_row<FR_F32>(row + head * heads.head_dim * 4, mixed, heads.head_dim);
        }
    }
}

static Running running(float* memory, int64_t queries, int64_t padded) {
    return {memory, memory + queries, memory + 2 * round_up(queries, 16), padded};
}

// Read what a chunk holds for some heads once, entry after entry, so that it lies in the cache when the heads take their parts of it one
// by one: the parts of one head are too short and too far apart for the processor to see where this is going.
template <int F>
static void touch_chunk(const Strip<F>& strip, int32_t chunk, int32_t first_head, int32_t last_head) {
    const Heads<F>& heads = strip.heads;
    const int32_t first = strip.first_shared * BLOCK, last = strip.last_shared * BLOCK;
    const int32_t begin = first > chunk * CHUNK ? first : chunk * CHUNK, end = last < (chunk + 1) * CHUNK ? last : (chunk + 1) * CHUNK;
    const int64_t bytes = (last_head - first_head) * heads.head_dim * heads.size;
    uint32_t sink = 0;
    for (int32_t which = 0; which < 2; ++which) {
        const uint8_t* row = heads.base(which, strip.at(strip.begin).slot, first_head) + begin * heads.entry_stride;
        for (int32_t key = begin; key < end; ++key, row += heads.entry_stride)
            for (int64_t i = 0; i < bytes; i += 64) sink += row[i];
    }
    asm volatile("" ::"r"(sink));
}

// Attention of one strip for key heads [first_head, last_head).
template <int F>
static void attend(Strip<F> strip, int32_t first_head, int32_t last_head, Shelf& own) {
    const Heads<F>& heads = strip.heads;
    const int32_t some = last_head - first_head, chunks = chunks_of(*heads.call.tokens, strip.begin, strip.end);
    const int64_t count = strip.queries(), floats = running_floats(count, heads.padded);
    const int64_t query_bytes = count * heads.padded * heads.size;
    uint8_t* queries = own.queries.get<uint8_t>(some * query_bytes);
    float* memory = own.running.get<float>((some + 1) * floats);
    const Running next = running(memory + some * floats, count, heads.padded);
    for (int32_t h = 0; h < some; ++h) {
        gather_queries<F>(heads, strip.begin, strip.end, first_head + h, queries + h * query_bytes);
        const Running state = running(memory + h * floats, count, heads.padded);
        for (int64_t q = 0; q < count; ++q) state.sum[q] = -1;
    }
    for (int32_t c = 0; c < chunks; ++c) {
        if (some > 1) touch_chunk<F>(strip, c, first_head, last_head);
        for (int32_t h = 0; h < some; ++h) {
            strip.kv_head = first_head + h;
            Chunk<F>(strip, c, queries + h * query_bytes, next, own).run();
            fold_all(running(memory + h * floats, count, heads.padded), next, count, heads.padded);
        }
    }
    for (int32_t h = 0; h < some; ++h) {
        strip.kv_head = first_head + h;
        deliver<F>(strip, running(memory + h * floats, count, heads.padded));
    }
}

// The chunks of one row's keys are shared out, and folded in order afterwards.
template <int F>
static void attend_split(Team& team, const Heads<F>& heads, Shelf& own) {
    const AttentionCall& call = heads.call;
    const int64_t tokens = call.tokens->count(), kv_heads = call.cache->kv_heads;
    const int64_t count = tokens * heads.group, floats = running_floats(count, heads.padded);
    const int32_t chunks = chunks_of(*call.tokens, 0, tokens);
    team.each(kv_heads * chunks, 1, [&](int64_t first, int64_t last) {
        uint8_t* queries = own.queries.get<uint8_t>(count * heads.padded * heads.size);
        for (int64_t task = first; task < last; ++task) {
            const Strip<F> strip(heads, 0, tokens, int32_t(task / chunks));
            gather_queries<F>(heads, 0, tokens, strip.kv_head, queries);
            const Running part = running(call.partials + task * floats, count, heads.padded);
            Chunk<F>(strip, int32_t(task % chunks), queries, part, own).run();
        }
        release_unit();
    });
    team.each(kv_heads, 1, [&](int64_t first, int64_t last) {
        for (int64_t kv_head = first; kv_head < last; ++kv_head) {
            const Strip<F> strip(heads, 0, tokens, int32_t(kv_head));
            const Running state = running(own.running.get<float>(floats), count, heads.padded);
            for (int64_t q = 0; q < count; ++q) state.sum[q] = -1;
            for (int32_t c = 0; c < chunks; ++c)
                fold_all(state, running(call.partials + (kv_head * chunks + c) * floats, count, heads.padded), count, heads.padded);
            deliver<F>(strip, state);
        }
    });
}

// The tokens [begin, ...) of a row that are attended to together: not too many queries, and not too far apart.
static inline int64_t strip_end(const Tokens& tokens, int64_t begin, int64_t row_end, int32_t group) {
    const int64_t tallest = group >= 32 ? 2 : 64 / group;
    int64_t end = begin + 1;
    const Token& first = tokens.list[size_t(begin)];
    while (end < row_end && end - begin < tallest &&
           (first.path || tokens.list[size_t(end)].logical / BLOCK - (first.logical + 1) / BLOCK < 2))
        ++end;
    return end;
}

template <int F>
static void attention_in(Team& team, const AttentionCall& call, Shelf& own) {
    const Heads<F> heads(call);
    const Tokens& tokens = *call.tokens;
    const int32_t kv_heads = call.cache->kv_heads;
    const int64_t tasks = (int64_t(tokens.row_begin.size()) - 1) * kv_heads;
    const bool split = splits(tokens, *call.cache, call.heads, team.size);
    team.each(tasks, team.grain(tasks, tasks == kv_heads ? 1 : PIECES), [&](int64_t first, int64_t last) {
        for (int64_t task = first; task < last;) {
            const int64_t row = task / kv_heads, end = tokens.row_begin[size_t(row) + 1];
            const int32_t first_head = int32_t(task % kv_heads);
            const int32_t last_head = int32_t(first_head + (last - task) < kv_heads ? first_head + (last - task) : kv_heads);
            int64_t begin = tokens.row_begin[size_t(row)];
            for (int32_t head = first_head; head < last_head && call.qkv; ++head) append<F>(heads, begin, end, head);
            while (begin < end && !split) {
                const int64_t stop = strip_end(tokens, begin, end, heads.group);
                attend<F>(Strip<F>(heads, begin, stop, first_head), first_head, last_head, own);
                begin = stop;
            }
            task += last_head - first_head;
        }
        release_unit();
    });
    if (split) attend_split<F>(team, heads, own);
}

// Nothing but write the keys and values of tokens [begin, end).
static void append_all(const AttentionCall& call, int64_t begin, int64_t end) {
    for (int32_t head = 0; head < call.cache->kv_heads; ++head) {
        if (call.cache->format == FR_BF16) append(Heads<FR_BF16>(call), begin, end, head);
        else append(Heads<FR_F32>(call), begin, end, head);
    }
}

static void attention(Team& team, const AttentionCall& call, Shelf& own) {
    if (call.cache->format == FR_BF16) attention_in<FR_BF16>(team, call, own);
    else attention_in<FR_F32>(team, call, own);
}
