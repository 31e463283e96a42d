// The C ABI of forerun's CPU kernels: what Python sees through ctypes (src/forerun/native/records.py mirrors these records).
//
// One promise holds for everything here: the bits of a token's result do not depend on how many tokens or rows are computed
// beside it, on which cache entries its tree occupies, or on the number of threads. Every output element is accumulated by one
// thread, in one order that is a function of logical positions alone.
#pragma once
#include <cstdint>

#if defined(_WIN32)
#define FR_API extern "C" __declspec(dllexport)
#else
#define FR_API extern "C" __attribute__((visibility("default")))
#endif

// What was wrong.
enum fr_error : int32_t { FR_FINE = 0, FR_BAD_TOKEN = 1, FR_BAD_PLACE = 2, FR_BAD_POSITION = 3, FR_NO_MEMORY = 4, FR_BAD_PATH = 5 };

// Number formats of weights, caches and outputs.
enum fr_format : int32_t { FR_BF16 = 0, FR_F32 = 1, FR_INT8 = 2 };

// A packed matrix [out, in]: panels of 32 outputs; inside a panel, `in` runs slowest and is padded with zeros to `padded_in`.
//   bf16: [padded_in / 2][32][2]     fp32: [padded_in][32]
//   int8: per group of 128 inputs: [32 float scales][32 int32 sums of the group's weights][32][32][4]
// `gated`: two matrices [out, in] in one; outputs 0..15 of a panel are 16 gates, 16..31 the values they gate, and a product is
// silu(gate) * value. `bias` has one float per packed output (32 per panel), or is null.
struct fr_matrix {
    int32_t format, gated;
    int64_t out, in, padded_in;
    uint8_t* data;
    const float* bias;
};

// What the tokens of a forward are and where they stand: `rows` rows of `count` tokens, of which row r has counts[r].
// Row r lives in cache slot `start + r`, holds lengths[r] committed entries and `held` earlier scratch entries behind them.
// paths: [rows, count, reach], the scratch entries (numbers below held + count) that a token sees, in order of depth, which ascends, with
// itself as the last, and -1 behind that; null: all up to itself. positions: for the rotary embedding. states: [rows, count, width] in `states_format` (bf16 or fp32), the inputs
// themselves instead of embedded tokens, which are not looked at then; null: none. mutual: without paths, tokens of a row see those behind
// them in the feed too.
struct fr_feed {
    int32_t rows, count, start, held;
    const int32_t* counts;
    const int32_t* lengths;
    const int64_t* tokens;
    const int32_t* positions;
    const int32_t* paths;
    const uint8_t* states;
    int32_t states_format, reach;
    int32_t mutual;
};

// Keys and values: [layers, 2, slots, capacity, kv_heads, head_dim] in `format` (bf16 or fp32).
struct fr_cache {
    uint8_t* store;
    int32_t format, layers, slots, capacity, kv_heads, head_dim;
};

struct fr_layer {
    const float* attention_norm;
    const float* q_norm;  // null: none
    const float* k_norm;
    const float* mlp_norm;
    fr_matrix qkv, out, gate_up, down;
    int32_t window;  // 0: sees everything
};

struct fr_transformer {
    int32_t layers, width, heads, kv_heads, head_dim, mlp_width;
    float norm_eps, scale;
    const fr_layer* layer;
    const float* final_norm;
    fr_matrix head;              // with a vocabulary of 0 nothing is scored, and only states can be read
    const uint8_t* embedding;    // [vocabulary, width] row by row in `embedding_format`; null: taken from the packed head
    int32_t embedding_format, vocabulary;
    const float* cos;            // [table_length, head_dim / 2]
    const float* sin;
    int64_t table_length;
};

// What a forward shall write. logits: fp32 [rows, count or 1, vocabulary]; best: the index of the largest logit (the first of
// equals), null if not wanted. last: score only the token at this index of each row; null: all. hidden: `hidden_count`
// destinations in `hidden_format`, [rows, count, width] each: the residual stream entering layer hidden_layers[i], or for
// i == layers the output of the final norm. Tokens beyond a row's count get zeros.
struct fr_wanted {
    float* logits;
    int64_t* best;
    const int32_t* last;
    int32_t hidden_count, hidden_format;
    const int32_t* hidden_layers;
    uint8_t* const* hidden;
};

// A draft head: y = value z + silu(gate z) with both in one gated `first`, or with a plain `first` y = z + silu(first z); then
// y = y + silu(block y) for every block. Its logits are vocabulary y. Biases are those of the matrices; y stays fp32.
struct fr_head {
    fr_matrix first;
    const fr_matrix* blocks;
    int64_t block_count;
    fr_matrix vocabulary;
};

