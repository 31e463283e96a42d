// What one forward needs besides weights: the tokens in one list, and scratch memory that is kept between calls.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "forerun_kernels.h"
#include "team.h"

constexpr int32_t PANEL = 32, GROUP = 128, BLOCK = 16, CHUNK = 256, WIDEST_HEAD = 512, PEAKS = 256;

static inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

static inline int64_t panels_of(const fr_matrix& matrix) {
    const int64_t each = matrix.gated ? PANEL / 2 : PANEL;
    return (matrix.out + each - 1) / each;
}

// Memory aligned to cache lines that grows and is never given back; its content does not survive growth.
class Scratch {
  public:
    template <class T>
    __attribute__((always_inline)) T* get(int64_t count) {
        return static_cast<T*>(bytes(count * int64_t(sizeof(T))));
    }
    void* bytes(int64_t count);  // not inline: it must not be compiled for one instruction set and run on another
    ~Scratch();
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

  private:
    void* memory_ = nullptr;
    int64_t size_ = 0;
};

// One token of a feed. `place`: its number in [rows, count]; `entry`: where its key goes; `logical`: how many keys precede it;
// `path`: the scratch entries it sees, by depth, counted from `length` (null: entry and logical position are the same thing).
struct Token {
    int32_t row, slot, place, entry, length, logical, position;
    const int32_t* path;
    int64_t id;

    int32_t entry_of(int32_t key) const { return key < length || !path ? key : length + path[key - length]; }
};

// The real tokens of a feed, row after row (padding is left out).
struct Tokens {
    std::vector<Token> list;
    std::vector<int32_t> row_begin;

    int64_t count() const { return int64_t(list.size()); }
    void read(const fr_feed& feed);
};

// Whether every path of a feed ascends from an entry that is there to its own token's.
bool paths_hold(const fr_feed& feed);

// Rows that every thread normalises for itself, as soon as it has got a piece of the product that they are inputs of: cheaper, for a few
// tokens, than waiting for one another. While it has that piece, nobody goes on to write what it reads.
struct OwnNorm {
    const float* rows;
    int64_t stride;
    const float* weight;
    int64_t width;
    float eps;
    float* row;  // room for one
};

// Inputs of a product: rows of bf16 or fp32, or of unsigned bytes with a scale per group of 128.
struct Inputs {
    uint8_t* data = nullptr;
    float* scales = nullptr;
    int64_t stride = 0;        // bytes between tokens
    int64_t scale_stride = 0;  // floats between tokens
    int32_t format = FR_BF16;
    const OwnNorm* made_of = nullptr;  // if set, they are not there yet
};

// The largest results that each thread has seen of every token, largest first and equal ones by index; a NaN counts as minus infinity.
struct Top {
    int32_t k = 0;
    float* values = nullptr;  // [threads, tokens, k]
    int32_t* at = nullptr;    // likewise
    int32_t* held = nullptr;  // [threads, tokens], how many there are; zeros to begin with
};

// Where a product x goes. gated: silu(gate) * value; through: silu(gate) + value; residual: added + silu(x); top: nowhere, but the largest
// are remembered.
enum class Into { store, add, logits, gated, through, residual, top };
struct Outputs {
    Into into = Into::store;
    float* floats = nullptr;  // store, add, logits; gated, through, residual: if set
    int64_t stride = 0;       // floats between tokens
    Inputs* next = nullptr;   // gated, through, residual: if set, as inputs (bf16 or fp32) of the next product
    const int32_t* places = nullptr;  // logits: the row of `floats` for every token
    int64_t columns = 0;              // logits, top: how many there are
    float* best = nullptr;            // logits: [threads, tokens] largest so far, and where
    int64_t* best_at = nullptr;
    const float* added = nullptr;  // residual: rows like those of `floats`
    Top top;
};

// One of several products that are made in one step.
struct Product {
    const fr_matrix* matrix;
    Inputs x;
    Outputs to;
};

// Memory for inputs of products, whatever number format they have.
struct InputRoom {
    Scratch data[3], scales;
};

// What the threads of a call have in common.
struct Shared {
    Scratch residual, qkv, floats, best, best_at, partials;  // a forward: rows of fp32, and who found the largest logit where
    InputRoom normal, mixed, gated, final;                   // what products read: norms, attention, the multilayer perceptron, the last
    InputRoom contexts, hidden[2];                           // draft heads: z, and y before and after a block
    Scratch y, plain, top_values, top_at, top_held, tops;    // y as fp32, contexts as fp32, and the best tokens of every level
    InputRoom sources, fused, before;                        // block drafters: what the target said, fused, and the Markov term's inputs
    Scratch sums, memory, rows, scores, laws;  // the same as fp32: fused, keys and values, a block's rows, their logits, with the term
};

// What every thread has for itself.
struct Shelf {
    Scratch keys, values, scores, weights, block;  // a chunk of attention
    Scratch queries, running;                      // and what goes on from chunk to chunk
    Scratch row, second_row;                       // of fp32
    InputRoom normal;                              // rows of an `OwnNorm`
    Scratch products, nexts, found;                // draft heads: what is made in one step, where it goes, and a node's best tokens
};

