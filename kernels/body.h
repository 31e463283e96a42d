// The kernels, once for every instruction set: each isa_*.cc includes this file inside its own namespace.
//
// Everything rests on one small product, `tile`: T tokens times NV * 16 outputs, every output summed over the inputs in
// ascending order into one accumulator. Linear layers, attention scores and attention sums are all made of it, which is why a
// result cannot depend on how tokens and outputs were grouped.

#include "simd.h"

// ---- the tile

template <int F>
static inline V dot(V sum, W w, W x) {
    return F == FR_BF16 ? dot_bf16(sum, w, x) : fma(floats(w), floats(x), sum);
}

// Inputs that share a word: two bf16, one fp32.
template <int F>
constexpr int per_word() { return F == FR_BF16 ? 2 : 1; }

struct TileCall {
    const uint8_t* weights;  // [words][NV][16 words], `step` bytes from word to word
    int64_t step, words;
    const uint8_t* x;  // [T][words], `stride` bytes from token to token
    int64_t stride;
    float* sums;  // [T][NV * 16], `sums_stride` floats from token to token
    int64_t sums_stride;
    bool fresh;  // start from zero instead of from what is there
    const uint8_t* ahead = nullptr;  // memory to fetch meanwhile, `ahead_step` bytes further with every word; null: the weights AHEAD
    int64_t ahead_step = 0;
};

// How far ahead weights are fetched, in bytes. Measured: 4 KiB is too late for main memory under 12 tokens, 32 KiB too early.
enum { AHEAD = 12288 };

// What to fetch while pass `pass` of several over a panel is made: its share of the next panel, or the memory would rest whenever a
// panel is read again.
struct Fetch {
    const uint8_t* from;
    int64_t step;
};
static inline Fetch share_of_next(const uint8_t* panel, int64_t bytes, int64_t words, int64_t pass, int64_t passes) {
    return {panel + bytes + bytes / passes * pass, bytes / passes / words};
}

template <int F, int T, int NV, bool SPREAD>
static void tile(const TileCall& call) {
    V sum[T][NV];
#pragma GCC unroll 32
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) sum[t][v] = call.fresh ? zero() : load(call.sums + t * call.sums_stride + v * 16);
    const uint8_t* w = call.weights;
    const uint8_t* x = call.x;
    const uint8_t* ahead = call.ahead;
    const int64_t step = call.step, stride = call.stride, ahead_step = call.ahead_step;
    for (int64_t k = 0; k < call.words; ++k, w += step, x += 4) {
        W weights[NV];
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) {
            weights[v] = load_words(w + v * 64);
            __builtin_prefetch((SPREAD ? ahead : w + AHEAD) + v * 64);
        }
        if (SPREAD) ahead += ahead_step;
#pragma GCC unroll 32
        for (int t = 0; t < T; ++t) {
            int32_t word;
            __builtin_memcpy(&word, x + t * stride, 4);
            W input = all_words(word);
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) sum[t][v] = dot<F>(sum[t][v], weights[v], input);
        }
    }
#pragma GCC unroll 32
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) store(call.sums + t * call.sums_stride + v * 16, sum[t][v]);
}

using TileFunction = void (*)(const TileCall&);

#if FR_ISA >= 2
enum { TALLEST = 14, WIDEST = 2 };
#else
enum { TALLEST = 4, WIDEST = 1 };
#endif

// tile<F, 1 .. TALLEST, NV, SPREAD>, by height.
template <int F, int NV, bool SPREAD, int... HEIGHTS>
static TileFunction tile_of(int64_t height, std::integer_sequence<int, HEIGHTS...>) {
    static const TileFunction all[] = {tile<F, HEIGHTS + 1, NV, SPREAD>...};
    return all[height - 1];
}

