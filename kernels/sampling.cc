// From logits to tokens: laws, draws, and which part of a proposal is kept. A row is settled by one thread, in one order; only large
// vocabularies are worth a second thread, and then rows are shared out.
#include <algorithm>
#include <bit>
#include <cfloat>
#include <cstring>
#include <functional>

#include "formats.h"

namespace {

// ---- laws

// A token that may be said. Keys ascend with scores or weights.
struct Candidate {
    uint32_t key;
    float mass;
    int32_t token;
};

uint32_t key_of(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x + 0.0f);  // zeros are equal
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// Of equals the later one, which the ascending order of the torch form drops last.
bool is_above(const Candidate& one, const Candidate& other) {
    return one.key != other.key ? one.key > other.key : one.token > other.token;
}

// What one thread needs to make laws.
struct Room {
    Scratch scores, where, candidates, order, masses;
};
Room& room() {
    static thread_local Room own;
    return own;
}

// From the best on, the last candidate above which there is less than this mass. Not sorted: of as many buckets as there are candidates,
// only those in the one that the mass ends in are looked at again.
Candidate last_within(const Candidate* list, int64_t count, double mass, Room& room) {
    constexpr int64_t FEW = 32, MOST_BUCKETS = 4096;
    Candidate* order = room.order.get<Candidate>(count);
    std::copy(list, list + count, order);
    while (count > FEW) {
        uint32_t lowest = order[0].key, highest = lowest;
        for (int64_t i = 0; i < count; ++i) {
            lowest = std::min(lowest, order[i].key);
            highest = std::max(highest, order[i].key);
        }
        if (lowest == highest) break;
        const int wanted = std::bit_width(uint64_t(std::min(count, MOST_BUCKETS))), width = std::bit_width(highest - lowest);
        const int shift = std::max(0, width - wanted + 1);
        const int64_t buckets = int64_t((highest - lowest) >> shift) + 1;
        double* masses = room.masses.get<double>(buckets);
        std::fill(masses, masses + buckets, 0.0);
        for (int64_t i = 0; i < count; ++i) masses[(highest - order[i].key) >> shift] += double(order[i].mass);
        int64_t bucket = 0;
        for (; bucket + 1 < buckets && masses[bucket] < mass; ++bucket) mass -= masses[bucket];
        int64_t left = 0;
        for (int64_t i = 0; i < count; ++i) {
            order[left] = order[i];
            left += int64_t((highest - order[i].key) >> shift) == bucket;
        }
        count = left;
    }
    std::sort(order, order + count, is_above);
    int64_t last = 0;
    while (last + 1 < count && (mass -= double(order[last].mass)) > 0) ++last;
    return order[last];
}

double mass_of(const Candidate* list, int64_t count) {
    double total = 0;
    for (int64_t i = 0; i < count; ++i) total += double(list[i].mass);
    return total;
}

// The k largest scores and their equals, NaN aside: the k-th largest peak is no larger than any of them.
int64_t largest(const float* scores, int64_t vocabulary, int64_t k, Candidate* list, Room& room) {
    float most[PEAKS], least = -__builtin_inff();
    if (k <= PEAKS) {
        kernels().peaks(scores, vocabulary, most);
        std::nth_element(most, most + k - 1, most + PEAKS, std::greater<float>());
        least = most[k - 1];
    }
    int32_t* where = room.where.get<int32_t>(vocabulary + 1);
    const int64_t count = kernels().at_least(scores, vocabulary, least, where);
    for (int64_t i = 0; i < count; ++i) list[i] = {key_of(scores[where[i]]), 1, where[i]};
    if (count <= k) return count;
    const uint32_t last = last_within(list, count, double(k), room).key;
    return std::remove_if(list, list + count, [&](const Candidate& one) { return one.key < last; }) - list;
}

// What top-k lets through, or else what is not too small for top-p and min-p anyway, and what it weighs; the mass of all that was weighed.
int64_t weighed(const fr_filter& filter, float* scores, float most, int64_t vocabulary, Candidate* list, double* mass, Room& room) {
    int64_t count;
    if (filter.top_k > 0 && filter.top_k < vocabulary) {
        count = largest(scores, vocabulary, filter.top_k, list, room);
        for (int64_t i = 0; i < count; ++i) scores[i] = scores[list[i].token];  // tokens ascend
        *mass = kernels().weigh(scores, count, most);
        for (int64_t i = 0; i < count; ++i) list[i] = {key_of(scores[i]), scores[i], list[i].token};
        return count;
    }
    *mass = kernels().weigh(scores, vocabulary, most);
    const double bound = 0.5 * (1 - filter.top_p) * *mass / double(vocabulary);  // all that weigh less are less than top-p drops
    int32_t* where = room.where.get<int32_t>(vocabulary + 1);
    count = kernels().at_least(scores, vocabulary, std::max(float(bound), float(filter.min_p)), where);
    for (int64_t i = 0; i < count; ++i) list[i] = {key_of(scores[where[i]]), scores[where[i]], where[i]};
    return count;
}

void make_law(const float* logits, const fr_filter& filter, int64_t vocabulary, float* law) {
    if (filter.temperature == 0) {
        std::fill(law, law + vocabulary, 0.0f);
        law[std::max_element(logits, logits + vocabulary) - logits] = 1;
        return;
    }
    Room& own = room();
    float* scores = own.scores.get<float>(round_up(vocabulary, PEAKS));
    const float most = kernels().temper(logits, vocabulary, filter.temperature, scores);
    // Nothing is allowed, or something is likelier than numbers can say: that is no law.
    if (__builtin_isinf(most)) return std::fill(law, law + vocabulary, __builtin_nanf(""));
    if (!(filter.top_k > 0 && filter.top_k < vocabulary) && filter.top_p >= 1 && filter.min_p <= 0) {
        const double mass = kernels().weigh(scores, vocabulary, most);
        return kernels().scale(scores, vocabulary, float(1 / mass), law);
    }
    Candidate* list = own.candidates.get<Candidate>(vocabulary);
    double mass;
    int64_t count = weighed(filter, scores, most, vocabulary, list, &mass, own);
    if (filter.top_p < 1 && count) {
        const Candidate last = last_within(list, count, filter.top_p * mass, own);
        count = std::remove_if(list, list + count, [&](const Candidate& one) { return is_above(last, one); }) - list;
    }
    const float least = float(filter.min_p);
    count = std::remove_if(list, list + count, [&](const Candidate& one) { return one.mass < least; }) - list;
    std::fill(law, law + vocabulary, 0.0f);
    const float each = float(1 / mass_of(list, count));
    for (int64_t i = 0; i < count; ++i) law[list[i].token] = list[i].mass * each;
}

// ---- draws

// Running sums within blocks, and over the blocks: several short sums can be made at a time. chance.py defines the same order.
constexpr int64_t SUMS = 64, AT_ONCE = 8;

template <class Number>
double sum_up(const Number* law, int64_t vocabulary, double* before) {
    const int64_t whole = vocabulary / SUMS;
    int64_t block = 0;
    for (; block + AT_ONCE <= whole; block += AT_ONCE) {
        double sums[AT_ONCE] = {0};
        for (int64_t i = 0; i < SUMS; ++i)
            for (int64_t j = 0; j < AT_ONCE; ++j) sums[j] += double(law[(block + j) * SUMS + i]);
        std::copy(sums, sums + AT_ONCE, before + block);
    }
    for (; block * SUMS < vocabulary; ++block) {
        before[block] = 0;
        for (int64_t i = block * SUMS; i < std::min(vocabulary, (block + 1) * SUMS); ++i) before[block] += double(law[i]);
    }
    double total = 0;
    for (int64_t i = 0; i < block; ++i) {
        const double sum = before[i];
        before[i] = total;
        total += sum;
    }
    return total;
}

int64_t blocks_of(int64_t vocabulary) { return (vocabulary + SUMS - 1) / SUMS; }

template <class Number>
double total_of(const Number* law, int64_t vocabulary) {
    static thread_local Scratch sums;
    return sum_up(law, vocabulary, sums.get<double>(blocks_of(vocabulary)));
}

template <class Number>
int64_t pick(const Number* law, int64_t vocabulary, double share) {
    static thread_local Scratch sums;
    double* before = sums.get<double>(blocks_of(vocabulary));
    const double mark = share * sum_up(law, vocabulary, before);
    int64_t block = 0;
    for (const int64_t count = blocks_of(vocabulary); block + 1 < count && !(before[block + 1] > mark);) ++block;
    double within = 0;
    for (int64_t i = block * SUMS; i < vocabulary; ++i) {
        within += double(law[i]);
        if (before[block] + within > mark) return i;
    }
    return vocabulary - 1;  // a law that is no law
}

uint64_t mix(uint64_t word, uint64_t value) {
    uint64_t z = word * 0xD1342543DE82EF95u + value * 0x9E3779B97F4A7C15u + 0x632BE59BD9B4E019u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

// ---- trees

// One row of a proposal.
struct Tree {
    int64_t size;
    const int64_t *parents, *tokens;
    const double *token_luck, *coin_luck;
    int64_t *kept, *next;

    Tree(const fr_proposal& of, int64_t row)
        : size(of.sizes[row]), parents(of.parents + row * of.nodes), tokens(of.tokens + row * of.nodes),
          token_luck(of.token_luck + row * of.nodes), coin_luck(of.coin_luck ? of.coin_luck + row * of.nodes : nullptr),
          kept(of.kept + row * of.nodes), next(of.next + row) {
        std::fill(kept, kept + of.nodes, -1);
    }

    int64_t next_child(int64_t parent, int64_t after) const {
        for (int64_t node = after + 1; node < size; ++node)
            if (parents[node] == parent) return node;
        return 0;
    }

    void keep(int64_t end) const {
        int64_t depth = 0;
        for (int64_t node = end; node; node = parents[node]) ++depth;
        kept[0] = 0;
        for (int64_t node = end; node; node = parents[node]) kept[depth--] = node;
    }

    // Down to the child that carries what `drawn(node, depth)` says, as far as there is one.
    template <class Draw>
    void match(Draw&& drawn) const {
        int64_t node = 0, token = drawn(node), child = 0;
        while ((child = next_child(node, child)))
            if (tokens[child] == token) token = drawn(node = child);
        keep(node);
        *next = token;
    }
};

enum Drawn : uint8_t { DETERMINISTIC = 0, WITH_REPLACEMENT = 1, WITHOUT_REPLACEMENT = 2 };

// One row of a drawn tree, weighed. The luck is known, so nothing is weighed behind the first node that is kept.
template <class Number>
class Verification {
  public:
    Verification(Tree tree, const Number* laws, const Number* draft_laws, const uint8_t* drawn, int64_t vocabulary, Scratch& memory)
        : tree_(tree), laws_(laws), draft_laws_(draft_laws), drawn_(drawn), vocabulary_(vocabulary) {
        int64_t deepest = 0;
        for (int64_t node = 1; node < tree.size; ++node) {
            int64_t depth = 1;
            for (int64_t above = tree.parents[node]; above; above = tree.parents[above]) ++depth;
            deepest = std::max(deepest, depth);
        }
        memory_ = memory.get<double>((2 * deepest + 3) * vocabulary);
    }

    void run() {
        if (was_chosen()) tree_.match([&](int64_t node) { return pick(law_of(node), vocabulary_, tree_.token_luck[node]); });
        else reach(0, 0, 1);
    }

  private:
    Tree tree_;
    const Number *laws_, *draft_laws_;
    const uint8_t* drawn_;
    int64_t vocabulary_;
    double* memory_;  // a draft's law that has to be made, and twice what is left of the target's at every depth, [vocabulary] each

    const Number* law_of(int64_t node) const { return laws_ + node * vocabulary_; }

    // There are siblings, and none was drawn.
    bool was_chosen() const {
        for (int64_t node = 1; node < tree_.size; ++node)
            if (drawn_[tree_.parents[node]] != DETERMINISTIC) return false;
        return tree_.size > 1;
    }

    // The law that a child was really drawn from, where it is neither its siblings' nor certain.
    bool is_renormalised(int64_t child) const {
        const int64_t parent = tree_.parents[child];
        return drawn_[parent] == WITHOUT_REPLACEMENT && tree_.next_child(parent, 0) != child;
    }
    double* renormalised(int64_t child) const {
        const int64_t parent = tree_.parents[child];
        double* draft = memory_;
        std::copy(draft_laws_ + parent * vocabulary_, draft_laws_ + (parent + 1) * vocabulary_, draft);
        for (int64_t sibling = tree_.next_child(parent, 0); sibling != child; sibling = tree_.next_child(parent, sibling))
            draft[tree_.tokens[sibling]] = 0;
        const double total = total_of(draft, vocabulary_);
        for (int64_t i = 0; i < vocabulary_; ++i) draft[i] /= total;
        return draft;
    }

    // What the target's law says of a child's token, for what it was drafted with.
    template <class Law>
    double ratio(int64_t child, const Law* law) const {
        const int64_t parent = tree_.parents[child], token = tree_.tokens[child];
        const double target = double(law[token]);
        if (drawn_[parent] == DETERMINISTIC) return target;
        const double draft = is_renormalised(child) ? renormalised(child)[token] : double(draft_laws_[parent * vocabulary_ + token]);
        return draft > 0 ? target / draft : 0;
    }

    // left = what the law exceeds the draft's by; its sum.
    template <class Law>
    double take_away(int64_t child, double budget, const Law* law, double* left) const {
        constexpr bool WIDE_LAW = sizeof(Law) == 8, WIDE_DRAFT = sizeof(Number) == 8;
        const int64_t parent = tree_.parents[child], token = tree_.tokens[child];
        if (drawn_[parent] == DETERMINISTIC) {
            scaled(budget, law, left);
            left[token] = std::max(left[token] - 1, 0.0);
        } else if (is_renormalised(child)) {
            kernels().excess(budget, law, WIDE_LAW, renormalised(child), true, vocabulary_, left);
        } else {
            kernels().excess(budget, law, WIDE_LAW, draft_laws_ + parent * vocabulary_, WIDE_DRAFT, vocabulary_, left);
        }
        return total_of(left, vocabulary_);
    }

    template <class Law>
    void scaled(double factor, const Law* law, double* to) const {
        for (int64_t i = 0; i < vocabulary_; ++i) to[i] = factor * double(law[i]);
    }

    // Ask the path through a child that has got this law, and take it away from that; true once something is kept. Where nothing is left,
    // the law stands in.
    template <class Law>
    bool ask(int64_t child, int64_t depth, double& budget, double& total, const Law* law, double* left) {
        if (reach(child, depth + 1, std::min(1.0, budget * ratio(child, law)))) return true;
        total = take_away(child, budget, law, left);
        if (!(total > 0)) scaled(budget, law, left);
        budget = total + 1 > budget ? total / (total + 1 - budget) : 1;
        return false;
    }

    // The node's coin, when all below it has failed. Node 0 needs none.
    template <class Law>
    bool ends(int64_t node, double budget, const Law* law) {
        if (node && !(tree_.coin_luck[node] < budget)) return false;
        tree_.keep(node);
        *tree_.next = pick(law, vocabulary_, tree_.token_luck[node]);
        return true;
    }

    // Ask all below this node, and then itself; true once something is kept.
    bool reach(int64_t node, int64_t depth, double budget) {
        double *left = memory_ + (2 * depth + 1) * vocabulary_, *spare = left + vocabulary_, total = 0;
        int64_t child = tree_.next_child(node, 0);
        if (!child || !(budget > 0)) return ends(node, budget, law_of(node));
        if (ask(child, depth, budget, total, law_of(node), left)) return true;
        while (budget > 0 && (child = tree_.next_child(node, child))) {
            for (int64_t i = 0; i < vocabulary_ && total > 0; ++i) left[i] /= total;
            if (ask(child, depth, budget, total, left, spare)) return true;
            std::swap(left, spare);
        }
        return ends(node, budget, left);
    }
};

template <class Number>
bool verify(const fr_proposal& trees, const Number* laws, const Number* draft_laws, const uint8_t* drawn, int64_t vocabulary, int64_t row) {
    static thread_local Scratch memory;
    const int64_t at = row * trees.nodes;
    const Tree tree(trees, row);
    for (int64_t node = 1; node < tree.size; ++node)
        if (tree.tokens[node] < 0 || tree.tokens[node] >= vocabulary) return false;
    Verification<Number>(tree, laws + at * vocabulary, draft_laws + at * vocabulary, drawn + at, vocabulary, memory).run();
    return true;
}

// `body(row)` for all rows.
template <class Body>
void for_rows(int64_t rows, int32_t threads, Body&& body) {
    if (threads == 1) {
        for (int64_t row = 0; row < rows; ++row) body(row);
        return;
    }
    together(threads, workspace().begin(threads, 1), [&](Team team) {
        team.each(rows, 1, [&](int64_t first, int64_t last) {
            for (int64_t row = first; row < last; ++row) body(row);
        });
    });
}

}  // namespace

FR_API void fr_laws(const float* logits, const fr_filter* filters, int64_t rows, int64_t count, int64_t vocabulary, float* laws,
                    int32_t threads) {
    for_rows(rows * count, threads, [&](int64_t node) {
        make_law(logits + node * vocabulary, filters[node / count], vocabulary, laws + node * vocabulary);
    });
}

FR_API void fr_pick(const void* laws, int32_t wide, int64_t count, int64_t vocabulary, const double* shares, int64_t* tokens,
                    int32_t threads) {
    for_rows(count, threads, [&](int64_t i) {
        tokens[i] = wide ? pick(static_cast<const double*>(laws) + i * vocabulary, vocabulary, shares[i])
                         : pick(static_cast<const float*>(laws) + i * vocabulary, vocabulary, shares[i]);
    });
}

FR_API void fr_uniform(const uint64_t* keys, const int64_t* positions, int32_t purpose, const int64_t* places, const int64_t* attempts,
                       int64_t rows, int64_t columns, double* numbers) {
    for (int64_t row = 0; row < rows; ++row) {
        const uint64_t stream = mix(keys[row], uint64_t(purpose));
        for (int64_t i = row * columns; i < (row + 1) * columns; ++i) {
            uint64_t word = mix(stream, uint64_t(positions[row]) + uint64_t(places[i]));
            if (attempts) word = mix(word, uint64_t(attempts[i]));
            numbers[i] = double(word >> 11) * 0x1p-53;
        }
    }
}

FR_API void fr_match(const fr_proposal* trees, const float* logits, const fr_filter* filters, int64_t vocabulary, float* laws,
                     int32_t threads) {
    for_rows(trees->rows, threads, [&](int64_t row) {
        static thread_local Scratch one;
        const Tree tree(*trees, row);
        tree.match([&](int64_t node) {
            const int64_t at = (row * trees->nodes + node) * vocabulary;
            float* law = laws ? laws + at : one.get<float>(vocabulary);
            make_law(logits + at, filters[row], vocabulary, law);
            return pick(law, vocabulary, tree.token_luck[node]);
        });
    });
}

FR_API int32_t fr_verify(const fr_proposal* trees, const void* laws, const void* draft_laws, const uint8_t* drawn, int32_t wide,
                         int64_t vocabulary, int32_t threads) {
    std::atomic<bool> fine{true};
    for_rows(trees->rows, threads, [&](int64_t row) {
        const bool found = wide ? verify(*trees, static_cast<const double*>(laws), static_cast<const double*>(draft_laws), drawn, vocabulary, row)
                                : verify(*trees, static_cast<const float*>(laws), static_cast<const float*>(draft_laws), drawn, vocabulary, row);
        if (!found) fine = false;
    });
    return fine ? FR_FINE : FR_BAD_TOKEN;
}
