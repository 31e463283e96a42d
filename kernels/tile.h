// One small product: T tokens times NV * 16 outputs, every output summed over the inputs in ascending order into one accumulator (on a
// matrix unit by units of words, see matrix_unit.h).
// Linear layers, attention scores and attention sums are all made of it, which is why a result cannot depend on how tokens and outputs
// were grouped.

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
    int64_t unit = 16;  // words that a matrix unit sums at once
    const uint8_t* ahead = nullptr;  // memory to fetch meanwhile, `ahead_step` bytes further with every word; null: the weights AHEAD
    int64_t ahead_step = 0;
};

// How far ahead weights are fetched, in bytes. Measured: 4 KiB is too late for main memory under 12 tokens, 32 KiB too early.
constexpr int64_t AHEAD = 12288;

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

#if FR_ISA == 4
#include "matrix_unit.h"
#else
static inline void release_unit() {}
#endif

// Whether a matrix unit makes these products.
template <int F>
constexpr bool has_unit() { return FR_ISA == 4 && F == FR_BF16; }

using TileFunction = void (*)(const TileCall&);

#if FR_ISA >= 2
constexpr int32_t TALLEST = 14, WIDEST = 2;
#else
constexpr int32_t TALLEST = 4, WIDEST = 1;
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
#if FR_ISA == 4
    if (has_unit<F>()) return unit_tiles(call, tokens, vectors);
#endif
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
