// Draft heads: a whole static tree in one call.
#include <algorithm>
#include <cstring>
#include <new>

#include "formats.h"

namespace {

// Rows of inputs from row `begin` on.
Inputs part_of(Inputs x, int64_t begin) {
    x.data += begin * x.stride;
    x.scales += begin * x.scale_stride;
    return x;
}

class Draft {
  public:
    Draft(const fr_heads& heads, const fr_tree& tree, const uint8_t* contexts, const int64_t* roots, int64_t* tokens, int64_t rows,
          Workspace& work, int32_t threads)
        : heads_(heads), tree_(tree), contexts_(contexts), roots_(roots), tokens_(tokens), rows_(rows), work_(work), threads_(threads) {
        Shared& shared = work.shared;
        stride_ = round_up(heads.width, PANEL);
        const fr_matrix* widest = &heads.head[0].first;
        for (int32_t l = 0; l < tree.levels; ++l) {
            most_ = std::max(most_, rows_of(l));
            blocks_ = std::max(blocks_, heads.head[l].block_count);
            if (heads.head[l].first.padded_in > widest->padded_in) widest = &heads.head[l].first;
        }
        const fr_matrix inner{widest->format, 0, heads.width, heads.width, round_up(heads.width, widest->format == FR_INT8 ? GROUP : PANEL),
                              nullptr, nullptr};
        const int64_t room = most_ * (chained() ? 1 : tree.levels), written = round_up(heads.width, 16);
        z_ = inputs_for(*widest, most_, shared.contexts);
        for (int32_t i = 0; i < 2; ++i) {
            x_[i] = inputs_for(inner, room, shared.hidden[i]);
            clear_padding(x_[i], room, written, inner.padded_in);
        }
        final_ = inputs_for(heads.head[0].vocabulary, room, shared.final);
        clear_padding(final_, room, written, heads.head[0].vocabulary.padded_in);
        y_ = shared.y.get<float>(room * stride_);
        for (int64_t row = 0; row < room; ++row) clear(y_ + row * stride_, written);
        plain_ = shared.plain.get<float>(rows * stride_);
        make_lists();
    }

    // Steps that it takes: at most so many per level, and the first.
    static int64_t steps(const fr_heads& heads, const fr_tree& tree) {
        int64_t blocks = 0;
        for (int32_t l = 0; l < tree.levels; ++l) blocks = std::max(blocks, heads.head[l].block_count);
        return tree.levels * (2 * blocks + 4) + 1;
    }

    void run(Team team) {
        Shelf& own = work_.own[size_t(team.rank)];
        begin(team, own);
        if (!chained()) {
            evaluate(team, own, 0, tree_.levels);
            name(team, own);
            return;
        }
        for (int32_t l = 0; l < tree_.levels; ++l) {
            evaluate(team, own, l, l + 1);
            grow(team, own, l);
        }
    }

  private:
    // Whether heads see the tokens before them. If not, one row of inputs serves all heads and nodes.
    bool chained() const { return heads_.embedding != nullptr; }
    int64_t parents(int32_t level) const { return chained() ? tree_.level[level].parents : 1; }
    int64_t rows_of(int32_t level) const { return rows_ * parents(level); }

    void clear(float* row, int64_t from) const { std::memset(row + from, 0, size_t(stride_ - from) * 4); }

    void make_lists() {
        Shared& room = work_.shared;
        int64_t lists = 0, entries = 0;
        for (int32_t l = 0; l < tree_.levels; ++l) {
            lists += threads_ * rows_of(l);
            entries += threads_ * rows_of(l) * tree_.level[l].widest;
        }
        Top next{0, room.top_values.get<float>(entries), room.top_at.get<int32_t>(entries), room.top_held.get<int32_t>(lists)};
        std::memset(next.held, 0, size_t(lists) * 4);
        tops_ = room.tops.get<Top>(tree_.levels);
        for (int32_t l = 0; l < tree_.levels; ++l) {
            next.k = tree_.level[l].widest;
            tops_[l] = next;
            next.held += threads_ * rows_of(l);
            next.values += threads_ * rows_of(l) * next.k;
            next.at += threads_ * rows_of(l) * next.k;
        }
    }

    void begin(Team& team, Shelf& own) {
        team.each(rows_, 1, [&](int64_t first, int64_t last) {
            for (int64_t row = first; row < last; ++row) {
                tokens_[row * tree_.nodes] = roots_[row];
                if (chained()) {
                    write_inputs(row, 0, 0, row, own);
                    continue;
                }
                float* plain = plain_ + row * stride_;
                read_context(row, plain);
                clear(plain, heads_.width);
                kernels().emit(plain, heads_.width, z_, row);
            }
        });
    }

    void read_context(int64_t row, float* to) const {
        read_row(contexts_ + row * heads_.width * size_of(heads_.format), heads_.format, heads_.width, to);
    }

    // Row `at` of the inputs for the children of a node: the context, then the embedded tokens from the root to it.
    void write_inputs(int64_t row, int32_t node, int32_t depth, int64_t at, Shelf& own) {
        const int64_t width = heads_.width, bytes = width * size_of(heads_.format);
        float* z = own.row.get<float>((depth + 2) * width);
        read_context(row, z);
        for (int32_t d = depth; d >= 0; --d, node = tree_.parents[node])
            read_row(heads_.embedding + tokens_[row * tree_.nodes + node] * bytes, heads_.format, width, z + (d + 1) * width);
        kernels().emit(z, (depth + 2) * width, z_, at);
    }

