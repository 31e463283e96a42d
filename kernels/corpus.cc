// What came next in a corpus at the places most like a row's end, grown into a tree. src/forerun/stores/places.py is the
// same in readable form; every number that decides something is computed here as there.
//
// The file behind a corpus may hold anything: positions are brought into range, tokens are compared before they are used.
#include <algorithm>
#include <cmath>
#include <new>
#include <vector>

#include "forerun_kernels.h"

namespace {

struct Place {
    int64_t position;
    int32_t length;
};

// The children of a node that agree in their token: `count` places from `begin` on.
struct Child {
    int32_t token, begin, count, longest;
    int64_t weight;
};

struct Candidate {
    double survival;
    int64_t considered;  // which candidate this was
    int32_t parent, depth, token, begin, count;
};

bool later(const Candidate& a, const Candidate& b) {
    return a.survival != b.survival ? a.survival < b.survival : a.considered > b.considered;
}

int64_t weight_of(int32_t length) { return int64_t(length) * length; }

int32_t bucket_of(int32_t length) {
    int32_t bits = 0;
    for (; length; length >>= 1) ++bits;
    return std::min(bits, FR_CORPUS_LENGTHS - 1);
}

template <class Token>
class Search {
  public:
    Search(const fr_corpus& corpus, const fr_corpus_wish& wish, std::vector<Place>& places)
        : corpus_(corpus), wish_(wish), tokens_(static_cast<const Token*>(corpus.tokens)), places_(places) {}

    // The token at a position, or the separator outside.
    int32_t token(int64_t at) const {
        const int32_t found = at >= 0 && at < corpus_.size ? int32_t(tokens_[at]) : corpus_.vocabulary;
        return found >= 0 && found < corpus_.vocabulary ? found : corpus_.vocabulary;
    }

    void places(const int32_t* end, int32_t length) {
        if (length == 0 || corpus_.entries == 0) return;
        begin_ = std::clamp<int64_t>(corpus_.starts[end[0]], 0, corpus_.entries);
        end_ = std::clamp<int64_t>(corpus_.starts[end[0] + 1], begin_, corpus_.entries);
        int64_t low = boundary(end, length, false, begin_, end_), high = low, inner_low = low, inner_high = low;
        ++length;
        while (int64_t(places_.size()) < wish_.enough) {
            int32_t beside = 0;
            if (low > begin_) beside = agreeing(low - 1, end, length - 1);
            if (high < end_) beside = std::max(beside, agreeing(high, end, length - 1));
            length = std::min(length - 1, beside);
            if (length < wish_.min_match) return;
            low = first_at_or_below(end, length, low);
            high = first_after(end, length, high);
            const int64_t before = inner_low - low, inner = inner_high - inner_low, fresh = high - low - inner;
            const int64_t taken = std::min<int64_t>(fresh, wish_.places - int64_t(places_.size()));
            for (int64_t number = 0; number < taken; ++number) {
                const int64_t offset = number * fresh / taken;
                places_.push_back({position(low + offset + (offset < before ? 0 : inner)), length});
            }
            inner_low = low, inner_high = high;
        }
    }

  private:
    int64_t position(int64_t entry) const { return std::clamp<int64_t>(corpus_.order[entry], 0, corpus_.size - 1); }

    int32_t agreeing(int64_t entry, const int32_t* end, int32_t length) const {
        const int64_t there = position(entry);
        const int32_t most = int32_t(std::min<int64_t>(length, there + 1));
        int32_t back = 0;
        while (back < most && int32_t(tokens_[there - back]) == end[back]) ++back;
        return back;
    }

    bool is_before(int64_t entry, const int32_t* end, int32_t length, bool or_equal) const {
        const int32_t agree = agreeing(entry, end, length);
        if (agree == length) return or_equal;
        const int64_t at = position(entry) - agree;
        if (at < 0) return true;
        const int32_t token = int32_t(tokens_[at]);
        return token == corpus_.vocabulary || token < end[agree];
    }

    int64_t boundary(const int32_t* end, int32_t length, bool or_equal, int64_t low, int64_t high) const {
        while (low < high) {
            const int64_t middle = low + (high - low) / 2;
            if (is_before(middle, end, length, or_equal)) low = middle + 1;
            else high = middle;
        }
        return low;
    }

    // The boundaries of an interval that holds `from`, in growing steps outwards: most intervals are short.
    int64_t first_at_or_below(const int32_t* end, int32_t length, int64_t from) const {
        int64_t step = 1, high = from;
        while (high > begin_) {
            const int64_t low = std::max(begin_, high - step);
            if (is_before(low, end, length, false)) return boundary(end, length, false, low + 1, high);
            high = low, step *= 4;
        }
        return begin_;
    }
    int64_t first_after(const int32_t* end, int32_t length, int64_t from) const {
        int64_t step = 1, low = from;
        while (low < end_) {
            const int64_t last = std::min(end_, low + step) - 1;
            if (!is_before(last, end, length, true)) return boundary(end, length, true, low, last);
            low = last + 1, step *= 4;
        }
        return end_;
    }

    const fr_corpus& corpus_;
    const fr_corpus_wish& wish_;
    const Token* tokens_;
    std::vector<Place>& places_;
    int64_t begin_ = 0, end_ = 0;  // the entries that end in the row's last token
};

// Memory that one thread uses again and again.
struct Shelf {
    std::vector<Place> places, sorted;
    std::vector<Child> children;
    std::vector<int32_t> child_of;
    std::vector<Candidate> heap;
};

template <class Token>
class Growth {
  public:
    Growth(const Search<Token>& search, const fr_corpus_wish& wish, const fr_corpus_draft& draft, Shelf& shelf)
        : search_(search), wish_(wish), draft_(draft), shelf_(shelf) {}