// Heads for depths 1, 2, ... of a tree. z is a context [width]; with an embedding [vocabulary, width], behind it the embedded tokens of
// the path from the root to the node that is to have children. `format` (bf16 or fp32): of contexts and embedding. All `first` and
// blocks have one format of weights, all vocabularies one.
struct fr_heads {
    int32_t count, width, vocabulary, format;
    const fr_head* head;
    const uint8_t* embedding;  // null: heads see the context alone
};

// The nodes of one depth, numbered from `first` on, children of one parent together. parents: how many nodes above have children;
// begin: [parents + 1] the first child of each, counted from `first`; ranks: [nodes] which of its parent's best tokens a node is;
// grown: [nodes] its number among the parents of the next level, -1 without children. widest: one more than the largest rank.
struct fr_level {
    int32_t first, nodes, parents, widest;
    const int32_t* begin;
    const int32_t* ranks;
    const int32_t* grown;
};
struct fr_tree {
    int32_t nodes, levels;   // nodes: the root included, which is number 0
    const int32_t* parents;  // [nodes], -1 for the root
    const fr_level* level;
};

// A block drafter: a block is `count` rows, of which the first is an embedded token, the root, and the others are `mask` [width]. Its layers
// are those of `stack`, whose head and embedding are the target's, and whose qkv have one number format. Rows see one another, and the
// memory that is made of what the target has read: norm(fuse x) with the weight fuse_norm, x being states of several of its layers side
// by side. Row k says what may be at depth k + 1: its logits, and with a `rank` above 0 behind before[token above it].
struct fr_block {
    const fr_transformer* stack;
    fr_matrix fuse;  // [width, sources * width]
    const float* fuse_norm;
    const float* mask;
    fr_matrix behind;       // [vocabulary, rank], bf16 or fp32
    const uint8_t* before;  // [vocabulary, rank], in the format of the embedding
    int32_t count, rank;
};
// What the target has read in rows that live in slots from `start` on and hold lengths[r] entries: counts[r] more tokens, whose states
// [counts[r], sources * width] are at states[r] in `format` (bf16 or fp32).
struct fr_block_states {
    int32_t rows, start, format;
    const int32_t* lengths;
    const int32_t* counts;
    const uint8_t* const* states;
};
// Trees for the rows in slots from 0 on: below the root at most nodes[r] nodes, depths[r] deep, none whose path's log-probability is below
// least[r]. Rows without nodes or depth are left out.
struct fr_block_wish {
    int32_t rows;
    const int32_t* lengths;
    const int64_t* roots;
    const int32_t* nodes;
    const int32_t* depths;
    const double* least;
};
// The most probable paths of each row, parents before their children: [rows, room] each, of which sizes[r] are filled, the root included.
// room: more than any nodes[r].
struct fr_block_trees {
    int32_t room;
    int32_t* sizes;
    int64_t* tokens;
    int32_t* parents;
    double* log_probs;
};

// Instruction sets, best last. fr_isa_best: the best this processor runs; fr_isa_use: choose one (false: cannot).
enum fr_isa : int32_t { FR_PORTABLE = 0, FR_AVX2 = 1, FR_AVX512 = 2, FR_AVX512_BF16 = 3, FR_AMX = 4 };
FR_API int32_t fr_isa_best();
FR_API int32_t fr_isa_active();
FR_API int32_t fr_isa_use(int32_t isa);
// The sizes of the records above, in their order, so that a caller can tell a library of another version.
FR_API void fr_sizes(int32_t* sizes);

// Bytes that a packed matrix needs, and filling it: rows [begin, begin + count) of a row-major source (bf16 or fp32), which become
// outputs `at ..` of the matrix (for gated matrices: `part` 0 the gates, 1 the values). Padding must have been zeroed before.
FR_API int64_t fr_packed_bytes(int32_t format, int32_t gated, int64_t out, int64_t in);
FR_API void fr_pack(const fr_matrix* matrix, const uint8_t* source, int32_t source_format, int64_t at, int64_t count, int32_t part,
                    int32_t threads);
FR_API void fr_unpack(const fr_matrix* matrix, float* rows, int64_t at, int64_t count, int32_t part);

// Single operations on contiguous tensors; `format` is that of x and y (bf16 or fp32).
FR_API void fr_linear(const fr_matrix* matrix, const uint8_t* x, const uint8_t* residual, uint8_t* y, int32_t format, int64_t tokens,
                      int32_t threads);
