// Linear layers: panels of 32 outputs are claimed by threads, tokens go through them in tiles.

constexpr int64_t PIECES = 2;  // per thread and product: few enough to be cheap, enough to even out threads of unequal speed

static inline void hand_on(const Outputs& to, int64_t token, int64_t column, V value) {
    if (to.floats) store(to.floats + token * to.stride + column, value);
    if (!to.next) return;
    uint8_t* row = to.next->data + token * to.next->stride;
    if (to.next->format == FR_BF16) to_bf16((uint16_t*)row + column, value);
    else store((float*)row + column, value);
}

// Sixteen results (or the `rest` of them) for a list of the largest.
static inline void remember(const Top& top, int64_t place, V x, int64_t first, int64_t rest) {
    float* values = top.values + place * top.k;
    int32_t& held = top.held[place];
    x = larger(x, all(-__builtin_inff()));  // NaN no longer
    if (held == top.k && !(largest_of(x) > values[top.k - 1])) return;
    float lane[16];
    store(lane, x);
    for (int64_t i = 0; i < 16 && i < rest; ++i) offer(lane[i], int32_t(first + i), top.k, held, values, top.at + place * top.k);
}

// Add what the product of one panel is to be added to, and write it where it goes. sums: [tokens][32].
static void finish(const fr_matrix& matrix, int64_t panel, const float* sums, int64_t begin, int64_t tokens, const Outputs& to,
                   int32_t rank, int64_t all_tokens) {
    const V bias[2] = {matrix.bias ? load(matrix.bias + panel * PANEL) : zero(),
                       matrix.bias ? load(matrix.bias + panel * PANEL + 16) : zero()};
    for (int64_t t = 0; t < tokens; ++t) {
        const V low = add(load(sums + t * PANEL), bias[0]), high = add(load(sums + t * PANEL + 16), bias[1]);
        const int64_t token = begin + t;
        if (to.into == Into::gated) {
            hand_on(to, token, panel * 16, mul(silu(low), high));
        } else if (to.into == Into::through) {
            hand_on(to, token, panel * 16, add(silu(low), high));
        } else if (to.into == Into::residual) {
            const float* added = to.added + token * to.stride + panel * PANEL;
            const int64_t rest = matrix.out - panel * PANEL;
            hand_on(to, token, panel * PANEL, first_of(add(load(added), silu(low)), rest));
            hand_on(to, token, panel * PANEL + 16, first_of(add(load(added + 16), silu(high)), rest - 16));
        } else if (to.into == Into::top) {
            const int64_t first = panel * PANEL, place = rank * all_tokens + token;
            remember(to.top, place, low, first, to.columns - first);
            remember(to.top, place, high, first + 16, to.columns - first - 16);
        } else if (to.into == Into::logits) {
            float* row = to.floats + int64_t(to.places[token]) * to.columns;
            const int64_t first = panel * PANEL, rest = to.columns - first;
            store_some(row + first, low, rest);
            if (rest > 16) store_some(row + first + 16, high, rest - 16);
            if (!to.best) continue;
            float* best = to.best + rank * all_tokens + token;
            int64_t* at = to.best_at + rank * all_tokens + token;
            if (rest < PANEL || largest_of(larger(low, high)) > *best || any_nan(low) || any_nan(high)) {
                for (int64_t i = 0; i < PANEL && i < rest; ++i) {
                    // As torch.argmax: the first of equals, and a NaN is larger than anything.
                    if (row[first + i] > *best || (row[first + i] != row[first + i] && *best == *best)) {
                        *best = row[first + i];
                        *at = first + i;
                    }
                }
            }
        } else {
            float* row = to.floats + token * to.stride + panel * PANEL;
            store(row, to.into == Into::add ? add(load(row), low) : low);
            store(row + 16, to.into == Into::add ? add(load(row + 16), high) : high);
        }
    }
}

// Panels [first, last) of a product with bf16 or fp32 weights.
template <int F>
static void panels_floats(const Product& product, int64_t first, int64_t last, int64_t tokens, int32_t rank) {
    const fr_matrix& matrix = *product.matrix;
    const Inputs& x = product.x;
    constexpr int64_t tallest = has_unit<F>() ? 32 : TALLEST;
    const int64_t words = matrix.padded_in / per_word<F>(), blocks = (tokens + tallest - 1) / tallest;
    // Blocks of nearly equal height; a matrix unit would rather keep its shape.
    const auto begin_of = [&](int64_t b) { return !has_unit<F>() ? tokens * b / blocks : b < blocks ? b * tallest : tokens; };
    alignas(64) float sums[tallest * PANEL];
    for (int64_t panel = first; panel < last; ++panel) {
        for (int64_t b = 0; b < blocks; ++b) {
            const int64_t begin = begin_of(b), height = begin_of(b + 1) - begin;
            const uint8_t* weights = matrix.data + panel * words * 128;
            TileCall call{weights, 128, words, x.data + begin * x.stride, x.stride, sums, PANEL, true};
            if (blocks > 1 || has_unit<F>()) {
                const Fetch next = blocks > 1 ? share_of_next(weights, words * 128, words, b, blocks) : Fetch{weights + AHEAD, 128};
                call.ahead = next.from;
                call.ahead_step = next.step;
            }
            tiles<F>(call, height, 2);
            finish(matrix, panel, sums, begin, height, product.to, rank, tokens);
        }
    }
}

