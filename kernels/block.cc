// Block drafters: what the target has read becomes the memory of their layers, and the best tree grows of one forward.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
#include <vector>

#include "formats.h"

namespace {

// Whether rows that hold lengths[r] entries have room for `more` of them, at positions that exist.
int32_t room_for(const fr_transformer& stack, const fr_cache& cache, int32_t slot, int32_t length, int32_t more) {
    if (length < 0 || more < 0 || slot < 0 || slot >= cache.slots || int64_t(length) + more > cache.capacity) return FR_BAD_PLACE;
    return int64_t(length) + more > stack.table_length ? FR_BAD_POSITION : FR_FINE;
}

// ---- reading

// The part of a layer's qkv from the panel on in which the keys begin.
struct KeysAndValues {
    fr_matrix matrix;
    int64_t column;  // of the panel, in the whole

    KeysAndValues(const fr_transformer& stack, const fr_layer& layer) : matrix(layer.qkv) {
        column = int64_t(stack.heads) * stack.head_dim / PANEL * PANEL;
        matrix.data += fr_packed_bytes(matrix.format, 0, column, matrix.in);
        matrix.out -= column;
        if (matrix.bias) matrix.bias += column;
    }
};

class Reading {
  public:
    Reading(const fr_block& block, const fr_block_states& states, const fr_cache& cache, Workspace& work)
        : block_(block), stack_(*block.stack), states_(states), cache_(cache), work_(work), tokens_(work.tokens) {
        list_tokens();
        Shared& room = work.shared;
        stride_ = round_up(stack_.width, PANEL);
        memory_stride_ = round_up((stack_.heads + 2 * stack_.kv_heads) * stack_.head_dim, PANEL);
        sources_ = inputs_for(block.fuse, count(), room.sources);
        sums_ = room.sums.get<float>(count() * stride_);
        fused_ = inputs_for(stack_.layer[0].qkv, count(), room.fused);
        memory_ = room.memory.get<float>(stack_.layers * count() * memory_stride_);
        for (int32_t l = 0; l < stack_.layers; ++l) parts_.emplace_back(stack_, stack_.layer[l]);
        for (int32_t l = 0; l < stack_.layers; ++l) {
            const KeysAndValues& part = parts_[size_t(l)];
            products_.push_back({&part.matrix, fused_, Outputs{Into::store, memory_of(l) + part.column, memory_stride_}});
        }
    }

    static constexpr int64_t STEPS = 5;
    int64_t count() const { return tokens_.count(); }

    void run(Team team) {
        Shelf& own = work_.own[size_t(team.rank)];
        float* row = own.row.get<float>(std::max<int64_t>(block_.fuse.in, stride_));
        team.each(count(), team.grain(count(), 4), [&](int64_t first, int64_t last) {
            for (int64_t t = first; t < last; ++t) {
                const Token& token = tokens_.list[size_t(t)];
                const int64_t bytes = block_.fuse.in * size_of(states_.format);
                read_row(states_.states[token.row] + token.place * bytes, states_.format, block_.fuse.in, row);
                kernels().emit(row, block_.fuse.in, sources_, t);
            }
        });
        kernels().linear(team, block_.fuse, sources_, count(), {Into::store, sums_, stride_});
        team.each(count(), team.grain(count(), 4), [&](int64_t first, int64_t last) {
            for (int64_t t = first; t < last; ++t) {
                kernels().norm(sums_ + t * stride_, block_.fuse_norm, nullptr, row, stack_.width, stack_.norm_eps, false);
                kernels().emit(row, stack_.width, fused_, t);
            }
        });
        kernels().products(team, products_.data(), stack_.layers, count());
        team.each(stack_.layers * count(), team.grain(stack_.layers * count(), 2), [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; ++i) append(int32_t(i / count()), i % count());
        });
    }

  private:
    // `place` counts within a row here, whose states lie apart from those of others.
    void list_tokens() {
        tokens_.list.clear();
        for (int32_t row = 0; row < states_.rows; ++row) {
            for (int32_t i = 0; i < states_.counts[row]; ++i) {
                const int32_t entry = states_.lengths[row] + i;
                tokens_.list.push_back({row, states_.start + row, i, entry, states_.lengths[row], entry, entry, nullptr, 0});
            }
        }
    }