FR_API void fr_norm(const uint8_t* x, const float* weight, const float* bias, uint8_t* y, int32_t format, int64_t tokens,
                    int64_t width, float eps, int32_t centred, int32_t threads);
FR_API void fr_silu_gate(const uint8_t* gate_up, uint8_t* y, int32_t format, int64_t tokens, int64_t width, int32_t threads);
// q: [tokens, heads, head_dim] in the cache's format, y likewise; tokens as in `feed`, padded ones included. FR_FINE or FR_BAD_PATH.
FR_API int32_t fr_attention(const uint8_t* q, const fr_feed* feed, const fr_cache* cache, int32_t layer, int32_t heads, int32_t window,
                            float scale, uint8_t* y, int32_t threads);
// Per row of logits [tokens, vocabulary]: the k largest (equal ones by index) with their indices, and log(sum(exp)).
FR_API void fr_top(const float* logits, int64_t tokens, int64_t vocabulary, int32_t k, float* values, int64_t* indices,
                   float* logsumexp, int32_t threads);

// A whole forward in one call. Says what was wrong, and has done nothing then.
FR_API int32_t fr_forward(const fr_transformer* model, const fr_feed* feed, const fr_cache* cache, const fr_wanted* wanted,
                       int32_t threads);

// Grow a tree below every row's root: tokens [rows, nodes] of all nodes, the root first. contexts: [rows, width].
FR_API int32_t fr_draft(const fr_heads* heads, const fr_tree* tree, const uint8_t* contexts, const int64_t* roots, int64_t* tokens,
                        int64_t rows, int32_t threads);

// Of a block drafter: write the keys and values of what the target has read into the cache, behind what the rows hold.
FR_API int32_t fr_block_read(const fr_block* block, const fr_block_states* states, const fr_cache* cache, int32_t threads);
// Logits [rows, count, vocabulary] of all rows' blocks, without the term of the tokens above; rows that are left out get zeros. What a block
// itself adds to the cache lies behind the rows' entries, and is not needed any more.
FR_API int32_t fr_block_score(const fr_block* block, const fr_block_wish* wish, const fr_cache* cache, float* logits, int32_t threads);
// Trees of them. Of equal paths the shallower comes first, then that of the more probable tokens, then the lower token.
FR_API int32_t fr_block_grow(const fr_block* block, const fr_block_wish* wish, const fr_cache* cache, const fr_block_trees* trees,
                             int32_t threads);

// ---- laws, draws and acceptance (sampling.cc)

// What a row asks of a law, in this order; a temperature of 0: the best token alone. Off: top_k 0, top_p 1, min_p 0.
struct fr_filter {
    float temperature;
    int32_t top_k;
    double top_p, min_p;
};
// Trees, and the uniform numbers that settle them: [rows, nodes] each, of which row r has sizes[r]. parents: -1 or 0 for node 0. token_luck: of
// the token behind a node of this depth; coin_luck: of a node. Written: kept [rows, nodes], the nodes that survive, node 0 first, -1
// behind them; next [rows], the token after them.
struct fr_proposal {
    int32_t rows, nodes;
    const int64_t* sizes;
    const int64_t* parents;
    const int64_t* tokens;
    const double* token_luck;
    const double* coin_luck;
    int64_t* kept;
    int64_t* next;
};
// Laws of rows * count nodes from logits [rows, count, vocabulary], fp32; one filter per row.
FR_API void fr_laws(const float* logits, const fr_filter* filters, int64_t rows, int64_t count, int64_t vocabulary, float* laws,
                    int32_t threads);
// The token at which the running sum of each law [count, vocabulary] (fp32, or fp64 if `wide`) passes this share of its total.
FR_API void fr_pick(const void* laws, int32_t wide, int64_t count, int64_t vocabulary, const double* shares, int64_t* tokens,
                    int32_t threads);
// Uniform numbers [rows, columns] (src/forerun/chance.py) for a purpose: of row r at positions[r] + places, attempts (null: none) hashed in.
FR_API void fr_uniform(const uint64_t* keys, const int64_t* positions, int32_t purpose, const int64_t* places, const int64_t* attempts,
                       int64_t rows, int64_t columns, double* numbers);
// Descend to the child that carries the token drawn behind its parent. laws: [rows, nodes, vocabulary], of which the nodes that were asked are
// written; null: not wanted.
FR_API void fr_match(const fr_proposal* trees, const float* logits, const fr_filter* filters, int64_t vocabulary, float* laws,
                     int32_t threads);