// `tokens` x `vectors` * 16 outputs, in as few tiles of nearly equal height as possible.
template <int F>
static void tiles(TileCall call, int64_t tokens, int vectors) {
    const std::make_integer_sequence<int, TALLEST> heights{};
    const int64_t blocks = (tokens + TALLEST - 1) / TALLEST;
    const TileCall first = call;
    for (int64_t b = 0; b < blocks; ++b) {
        const int64_t begin = tokens * b / blocks, height = tokens * (b + 1) / blocks - begin;
        call.x = first.x + begin * first.stride;
        for (int v = 0; v < vectors; v += WIDEST) {
            call.weights = first.weights + v * 64;
            call.sums = first.sums + begin * first.sums_stride + v * 16;
            if (v + WIDEST > vectors) tile_of<F, 1, false>(height, heights)(call);
            else if (call.ahead) tile_of<F, WIDEST, true>(height, heights)(call);
            else tile_of<F, WIDEST, false>(height, heights)(call);
        }
    }
}

// ---- rows in, rows out

static inline V load_some(const float* p, int64_t count) {
    if (count >= 16) return load(p);
    float f[16] = {0};
    for (int64_t i = 0; i < count; ++i) f[i] = p[i];
    return load(f);
}

static inline void store_some(float* p, V x, int64_t count) {
    if (count >= 16) return store(p, x);
    float f[16];
    store(f, x);
    for (int64_t i = 0; i < count; ++i) p[i] = f[i];
}

// One group of 128 as unsigned bytes around 128: value = (byte - 128) * scale. NaN and infinity make the scale NaN.
static void quantise(const float* x, int64_t count, uint8_t* bytes, float* scale) {
    V most = zero(), poison = zero();
    for (int64_t i = 0; i < count; i += 16) {
        V value = load_some(x + i, count - i);
        most = larger(larger(value, sub(zero(), value)), most);
        poison = fma(value, zero(), poison);
    }
    const float largest = largest_of(most);
    const float per_unit = largest > 0 ? 127.0f / largest : 0.0f;
    *scale = largest / 127.0f + sum_of(poison);
    for (int64_t i = 0; i < GROUP; i += 16) {
        float f[16];
        store(f, round_to_int(mul(i < count ? load_some(x + i, count - i) : zero(), all(per_unit))));
        for (int j = 0; j < 16; ++j) bytes[i + j] = uint8_t(int32_t(f[j] >= -127 && f[j] <= 127 ? f[j] : 0) + 128);
    }
}

// Write a row of fp32 as input number `token` of a product, zeros behind it.
static void emit(const float* row, int64_t width, Inputs& to, int64_t token) {
    uint8_t* data = to.data + token * to.stride;
    if (to.format == FR_INT8) {
        for (int64_t g = 0; g * GROUP < width; ++g) {
            const int64_t rest = width - g * GROUP;
            quantise(row + g * GROUP, rest < GROUP ? rest : int64_t(GROUP), data + g * GROUP, to.scales + token * to.scale_stride + g);
        }
        return;
    }
    const int64_t padded = (width + PANEL - 1) / PANEL * PANEL;
    for (int64_t i = 0; i < padded; i += 16) {
        V x = i < width ? load_some(row + i, width - i) : zero();
        if (to.format == FR_BF16) to_bf16((uint16_t*)data + i, x);
        else store((float*)data + i, x);
    }
}

static void norm(const float* x, const float* weight, const float* bias, float* y, int64_t width, float eps, bool centred) {
    V mean = zero();
    if (centred) {
        V sum = zero();
        for (int64_t i = 0; i < width; i += 16) sum = add(sum, load_some(x + i, width - i));
        mean = all(sum_of(sum) / float(width));
    }
    V squares = zero();
    for (int64_t i = 0; i < width; i += 16) {
        V value = load_some(x + i, width - i);
        if (centred) value = width - i >= 16 ? sub(value, mean) : sub(value, load_some((const float*)&mean, width - i));
        squares = fma(value, value, squares);
    }
    const V scale = all(1.0f / __builtin_sqrtf(sum_of(squares) / float(width) + eps));
    for (int64_t i = 0; i < width; i += 16) {
        const int64_t rest = width - i;
        V value = mul(mul(sub(load_some(x + i, rest), mean), scale), load_some(weight + i, rest));
        if (bias) value = add(value, load_some(bias + i, rest));
        store_some(y + i, value, rest);
    }
}