    float* memory_of(int32_t layer) const { return memory_ + layer * count() * memory_stride_; }

    void append(int32_t layer, int64_t token) {
        const fr_layer& l = stack_.layer[layer];
        const AttentionCall call{.tokens = &tokens_,
                                 .cache = &cache_,
                                 .layer = layer,
                                 .heads = stack_.heads,
                                 .qkv = memory_of(layer),
                                 .qkv_stride = memory_stride_,
                                 .cos = stack_.cos,
                                 .sin = stack_.sin,
                                 .k_norm = l.k_norm,
                                 .eps = stack_.norm_eps};
        kernels().append_all(call, token, token + 1);
    }

    const fr_block& block_;
    const fr_transformer& stack_;
    const fr_block_states& states_;
    const fr_cache& cache_;
    Workspace& work_;
    Tokens& tokens_;
    int64_t stride_, memory_stride_;
    Inputs sources_, fused_;
    float *sums_, *memory_;
    std::vector<KeysAndValues> parts_;
    std::vector<Product> products_;
};

// ---- the forward of the blocks

bool is_asked(const fr_block_wish& wish, int32_t row) { return wish.nodes[row] > 0 && wish.depths[row] > 0; }

int32_t score(const fr_block& block, const fr_block_wish& wish, const fr_cache& cache, float* logits, Afterwards* then, int32_t threads) {
    const fr_transformer& stack = *block.stack;
    std::vector<int32_t> counts(size_t(wish.rows), 0), positions(size_t(wish.rows) * block.count, 0);
    float* x = workspace().shared.rows.get<float>(int64_t(wish.rows) * block.count * stack.width);
    for (int32_t row = 0; row < wish.rows; ++row) {
        if (!is_asked(wish, row)) continue;
        if (wish.roots[row] < 0 || wish.roots[row] >= stack.vocabulary) return FR_BAD_TOKEN;
        if (const int32_t error = room_for(stack, cache, row, wish.lengths[row], block.count)) return error;
        counts[size_t(row)] = block.count;
        float* to = x + int64_t(row) * block.count * stack.width;
        read_row(stack.embedding + wish.roots[row] * stack.width * size_of(stack.embedding_format), stack.embedding_format, stack.width, to);
        for (int32_t k = 0; k < block.count; ++k) {
            positions[size_t(row) * block.count + k] = wish.lengths[row] + k;
            if (k) std::memcpy(to + k * int64_t(stack.width), block.mask, size_t(stack.width) * 4);
        }
    }
    const fr_feed feed{.rows = wish.rows,
                       .count = block.count,
                       .start = 0,
                       .held = 0,
                       .counts = counts.data(),
                       .lengths = wish.lengths,
                       .tokens = nullptr,
                       .positions = positions.data(),
                       .paths = nullptr,
                       .states = reinterpret_cast<const uint8_t*>(x),
                       .states_format = FR_F32,
                       .reach = 0,
                       .mutual = 1};
    const fr_wanted wanted{logits, nullptr, nullptr, 0, 0, nullptr, nullptr};
    return forward(stack, feed, cache, wanted, then, threads);
}

// ---- trees

// The tree of one row. Of every node its best children are known as soon as it is expanded; the best child that is not in the tree yet, of
// any node, is the next to come. A child is never better than its parent, so these are the best of all paths.
class Tree {
  public:
    Tree(const fr_block& block, const fr_block_wish& wish, const fr_block_trees& trees, int32_t r)
        : row(r),
          tokens_(trees.tokens + int64_t(r) * trees.room),
          parents_(trees.parents + int64_t(r) * trees.room),
          log_probs_(trees.log_probs + int64_t(r) * trees.room),
          size_(trees.sizes[r]),
          most_(wish.nodes[r] + 1),
          depth_(std::min(wish.depths[r], block.count)),
          widest_(std::min(wish.nodes[r], block.stack->vocabulary)),
          least_(wish.least[r]),
          nodes_(size_t(most_)),
          values_(size_t(most_) * widest_),
          children_(size_t(most_) * widest_) {}