// One group of 128 inputs: exact in integers, then scaled and added.
template <int T>
static void tile_int8(const uint8_t* group, Fetch ahead, const uint8_t* x, int64_t stride, const float* scales, int64_t scale_stride,
                      float* sums) {
    const float* weight_scales = (const float*)group;
    const W bias[2] = {shift_left_7(load_words(group + 128)), shift_left_7(load_words(group + 192))};
    const uint8_t* w = group + 256;
    W sum[T][2];
#pragma GCC unroll 32
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) sum[t][v] = all_words(0);
    for (int k = 0; k < GROUP / 4; ++k, w += 128, x += 4) {
        const W weights[2] = {load_words(w), load_words(w + 64)};
        __builtin_prefetch(ahead.from);
        __builtin_prefetch(ahead.from + 64);
        ahead.from += ahead.step;
#pragma GCC unroll 32
        for (int t = 0; t < T; ++t) {
            int32_t word;
            __builtin_memcpy(&word, x + t * stride, 4);
            const W input = all_words(word);
#pragma GCC unroll 2
            for (int v = 0; v < 2; ++v) sum[t][v] = dot_int8(sum[t][v], weights[v], input);
        }
    }
#pragma GCC unroll 32
    for (int t = 0; t < T; ++t) {
        const V scale = all(scales[t * scale_stride]);
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
            float* at = sums + t * PANEL + v * 16;
            store(at, fma(int_to_float(subtract_words(sum[t][v], bias[v])), mul(load(weight_scales + v * 16), scale), load(at)));
        }
    }
}

// Panels [first, last) of a product with int8 weights.
static void panels_int8(const Product& product, int64_t first, int64_t last, int64_t tokens, int32_t rank) {
    using Function = void (*)(const uint8_t*, Fetch, const uint8_t*, int64_t, const float*, int64_t, float*);
    // Taller tiles need more registers than GCC 12 manages: two of eight beat one of twelve.
    constexpr int tallest = FR_ISA >= 2 ? 8 : 4;
    static const Function heights[] = {tile_int8<1>, tile_int8<2>, tile_int8<3>, tile_int8<4>,
#if FR_ISA >= 2
                                       tile_int8<5>, tile_int8<6>, tile_int8<7>, tile_int8<8>
#endif
    };
    const fr_matrix& matrix = *product.matrix;
    const Inputs& x = product.x;
    const int64_t groups = matrix.padded_in / GROUP, group_bytes = 256 + GROUP * PANEL, blocks = (tokens + tallest - 1) / tallest;
    alignas(64) float sums[tallest * PANEL];
    for (int64_t panel = first; panel < last; ++panel) {
        for (int64_t b = 0; b < blocks; ++b) {
            const int64_t begin = tokens * b / blocks, height = tokens * (b + 1) / blocks - begin;
            for (int64_t i = 0; i < height * PANEL; i += 16) store(sums + i, zero());
            const uint8_t* weights = matrix.data + panel * groups * group_bytes;
            const int64_t bytes = groups * group_bytes, words = groups * GROUP / 4;
            const Fetch next = blocks > 1 ? share_of_next(weights, bytes, words, b, blocks) : Fetch{weights + AHEAD, 128};
            for (int64_t g = 0; g < groups; ++g) {
                const Fetch part{next.from + g * next.step * GROUP / 4, next.step};
                heights[height - 1](weights + g * group_bytes, part, x.data + begin * x.stride + g * GROUP, x.stride,
                                    x.scales + begin * x.scale_stride + g, x.scale_stride, sums);
            }
            finish(matrix, panel, sums, begin, height, product.to, rank, tokens);
        }
    }
}

// The inputs that a thread makes for itself.
static void make(Inputs x, int64_t tokens) {
    const OwnNorm& from = *x.made_of;
    for (int64_t t = 0; t < tokens; ++t) {
        norm(from.rows + t * from.stride, from.weight, nullptr, from.row, from.width, from.eps, false);
        emit(from.row, from.width, x, t);
    }
}

// Several products with inputs of `tokens` tokens each, in one step: nobody waits for the end of one before the next is begun.
static void products(Team& team, const Product* list, int64_t count, int64_t tokens) {
    int64_t panels = 0;
    for (int64_t i = 0; i < count; ++i) panels += panels_of(*list[i].matrix);
    bool made = false;
    team.each(panels, team.grain(panels, PIECES), [&](int64_t first, int64_t last) {
        for (int64_t i = 0; i < count && !made; ++i)
            if (list[i].x.made_of) make(list[i].x, tokens);
        made = true;
        for (int64_t i = 0; i < count && last > 0; ++i) {
            const int64_t own = panels_of(*list[i].matrix), begin = first > 0 ? first : 0, end = last < own ? last : own;
            const int32_t format = list[i].matrix->format;
            if (begin < end) {
                if (format == FR_BF16) panels_floats<FR_BF16>(list[i], begin, end, tokens, team.rank);
                else if (format == FR_F32) panels_floats<FR_F32>(list[i], begin, end, tokens, team.rank);
                else panels_int8(list[i], begin, end, tokens, team.rank);
            }
            first -= own;
            last -= own;
        }
        release_unit();
    });
}

static void linear(Team& team, const fr_matrix& matrix, const Inputs& x, int64_t tokens, const Outputs& to) {
    const Product one{&matrix, x, to};
    products(team, &one, 1, tokens);
}