    int32_t grow(int32_t root) {
        int32_t nodes = 1;
        draft_.tokens[0] = root, draft_.parents[0] = -1, draft_.survival[0] = 1.0;
        if (!shelf_.places.empty() && wish_.depth > 0 && !ends(root)) expand(0, 0, 1.0, 0, int32_t(shelf_.places.size()));
        auto& heap = shelf_.heap;
        while (!heap.empty() && nodes <= wish_.nodes) {
            std::pop_heap(heap.begin(), heap.end(), later);
            const Candidate best = heap.back();
            heap.pop_back();
            draft_.tokens[nodes] = best.token, draft_.parents[nodes] = best.parent, draft_.survival[nodes] = best.survival;
            if (best.depth < wish_.depth && !ends(best.token)) expand(nodes, best.depth, best.survival, best.begin, best.count);
            ++nodes;
        }
        return nodes;
    }

    int32_t first = -1;
    double chance = 0.0;

  private:
    bool ends(int32_t token) const { return std::find(wish_.ends, wish_.ends + wish_.end_count, token) != wish_.ends + wish_.end_count; }

    double survival(bool is_best, int32_t length, int64_t own, int64_t others) const {
        const double* weights = wish_.weights + (is_best ? 0 : 4);
        const double score = weights[0] + weights[1] * std::log2(double(length)) + weights[2] * std::log2(double(own)) +
                             weights[3] * std::log2(double(1 + others));
        return 1 / (1 + std::exp(-(score + wish_.odds[0] + wish_.odds[1 + bucket_of(length)])));
    }

    // Sort the places by their next token, each group where its first place was; groups that end here come to nothing.
    void part(int32_t depth, int32_t begin, int32_t count) {
        auto& [places, sorted, children, child_of, heap] = shelf_;
        children.clear();
        child_of.assign(size_t(count), -1);
        for (int32_t i = 0; i < count; ++i) {
            const Place& place = places[size_t(begin + i)];
            const int32_t token = search_.token(place.position + 1 + depth);
            if (token == search_.token(-1)) continue;
            size_t child = 0;
            while (child < children.size() && children[child].token != token) ++child;
            if (child == children.size()) children.push_back({token, 0, 0, 0, 0});
            children[child].count += 1;
            children[child].longest = std::max(children[child].longest, place.length);
            children[child].weight += weight_of(place.length);
            child_of[size_t(i)] = int32_t(child);
        }
        int32_t next = begin;
        for (Child& child : children) child.begin = next, next += child.count;
        sorted.assign(places.begin() + begin, places.begin() + begin + count);
        for (int32_t i = 0; i < count; ++i)
            if (child_of[size_t(i)] >= 0) places[size_t(children[size_t(child_of[size_t(i)])].begin++)] = sorted[size_t(i)];
        for (Child& child : children) child.begin -= child.count;
        std::stable_sort(children.begin(), children.end(), [](const Child& a, const Child& b) { return a.weight > b.weight; });
    }

    void expand(int32_t node, int32_t depth, double parent, int32_t begin, int32_t count) {
        part(depth, begin, count);
        int64_t total = 0;
        for (const Child& child : shelf_.children) total += child.weight;
        double rest = parent;
        bool is_best = true;
        for (const Child& child : shelf_.children) {
            const double chance_here = survival(is_best, child.longest + depth, child.weight, total - child.weight);
            if (node == 0 && is_best) first = child.token, chance = chance_here;
            is_best = false;
            const double share = std::min(parent * chance_here, rest);
            rest -= share;
            if (share <= wish_.cost) continue;
            shelf_.heap.push_back({share, considered_++, node, depth + 1, child.token, child.begin, child.count});
            std::push_heap(shelf_.heap.begin(), shelf_.heap.end(), later);
        }
    }

    const Search<Token>& search_;
    const fr_corpus_wish& wish_;
    const fr_corpus_draft& draft_;
    Shelf& shelf_;
    int64_t considered_ = 0;
};

template <class Token>
int32_t draft_in(const fr_corpus& corpus, const fr_corpus_wish& wish, const int32_t* end, int32_t length, int32_t root, fr_corpus_draft& draft) {
    thread_local Shelf shelf;
    shelf.places.clear(), shelf.heap.clear();
    Search<Token> search(corpus, wish, shelf.places);
    search.places(end, length);
    draft.length = shelf.places.empty() ? 0 : shelf.places[0].length;
    Growth<Token> growth(search, wish, draft, shelf);
    draft.nodes = growth.grow(root);
    draft.first = growth.first, draft.chance = growth.chance;
    return FR_FINE;
}

}  // namespace

FR_API int32_t fr_corpus_grow(const fr_corpus* corpus, const fr_corpus_wish* wish, const int32_t* end, int32_t length, int32_t root,
                              fr_corpus_draft* draft) {
    for (int32_t i = 0; i < length; ++i)
        if (end[i] < 0 || end[i] >= corpus->vocabulary) length = i;  // nothing in the corpus equals it
    try {
        return corpus->wide ? draft_in<int32_t>(*corpus, *wish, end, length, root, *draft)
                            : draft_in<uint16_t>(*corpus, *wish, end, length, root, *draft);
    } catch (const std::bad_alloc&) {
        return FR_NO_MEMORY;
    }
}