    int64_t newest() const { return tokens_[size_ - 1]; }
    int32_t depth() const { return nodes_[size_t(size_ - 1)].depth; }

    // The newest node has these logits. False when the tree is done, else there is a newer node to expand.
    bool expand(const float* logits, int64_t vocabulary) {
        Node& node = nodes_[size_t(size_ - 1)];
        const size_t at = size_t(size_ - 1) * widest_;
        float total;
        node.held = std::min(widest_, most_ - size_);
        kernels().top(logits, vocabulary, node.held, values_.data() + at, children_.data() + at, &total);
        for (int32_t i = 0; i < node.held; ++i) values_[at + i] -= total;
        while (size_ < most_) {
            const int32_t parent = best_parent();
            if (parent < 0 || !(next_of(parent) >= least_)) return false;
            add_next(parent);
            if (size_ < most_ && depth() < depth_) return true;
        }
        return false;
    }

    const int32_t row;

  private:
    struct Node {
        int32_t depth = 0, rank = 0, held = 0, taken = 0;  // rank: among its siblings; held, taken: of its children
    };

    size_t child_of(int32_t node) const { return size_t(node) * widest_ + nodes_[size_t(node)].taken; }
    double next_of(int32_t node) const { return log_probs_[node] + double(values_[child_of(node)]); }

    // Whose next child is the best of all; -1: there is none.
    int32_t best_parent() const {
        int32_t best = -1;
        for (int32_t node = 0; node < size_; ++node) {
            if (nodes_[size_t(node)].taken == nodes_[size_t(node)].held || !(next_of(node) >= least_)) continue;
            if (best < 0 || next_of(node) > next_of(best) || (next_of(node) == next_of(best) && comes_before(node, best))) best = node;
        }
        return best;
    }

    // The shallower of two different nodes, or that which the better ranks lead to.
    bool comes_before(int32_t a, int32_t b) const {
        if (nodes_[size_t(a)].depth != nodes_[size_t(b)].depth) return nodes_[size_t(a)].depth < nodes_[size_t(b)].depth;
        while (parents_[a] != parents_[b]) a = parents_[a], b = parents_[b];
        return nodes_[size_t(a)].rank < nodes_[size_t(b)].rank;
    }

    void add_next(int32_t parent) {
        tokens_[size_] = children_[child_of(parent)];
        parents_[size_] = parent;
        log_probs_[size_] = next_of(parent);
        nodes_[size_t(size_)].depth = nodes_[size_t(parent)].depth + 1;
        nodes_[size_t(size_)].rank = nodes_[size_t(parent)].taken++;
        ++size_;
    }

    int64_t* tokens_;
    int32_t* parents_;
    double* log_probs_;
    int32_t& size_;
    int32_t most_, depth_, widest_;
    double least_;
    std::vector<Node> nodes_;
    std::vector<float> values_;       // log-probabilities of [node, child]
    std::vector<int64_t> children_;  // and their tokens
};

// All trees grow side by side: in every round each expands one node, and the Markov term of all of them is one product.
class Grove : public Afterwards {
  public:
    Grove(const fr_block& block, const fr_block_wish& wish, const fr_block_trees& trees, const float* logits, Workspace& work)
        : block_(block), vocabulary_(block.stack->vocabulary), logits_(logits), work_(work) {
        for (int32_t row = 0; row < wish.rows; ++row) {
            trees.sizes[row] = 1;
            trees.tokens[int64_t(row) * trees.room] = wish.roots[row];
            trees.parents[int64_t(row) * trees.room] = -1;
            trees.log_probs[int64_t(row) * trees.room] = 0;
            if (!is_asked(wish, row)) continue;
            trees_.emplace_back(block, wish, trees, row);
            rounds_ = std::max<int64_t>(rounds_, wish.nodes[row]);
        }
        growing_ = std::vector<char>(trees_.size(), 1);
        left_ = count();
        if (!block.rank) return;
        stride_ = round_up(vocabulary_, PANEL);
        before_ = inputs_for(block.behind, count(), work.shared.before);
        laws_ = work.shared.laws.get<float>(count() * stride_);
        for (int64_t i = 0; i < count(); ++i) std::memset(laws_ + i * stride_ + vocabulary_, 0, size_t(stride_ - vocabulary_) * 4);
    }