struct Workspace {
    Tokens tokens;
    Shared shared;
    std::vector<Shelf> own;  // one per thread

    // Memory for so many threads, and `steps` fresh steps.
    Step* begin(int32_t threads, int64_t steps);

  private:
    Scratch steps_;
};

// This thread's workspace. One forward at a time uses it: threads of a team share the workspace of the thread that called.
Workspace& workspace();

// The operations of one instruction set. `Team` says which part of the work is this thread's.
struct Kernels {
    void (*read_row)(const uint8_t* from, int32_t format, int64_t count, float* to);  // bf16 or fp32 -> fp32
    void (*write_row)(uint8_t* to, int32_t format, int64_t count, const float* from);  // and back
    void (*linear)(Team&, const fr_matrix&, const Inputs&, int64_t tokens, const Outputs&);
    void (*products)(Team&, const Product* list, int64_t count, int64_t tokens);
    void (*norm)(const float* x, const float* weight, const float* bias, float* y, int64_t width, float eps, bool centred);
    void (*emit)(const float* row, int64_t width, Inputs& to, int64_t token);
    void (*attention)(Team&, const struct AttentionCall&, Shelf& own);
    void (*append_all)(const struct AttentionCall&, int64_t begin, int64_t end);
    void (*silu_gate)(const float* gate_up, float* y, int64_t width);
    void (*top)(const float* logits, int64_t vocabulary, int32_t k, float* values, int64_t* indices, float* logsumexp);
    float (*temper)(const float* logits, int64_t count, float temperature, float* to);  // these are in laws.h
    void (*peaks)(const float* x, int64_t count, float* most);
    int64_t (*at_least)(const float* x, int64_t count, float least, int32_t* where);
    double (*weigh)(float* x, int64_t count, float most);
    void (*scale)(const float* x, int64_t count, float factor, float* to);
    void (*excess)(double budget, const void* law, bool wide_law, const void* draft, bool wide_draft, int64_t count, double* to);
};

// Attention of all tokens over one layer of the cache. Queries come from `qkv` (fp32 [tokens, qkv_stride], not yet rotated, keys and
// values are appended first) or, when that is null, ready from `q` in the cache's format.
struct AttentionCall {
    const Tokens* tokens = nullptr;
    const fr_cache* cache = nullptr;
    int32_t layer = 0, heads = 0, window = 0;
    float scale = 0;
    const float* qkv = nullptr;
    int64_t qkv_stride = 0;
    const float *cos = nullptr, *sin = nullptr, *q_norm = nullptr, *k_norm = nullptr;
    float eps = 0;
    const uint8_t* q = nullptr;
    Inputs* out = nullptr;        // [tokens, heads * head_dim]
    float* out_floats = nullptr;  // if set, written instead of `out`
    int64_t out_stride = 0;
    float* partials = nullptr;  // room for `partial_floats` of them
};

// The running softmax of some queries in one block of floats: largest score, sum, and mixed values of each.
static inline int64_t running_floats(int64_t queries, int64_t padded) { return 2 * round_up(queries, 16) + queries * padded; }

// Too few heads for the threads, and a long text: then its chunks are shared out, and folded in order afterwards.
static inline bool splits(const Tokens& tokens, const fr_cache& cache, int32_t heads, int32_t threads) {
    return tokens.row_begin.size() == 2 && tokens.count() > 0 && cache.kv_heads < threads && tokens.list.back().logical >= 2 * CHUNK &&
           tokens.count() * (heads / cache.kv_heads) <= 64;
}
static inline int32_t chunks_of(const Tokens& tokens, int64_t begin, int64_t end) {
    int32_t most = 0;
    for (int64_t t = begin; t < end; ++t) most = tokens.list[size_t(t)].logical > most ? tokens.list[size_t(t)].logical : most;
    return most / CHUNK + 1;
}
static inline int64_t partial_floats(const Tokens& tokens, const fr_cache& cache, int32_t heads, int32_t threads) {
    if (!splits(tokens, cache, heads, threads)) return 0;
    const int64_t queries = tokens.count() * (heads / cache.kv_heads);
    return running_floats(queries, round_up(cache.head_dim, PANEL)) * chunks_of(tokens, 0, tokens.count()) * cache.kv_heads;
}

// What a team goes on with behind a forward, in at most `steps` steps.
struct Afterwards {
    virtual ~Afterwards() = default;
    virtual int64_t steps() const = 0;
    virtual void run(Team team) = 0;
};
// fr_forward, and what comes afterwards (null: nothing) before the threads part.
int32_t forward(const fr_transformer& model, const fr_feed& feed, const fr_cache& cache, const fr_wanted& wanted, Afterwards* then,
                int32_t threads);

const Kernels& kernels();  // of the active instruction set
extern const Kernels portable_kernels, avx2_kernels, avx512_kernels, avx512_bf16_kernels, amx_kernels;