static void silu_gate(const float* gate_up, float* y, int64_t width) {
    for (int64_t i = 0; i < width; i += 16) {
        V gate = load_some(gate_up + i, width - i), up = load_some(gate_up + width + i, width - i);
        store_some(y + i, mul(silu(gate), up), width - i);
    }
}

// ---- linear

enum { PIECES = 2 };  // per thread and product: few enough to be cheap, enough to even out threads of unequal speed

// Add what the product of one panel is to be added to, and write it where it goes. sums: [tokens][32].
static void finish(const fr_matrix& matrix, int64_t panel, const float* sums, int64_t begin, int64_t tokens, const Outputs& to,
                   int32_t rank, int64_t all_tokens) {
    const V bias[2] = {matrix.bias ? load(matrix.bias + panel * PANEL) : zero(),
                       matrix.bias ? load(matrix.bias + panel * PANEL + 16) : zero()};
    for (int64_t t = 0; t < tokens; ++t) {
        const V low = add(load(sums + t * PANEL), bias[0]), high = add(load(sums + t * PANEL + 16), bias[1]);
        const int64_t token = begin + t;
        if (to.into == Into::gated) {
            const V value = mul(silu(low), high);
            uint8_t* row = to.next->data + token * to.next->stride;
            if (to.floats) store(to.floats + token * to.stride + panel * 16, value);
            else if (to.next->format == FR_BF16) to_bf16((uint16_t*)row + panel * 16, value);
            else store((float*)row + panel * 16, value);
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

template <int F>
static void linear_floats(Team& team, const fr_matrix& matrix, const Inputs& x, int64_t tokens, const Outputs& to) {
    const int64_t words = matrix.padded_in / per_word<F>();
    const int64_t panels = panels_of(matrix), blocks = (tokens + TALLEST - 1) / TALLEST;
    team.each(panels, team.grain(panels, PIECES), [&](int64_t first, int64_t last) {
        alignas(64) float sums[TALLEST * PANEL];
        for (int64_t panel = first; panel < last; ++panel) {
            for (int64_t b = 0; b < blocks; ++b) {
                const int64_t begin = tokens * b / blocks, height = tokens * (b + 1) / blocks - begin;
                const uint8_t* weights = matrix.data + panel * words * 128;
                TileCall call{weights, 128, words, x.data + begin * x.stride, x.stride, sums, PANEL, true};
                if (blocks > 1) {
                    const Fetch next = share_of_next(weights, words * 128, words, b, blocks);
                    call.ahead = next.from;
                    call.ahead_step = next.step;
                }
                tiles<F>(call, height, 2);
                finish(matrix, panel, sums, begin, height, to, team.rank, tokens);
            }
        }
    });
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

static void linear_int8(Team& team, const fr_matrix& matrix, const Inputs& x, int64_t tokens, const Outputs& to) {
    using Function = void (*)(const uint8_t*, Fetch, const uint8_t*, int64_t, const float*, int64_t, float*);
    // Taller tiles need more registers than GCC 12 manages: two of eight beat one of twelve.
    constexpr int tallest = FR_ISA >= 2 ? 8 : 4;
    static const Function heights[] = {tile_int8<1>, tile_int8<2>, tile_int8<3>, tile_int8<4>,
#if FR_ISA >= 2
                                       tile_int8<5>, tile_int8<6>, tile_int8<7>, tile_int8<8>
#endif
    };
    const int64_t groups = matrix.padded_in / GROUP, group_bytes = 256 + GROUP * PANEL;
    const int64_t panels = panels_of(matrix), blocks = (tokens + tallest - 1) / tallest;
    team.each(panels, team.grain(panels, PIECES), [&](int64_t first, int64_t last) {
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
                finish(matrix, panel, sums, begin, height, to, team.rank, tokens);
            }
        }
    });
}

static void linear(Team& team, const fr_matrix& matrix, const Inputs& x, int64_t tokens, const Outputs& to) {
    if (matrix.format == FR_BF16) linear_floats<FR_BF16>(team, matrix, x, tokens, to);
    else if (matrix.format == FR_F32) linear_floats<FR_F32>(team, matrix, x, tokens, to);
    else linear_int8(team, matrix, x, tokens, to);
}

// ---- attention

// Rotate one head (rotate-half convention), after normalising it if `weight` says so. y may be x.
static void rotate(const float* x, float* y, int64_t head_dim, const float* cos, const float* sin, const float* weight, float eps) {
    float normal[512];
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
static void store_row(uint8_t* to, const float* row, int64_t width) {
    if (F == FR_F32) {
        __builtin_memcpy(to, row, size_t(width) * 4);
        return;
    }
    int64_t i = 0;
    for (; i + 16 <= width; i += 16) to_bf16((uint16_t*)to + i, load(row + i));
    if (i < width) {
        uint16_t rest[16];
        to_bf16(rest, load_some(row + i, width - i));
        __builtin_memcpy((uint16_t*)to + i, rest, size_t(width - i) * 2);
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
    float key[512];
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
    float rotated[512 + 32] = {0};
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

#if FR_ISA >= 2
// 16 rows of 16 words -> 16 columns.
static inline void transpose(W r[16], uint8_t* to, int64_t step) {
    W t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        W a = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88), b = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        W c = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd), d = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
        store_words(to + i * step, _mm512_shuffle_i32x4(a, b, 0x88));
        store_words(to + (4 + i) * step, _mm512_shuffle_i32x4(c, d, 0x88));
        store_words(to + (8 + i) * step, _mm512_shuffle_i32x4(a, b, 0xdd));
        store_words(to + (12 + i) * step, _mm512_shuffle_i32x4(c, d, 0xdd));
    }
}
#endif

// Sixteen keys (null: zeros) as weights of a product: [words][16 keys], `step` bytes from word to word.
template <int F>
static void pack_keys(const Heads<F>& heads, const uint8_t* const rows[BLOCK], uint8_t* to, int64_t step) {
    const int64_t bytes = heads.head_dim * heads.size;
#if FR_ISA >= 2
    for (int64_t w = 0; w < heads.words; w += 16) {
        const int64_t rest = (bytes - w * 4) / 2;
        const __mmask32 mask = rest >= 32 ? ~__mmask32(0) : rest <= 0 ? 0 : (__mmask32(1) << rest) - 1;
        W r[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) r[i] = rows[i] ? _mm512_maskz_loadu_epi16(mask, rows[i] + w * 4) : _mm512_setzero_si512();
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
        const W index = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35,
                                         3, 34, 2, 33, 1, 32, 0);
        const W upper = _mm512_add_epi16(index, _mm512_set1_epi16(16));
        for (int64_t e = 0; e < heads.padded; e += 32) {
            const int64_t rest = heads.head_dim - e;
            const __mmask32 mask = rest >= 32 ? ~__mmask32(0) : rest <= 0 ? 0 : (__mmask32(1) << rest) - 1;
            const W a = rows[i] ? _mm512_maskz_loadu_epi16(mask, rows[i] + e * 2) : _mm512_setzero_si512();
            const W b = rows[i + 1] ? _mm512_maskz_loadu_epi16(mask, rows[i + 1] + e * 2) : _mm512_setzero_si512();
            store_words(to + e * 4, _mm512_permutex2var_epi16(a, index, b));
            store_words(to + e * 4 + 64, _mm512_permutex2var_epi16(a, upper, b));
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
    const V before = exponential(all(into.largest[query] - largest)), now = exponential(all(next.largest[query] - largest));
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

// Ask for the keys and values of a block: an entry of one head is too short for the processor to see where this is going.
enum { BLOCKS_AHEAD = 4 };
template <int F>
static void fetch_block(const Heads<F>& heads, int32_t slot, int32_t kv_head, int32_t block) {
    for (int32_t which = 0; which < 2; ++which) {
        const uint8_t* row = heads.base(which, slot, kv_head) + int64_t(block) * BLOCK * heads.entry_stride;
        for (int32_t i = 0; i < BLOCK; ++i, row += heads.entry_stride)
            for (int64_t at = 0; at < heads.head_dim * heads.size; at += 64) __builtin_prefetch(row + at);
    }
}

// One chunk of CHUNK keys for the queries of a strip. Leaves sum < 0 for queries that see none of it.
template <int F>
static void attend_chunk(const Strip<F>& strip, int32_t chunk, const uint8_t* queries, const Running& out, Shelf& own) {
    const Heads<F>& heads = strip.heads;
    const int32_t per_chunk = CHUNK / BLOCK, chunk_first = chunk * per_chunk, chunk_last = chunk_first + per_chunk;
    const int32_t from = strip.first_shared > chunk_first ? strip.first_shared : chunk_first;
    const int32_t to = strip.last_shared < chunk_last ? strip.last_shared : chunk_last;
    const int32_t shared = to > from ? to - from : 0;
    const int64_t count = strip.queries(), query_bytes = heads.padded * heads.size;
    uint8_t* keys = own.memory[0].get<uint8_t>(heads.words * CHUNK * 4);
    uint8_t* values = own.memory[1].get<uint8_t>(CHUNK / per_word<F>() * heads.padded * 4);
    float* scores = own.memory[2].get<float>(count * CHUNK);
    uint8_t* weights = own.memory[3].get<uint8_t>(count * CHUNK * heads.size);
    uint8_t* block = own.memory[4].get<uint8_t>(BLOCK * heads.padded * 4);
    const uint8_t* rows[BLOCK];
    const int64_t key_step = CHUNK * 4, weight_stride = CHUNK * heads.size;
    const int64_t value_words = BLOCK / per_word<F>(), value_step = heads.padded * 4;

    const Token& any = strip.at(strip.begin);
    for (int32_t b = from; b < to; ++b) {
        const int32_t column = b - chunk_first;
        fetch_block<F>(heads, any.slot, strip.kv_head, b + BLOCKS_AHEAD);
        for (int32_t which = 0; which < 2; ++which) {
            const uint8_t* base = heads.base(which, any.slot, strip.kv_head) + int64_t(b) * BLOCK * heads.entry_stride;
            for (int32_t i = 0; i < BLOCK; ++i) rows[i] = base + i * heads.entry_stride;
            if (which == 0) pack_keys<F>(heads, rows, keys + column * 64, key_step);
            else pack_values<F>(heads, rows, values + column * value_words * value_step);
        }
    }
    if (shared) {
        TileCall call{keys + (from - chunk_first) * 64, key_step, heads.words, queries, query_bytes,
                      scores + (from - chunk_first) * BLOCK, CHUNK, true};
        tiles<F>(call, count, shared);
    }
    // Blocks that belong to one token alone: the ends of what it sees.
    for (int64_t t = strip.begin; t < strip.end; ++t) {
        const Token& token = strip.at(t);
        const int32_t low = strip.first_key(token), first = low / BLOCK > chunk_first ? low / BLOCK : chunk_first;
        const int32_t last = token.logical / BLOCK + 1 < chunk_last ? token.logical / BLOCK + 1 : chunk_last;
        const int64_t query = (t - strip.begin) * heads.group;
        for (int32_t b = first; b < last; ++b) {
            if (b >= from && b < from + shared) continue;
            rows_of_block<F>(heads, token, strip.kv_head, 0, b, low, rows);
            pack_keys<F>(heads, rows, block, 64);
            TileCall call{block, 64, heads.words, queries + query * query_bytes, query_bytes,
                          scores + query * CHUNK + (b - chunk_first) * BLOCK, CHUNK, true};
            tiles<F>(call, heads.group, 1);
        }
        for (int32_t g = 0; g < heads.group; ++g) {
            float* row = scores + (query + g) * CHUNK;
            float& largest = out.largest[query + g];
            if (first >= last) {
                out.sum[query + g] = -1;
                continue;
            }
            V most = all(-__builtin_inff());
            for (int32_t b = first; b < last; ++b) {
                float* lane = row + (b - chunk_first) * BLOCK;
                V score = mul(load(lane), all(heads.call.scale));
                store(lane, score);
                const int32_t key = b * BLOCK;
                if (key < low || key + BLOCK - 1 > token.logical) {
                    for (int32_t i = 0; i < BLOCK; ++i)
                        if (key + i < low || key + i > token.logical) lane[i] = -__builtin_inff();
                    score = load(lane);
                }
                most = larger(score, most);
            }
            largest = largest_of(most);
            V sum = zero();
            for (int32_t b = first; b < last; ++b) {
                const int64_t at = (b - chunk_first) * BLOCK;
                const V weight = exponential(sub(load(row + at), all(largest)));
                sum = add(sum, weight);
                uint8_t* to_row = weights + (query + g) * weight_stride + at * heads.size;
                if (F == FR_BF16) to_bf16((uint16_t*)to_row, weight);
                else store((float*)to_row, weight);
            }
            out.sum[query + g] = sum_of(sum);
            float* mixed = out.mixed + (query + g) * out.stride;
            for (int64_t e = 0; e < heads.padded; e += 16) store(mixed + e, zero());
        }
    }
    // Values, in ascending order of keys: a token's own blocks below, the shared ones, its own above.
    auto own_values = [&](int64_t t, int32_t begin, int32_t end) {
        const Token& token = strip.at(t);
        const int64_t query = (t - strip.begin) * heads.group;
        for (int32_t b = begin; b < end; ++b) {
            rows_of_block<F>(heads, token, strip.kv_head, 1, b, strip.first_key(token), rows);
            pack_values<F>(heads, rows, block);
            TileCall call{block, value_step, value_words, weights + query * weight_stride + (b - chunk_first) * BLOCK * heads.size,
                          weight_stride, out.mixed + query * out.stride, out.stride, false};
            tiles<F>(call, heads.group, int(heads.padded / 16));
        }
    };
    auto first_of = [&](int64_t t) {
        const int32_t block_of = strip.first_key(strip.at(t)) / BLOCK;
        return block_of > chunk_first ? block_of : chunk_first;
    };
    auto last_of = [&](int64_t t) {
        const int32_t block_after = strip.at(t).logical / BLOCK + 1;
        return block_after < chunk_last ? block_after : chunk_last;
    };
    if (!shared) {
        for (int64_t t = strip.begin; t < strip.end; ++t) own_values(t, first_of(t), last_of(t));
        return;
    }
    for (int64_t t = strip.begin; t < strip.end; ++t) own_values(t, first_of(t), from);
    TileCall call{values + (from - chunk_first) * value_words * value_step, value_step, shared * value_words,
                  weights + (from - chunk_first) * BLOCK * heads.size, weight_stride, out.mixed, out.stride, false};
    tiles<F>(call, count, int(heads.padded / 16));
    for (int64_t t = strip.begin; t < strip.end; ++t) own_values(t, from + shared, last_of(t));
}

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
    return {memory, memory + queries, memory + 2 * ((queries + 15) / 16 * 16), padded};
}
template <int F>
static void attend(const Strip<F>& strip, Shelf& own) {
    const Heads<F>& heads = strip.heads;
    const int64_t count = strip.queries(), floats = running_floats(count, heads.padded);
    uint8_t* queries = own.memory[5].get<uint8_t>(count * heads.padded * heads.size);
    gather_queries<F>(heads, strip.begin, strip.end, strip.kv_head, queries);
    float* memory = own.memory[6].get<float>(2 * floats);
    const Running state = running(memory, count, heads.padded), next = running(memory + floats, count, heads.padded);
    for (int64_t q = 0; q < count; ++q) state.sum[q] = -1;
    const int32_t chunks = chunks_of(*heads.call.tokens, strip.begin, strip.end);
    if (chunks == 1) {
        attend_chunk<F>(strip, 0, queries, state, own);
    } else {
        for (int32_t c = 0; c < chunks; ++c) {
            attend_chunk<F>(strip, c, queries, next, own);
            fold_all(state, next, count, heads.padded);
        }
    }
    deliver<F>(strip, state);
}

// The chunks of one row's keys are shared out, and folded in order afterwards.
template <int F>
static void attend_split(Team& team, const Heads<F>& heads, Shelf& own) {
    const AttentionCall& call = heads.call;
    const int64_t tokens = call.tokens->count(), kv_heads = call.cache->kv_heads;
    const int64_t count = tokens * heads.group, floats = running_floats(count, heads.padded);
    const int32_t chunks = chunks_of(*call.tokens, 0, tokens);
    team.each(kv_heads * chunks, 1, [&](int64_t first, int64_t last) {
        uint8_t* queries = own.memory[5].get<uint8_t>(count * heads.padded * heads.size);
        for (int64_t task = first; task < last; ++task) {
            const Strip<F> strip(heads, 0, tokens, int32_t(task / chunks));
            gather_queries<F>(heads, 0, tokens, strip.kv_head, queries);
            attend_chunk<F>(strip, int32_t(task % chunks), queries, running(call.partials + task * floats, count, heads.padded), own);
        }
    });
    team.each(kv_heads, 1, [&](int64_t first, int64_t last) {
        for (int64_t kv_head = first; kv_head < last; ++kv_head) {
            const Strip<F> strip(heads, 0, tokens, int32_t(kv_head));
            const Running state = running(own.memory[6].get<float>(floats), count, heads.padded);
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
    team.each(tasks, team.grain(tasks, PIECES), [&](int64_t first, int64_t last) {
        for (int64_t task = first; task < last; ++task) {
            const int64_t row = task / kv_heads, end = tokens.row_begin[size_t(row) + 1];
            const int32_t kv_head = int32_t(task % kv_heads);
            int64_t begin = tokens.row_begin[size_t(row)];
            if (call.qkv) append<F>(heads, begin, end, kv_head);
            while (begin < end && !split) {
                const int64_t stop = strip_end(tokens, begin, end, heads.group);
                attend<F>(Strip<F>(heads, begin, stop, kv_head), own);
                begin = stop;
            }
        }
    });
    if (split) attend_split<F>(team, heads, own);
}

static void attention(Team& team, const AttentionCall& call, Shelf& own) {
    if (call.cache->format == FR_BF16) attention_in<FR_BF16>(team, call, own);
    else attention_in<FR_F32>(team, call, own);
}

// ---- the largest logits

static void top(const float* logits, int64_t vocabulary, int32_t k, float* values, int64_t* indices, float* logsumexp) {
    int32_t held = 0;
    auto offer = [&](float value, int64_t index) {  // ascending indices, so an equal value never displaces an earlier one
        if (held == k && !(value > values[k - 1])) return;
        int32_t place = held < k ? held++ : k - 1;
        for (; place > 0 && value > values[place - 1]; --place) {
            values[place] = values[place - 1];
            indices[place] = indices[place - 1];
        }
        values[place] = value;
        indices[place] = index;
    };
    V most = all(-__builtin_inff());
    for (int64_t i = 0; i < vocabulary; i += 16) {
        const int64_t rest = vocabulary - i < 16 ? vocabulary - i : 16;
        float lane[16];
        V x = load_some(logits + i, rest);
        if (rest == 16) most = larger(x, most);
        if (rest == 16 && held == k && !(largest_of(x) > values[k - 1])) continue;
        store(lane, x);
        for (int64_t j = 0; j < rest; ++j) offer(lane[j], i + j);
        if (rest < 16)
            for (int64_t j = 0; j < rest; ++j) most = larger(all(lane[j]), most);
    }
    const float largest = largest_of(most);
    V sum = zero();
    for (int64_t i = 0; i < vocabulary; i += 16) {
        V x = exponential(sub(load_some(logits + i, vocabulary - i), all(largest)));
        if (vocabulary - i < 16) {
            float lane[16];
            store(lane, x);
            x = load_some(lane, vocabulary - i);
        }
        sum = add(sum, x);
    }
    *logsumexp = largest + __builtin_logf(sum_of(sum));
}