    // The heads [first, last), each on its rows: their best tokens go to `tops_`.
    void evaluate(Team& team, Shelf& own, int32_t first, int32_t last) {
        const int64_t rows = rows_of(first);
        Product* list = own.products.get<Product>(last - first);
        Inputs* next = own.nexts.get<Inputs>(last - first);
        for (int64_t part = 0; part <= blocks_; ++part) {
            int64_t count = 0;
            for (int32_t h = first; h < last; ++h) {
                if (part > heads_.head[h].block_count) continue;
                next[count] = part_of(part < heads_.head[h].block_count ? x_[part % 2] : final_, (h - first) * rows);
                list[count] = hidden(h, part, (h - first) * rows, &next[count]);
                ++count;
            }
            if (!count) break;
            kernels().products(team, list, count, rows);
            requantise(team, list, next, count, rows);
        }
        for (int32_t h = first; h < last; ++h) {
            const fr_matrix& matrix = heads_.head[h].vocabulary;
            list[h - first] = {&matrix, part_of(final_, (h - first) * rows),
                               Outputs{.into = Into::top, .columns = matrix.out, .top = tops_[h]}};
        }
        kernels().products(team, list, last - first, rows);
    }

    // Part 0 of a head reads its inputs, part i is block i. An int8 product takes its inputs from `requantise`.
    Product hidden(int32_t h, int64_t part, int64_t row, Inputs* next) {
        const fr_head& head = heads_.head[h];
        float* y = y_ + row * stride_;
        Outputs to{.into = Into::residual, .floats = y, .stride = stride_, .next = next->format == FR_INT8 ? nullptr : next, .added = y};
        if (part) return {&head.blocks[part - 1], part_of(x_[(part - 1) % 2], row), to};
        if (head.first.gated) to.into = Into::through;
        else to.added = plain_;
        return {&head.first, z_, to};
    }

    // For int8 products: rows of fp32 -> bytes and scales.
    void requantise(Team& team, const Product* list, Inputs* next, int64_t count, int64_t rows) {
        if (std::all_of(list, list + count, [](const Product& product) { return product.to.next; })) return;
        team.each(count * rows, 1, [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; ++i) {
                const Outputs& to = list[i / rows].to;
                if (!to.next) kernels().emit(to.floats + i % rows * stride_, heads_.width, next[i / rows], i % rows);
            }
        });
    }

    // What all threads together found best for one row of a level, best first.
    const int32_t* best(int32_t level, int64_t row, Shelf& own) const {
        const Top& top = tops_[level];
        const int64_t rows = rows_of(level);
        int32_t* found = own.found.get<int32_t>(top.k + threads_);
        int32_t* taken = found + top.k;
        std::memset(taken, 0, size_t(threads_) * 4);
        for (int32_t i = 0; i < top.k; ++i) {
            int64_t from = -1, entry = 0;
            for (int32_t t = 0; t < threads_; ++t) {
                const int64_t list = t * rows + row, other = list * top.k + taken[t];
                if (taken[t] == top.held[list]) continue;
                const bool better = from < 0 || top.values[other] > top.values[entry] ||
                                    (top.values[other] == top.values[entry] && top.at[other] < top.at[entry]);
                if (better) from = t, entry = other;
            }
            found[i] = top.at[entry];
            ++taken[from];
        }
        return found;
    }

    // Independent heads: every level's tokens by rank alone.
    void name(Team& team, Shelf& own) {
        team.each(tree_.levels * rows_, 1, [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; ++i) {
                const fr_level& level = tree_.level[i / rows_];
                const int32_t* found = best(int32_t(i / rows_), i % rows_, own);
                int64_t* to = tokens_ + i % rows_ * tree_.nodes + level.first;
                for (int32_t n = 0; n < level.nodes; ++n) to[n] = found[level.ranks[n]];
            }
        });
    }

    // The children of every parent in a level, and the inputs of those who have children themselves.
    void grow(Team& team, Shelf& own, int32_t l) {
        const fr_level& level = tree_.level[l];
        team.each(rows_of(l), 1, [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; ++i) {
                const int64_t row = i / level.parents, parent = i % level.parents;
                const int32_t* found = best(l, i, own);
                for (int32_t n = level.begin[parent]; n < level.begin[parent + 1]; ++n) {
                    tokens_[row * tree_.nodes + level.first + n] = found[level.ranks[n]];
                    if (level.grown[n] < 0) continue;
                    write_inputs(row, level.first + n, l + 1, row * tree_.level[l + 1].parents + level.grown[n], own);
                }
            }
        });
    }

    const fr_heads& heads_;
    const fr_tree& tree_;
    const uint8_t* contexts_;
    const int64_t* roots_;
    int64_t* tokens_;
    const int64_t rows_;
    Workspace& work_;
    const int32_t threads_;
    int64_t most_ = 0, blocks_ = 0, stride_;
    Inputs z_, x_[2], final_;
    float *y_, *plain_;
    Top* tops_;
};

}  // namespace

FR_API int32_t fr_draft(const fr_heads* heads, const fr_tree* tree, const uint8_t* contexts, const int64_t* roots, int64_t* tokens,
                        int64_t rows, int32_t threads) {
    for (int64_t row = 0; row < rows; ++row)
        if (roots[row] < 0 || roots[row] >= heads->vocabulary) return FR_BAD_TOKEN;
    try {
        Workspace& work = workspace();
        Step* steps = work.begin(threads, Draft::steps(*heads, *tree));
        Draft draft(*heads, *tree, contexts, roots, tokens, rows, work, threads);
        together(threads, steps, [&](Team team) { draft.run(team); });
    } catch (const std::bad_alloc&) {
        return FR_NO_MEMORY;
    }
    return FR_FINE;
}