// Traversal verification (src/forerun/accept/exact.py) of trees drawn from draft_laws; both laws [rows, nodes, vocabulary] in fp32 or `wide`.
// drawn: [rows, nodes], how the children of each node were. FR_FINE or FR_BAD_TOKEN.
FR_API int32_t fr_verify(const fr_proposal* trees, const void* laws, const void* draft_laws, const uint8_t* drawn, int32_t wide,
                         int64_t vocabulary, int32_t threads);

// ---- text that is looked up (automaton.cc)

// A suffix automaton over the tokens 0 .. 2^31 - 1 (src/forerun/stores/automaton.py explains it) and a place in it. One thread at a time may use
// an automaton and its views. Whatever returns int32_t gives FR_FINE or an fr_error unless it says otherwise; an automaton that found no
// memory to grow (FR_NO_MEMORY) is empty.
struct fr_automaton;
struct fr_cursor {
    int32_t state, length;
};
FR_API fr_automaton* fr_automaton_new(int32_t reach);  // null: no memory
FR_API void fr_automaton_free(fr_automaton* automaton);
FR_API int32_t fr_automaton_extend(fr_automaton* automaton, const int32_t* tokens, int64_t count);
FR_API void fr_automaton_size(const fr_automaton* automaton, int64_t* tokens_states_bytes);
FR_API void fr_automaton_match(const fr_automaton* automaton, fr_cursor* cursor);
FR_API int32_t fr_automaton_advance(const fr_automaton* automaton, fr_cursor* cursor, const int32_t* tokens, int64_t count);
FR_API int32_t fr_automaton_outlook(const fr_automaton* automaton, const fr_cursor* cursor, int32_t* newest_run_branches_end);
// How many were found, at most `count`, or minus an fr_error.
FR_API int32_t fr_automaton_continuations(const fr_automaton* automaton, const fr_cursor* cursor, int32_t count, int32_t shortest,
                                          int32_t* tokens);

// A row's view of an automaton. own: its firm tokens are appended to the automaton, and `cursor` is not used; otherwise the cursor
// follows them. prior: [3 ranks][lengths 1 .. 64][runs 1 .. 8][branches] log-odds; all, by_length: what the row adds to them. studied: of
// more firm tokens at once, only so many at the end teach. nodes, depth, min_match, cost: as in `Limits`; ends: tokens nothing follows. The
// tree goes to tokens, parents and survival, [room] each, room > nodes.
struct fr_view {
    fr_automaton* automaton;
    const double* prior;
    double all, by_length[8];
    fr_cursor cursor;
    int32_t own, studied, nodes, depth, min_match, room, ends_count;
    double cost;
    const int32_t* ends;
    int32_t* tokens;
    int32_t* parents;
    double* survival;
};
// The row goes on with these tokens.
FR_API int32_t fr_view_read(fr_view* view, const int32_t* tokens, int64_t count);
// The row goes on with `firm` tokens, then `tentative` ones that are followed but not kept, of which the last one is `root`. How many
// nodes grow there (1: the root alone), or minus an fr_error. fr_view_next: with one firm token.
FR_API int32_t fr_view_draft(fr_view* view, const int32_t* tokens, int64_t firm, int64_t tentative, int32_t root);
FR_API int32_t fr_view_next(fr_view* view, int32_t token);

// A corpus of text (src/forerun/stores/index.py tells its layout): tokens [size] (uint16, or int32 if `wide`), order [entries],
// starts [vocabulary + 1].
struct fr_corpus {
    const void* tokens;
    const int32_t* order;
    const int32_t* starts;
    int64_t size, entries;
    int32_t vocabulary, wide;
};
// What is asked of it: the limits of a tree, at most `places` places of which `enough` need no shorter matches beside them. weights: [2, 4]
// of the best child and of the others; odds: [1 + FR_CORPUS_LENGTHS].
enum : int32_t { FR_CORPUS_LENGTHS = 8 };
struct fr_corpus_wish {
    int32_t nodes, depth, min_match, places, enough, end_count;
    double cost;
    const int32_t* ends;
    const double* weights;
    const double* odds;
};
// A tree: [wish.nodes + 1] each, of which `nodes` are filled; the longest match; the most probable next token (-1: none) and its chance.
struct fr_corpus_draft {
    int32_t* tokens;
    int32_t* parents;
    double* survival;
    int32_t nodes, length, first;
    double chance;
};
// end: the row's last tokens, the newest first.
FR_API int32_t fr_corpus_grow(const fr_corpus* corpus, const fr_corpus_wish* wish, const int32_t* end, int32_t length, int32_t root,
                              fr_corpus_draft* draft);