    // Steps that it takes: the first, and at most two for every node.
    int64_t steps() const override { return 2 * rounds_ + 1; }
    bool is_empty() const { return trees_.empty(); }

    void run(Team team) override {
        Shelf& own = work_.own[size_t(team.rank)];
        team.each(count(), 1, [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; ++i) prepare(i, own);
        });
        // A thread that comes late may find trees finished by others that are rounds ahead: then nothing is left for it to do.
        while (left_.load(std::memory_order_acquire) > 0) {
            if (block_.rank) kernels().linear(team, block_.behind, before_, count(), {Into::add, laws_, stride_});
            team.each(count(), 1, [&](int64_t first, int64_t last) {
                for (int64_t i = first; i < last; ++i) {
                    if (!growing_[size_t(i)]) continue;
                    const Tree& tree = trees_[size_t(i)];
                    growing_[size_t(i)] = trees_[size_t(i)].expand(block_.rank ? laws_ + i * stride_ : logits_of(tree), vocabulary_);
                    if (growing_[size_t(i)]) prepare(i, own);
                    else left_.fetch_sub(1, std::memory_order_release);
                }
            });
        }
    }

  private:
    int64_t count() const { return int64_t(trees_.size()); }

    const float* logits_of(const Tree& tree) const {
        return logits_ + (int64_t(tree.row) * block_.count + tree.depth()) * vocabulary_;
    }

    // What is added up for the newest node of a tree.
    void prepare(int64_t i, Shelf& own) {
        if (!block_.rank) return;
        const Tree& tree = trees_[size_t(i)];
        const int32_t format = block_.stack->embedding_format;
        float* row = own.row.get<float>(block_.rank);
        read_row(block_.before + tree.newest() * block_.rank * size_of(format), format, block_.rank, row);
        kernels().emit(row, block_.rank, before_, i);
        std::memcpy(laws_ + i * stride_, logits_of(tree), size_t(vocabulary_) * 4);
    }

    const fr_block& block_;
    const int32_t vocabulary_;
    const float* logits_;
    Workspace& work_;
    std::vector<Tree> trees_;
    std::vector<char> growing_;
    std::atomic<int64_t> left_{0};
    int64_t rounds_ = 0, stride_ = 0;
    Inputs before_;
    float* laws_ = nullptr;
};

}  // namespace

FR_API int32_t fr_block_read(const fr_block* block, const fr_block_states* states, const fr_cache* cache, int32_t threads) {
    for (int32_t row = 0; row < states->rows; ++row) {
        const int32_t slot = states->start + row;
        if (const int32_t error = room_for(*block->stack, *cache, slot, states->lengths[row], states->counts[row])) return error;
    }
    try {
        Workspace& work = workspace();
        Step* steps = work.begin(threads, Reading::STEPS);
        Reading reading(*block, *states, *cache, work);
        if (reading.count()) together(threads, steps, [&](Team team) { reading.run(team); });
    } catch (const std::bad_alloc&) {
        return FR_NO_MEMORY;
    }
    return FR_FINE;
}

FR_API int32_t fr_block_score(const fr_block* block, const fr_block_wish* wish, const fr_cache* cache, float* logits, int32_t threads) {
    try {
        return score(*block, *wish, *cache, logits, nullptr, threads);
    } catch (const std::bad_alloc&) {
        return FR_NO_MEMORY;
    }
}

FR_API int32_t fr_block_grow(const fr_block* block, const fr_block_wish* wish, const fr_cache* cache, const fr_block_trees* trees,
                             int32_t threads) {
    try {
        Workspace& work = workspace();
        float* logits = work.shared.scores.get<float>(int64_t(wish->rows) * block->count * block->stack->vocabulary);
        Grove grove(*block, *wish, *trees, logits, work);
        return grove.is_empty() ? int32_t(FR_FINE) : score(*block, *wish, *cache, logits, &grove, threads);
    } catch (const std::bad_alloc&) {
        return FR_NO_MEMORY;
    }
}
