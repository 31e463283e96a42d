// Text that is looked up: a suffix automaton, and trees that grow out of it best first. The readable version, to which this one is equal
// bit for bit, is src/forerun/stores/automaton.py and src/forerun/stores/growth.py.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "forerun_kernels.h"

namespace {

constexpr int32_t NOWHERE = -1;
constexpr int32_t SEPARATOR = INT32_MAX;  // stands between texts, is never proposed
constexpr uint32_t NONE = UINT32_MAX;

// A long array that grows by a quarter at a time. Growing a vector copies it; realloc moves the pages of a large block instead.
template <class T>
class Table {
  public:
    Table() = default;
    Table(const Table&) = delete;
    Table& operator=(const Table&) = delete;
    ~Table() { std::free(items_); }

    T& operator[](size_t i) { return items_[i]; }
    const T& operator[](size_t i) const { return items_[i]; }
    size_t size() const { return size_; }
    size_t bytes() const { return room_ * sizeof(T); }

    // Room for `count` more, with anything in it. The number of the first.
    size_t add(size_t count) {
        if (size_ + count > room_) grow(std::max(size_ + count, room_ + room_ / 4 + 16));
        size_ += count;
        return size_ - count;
    }
    // Keep the first `count` alone. Cannot fail: memory that cannot be given back stays.
    void cut(size_t count) noexcept {
        size_ = count;
        if (void* moved = count ? std::realloc(static_cast<void*>(items_), count * sizeof(T)) : nullptr) {
            items_ = static_cast<T*>(moved);
            room_ = count;
        }
    }

  private:
    void grow(size_t room) {
        void* moved = std::realloc(static_cast<void*>(items_), room * sizeof(T));
        if (!moved) throw std::bad_alloc();
        items_ = static_cast<T*>(moved);
        room_ = room;
    }

    T* items_ = nullptr;
    size_t size_ = 0, room_ = 0;
};

struct Edge {
    int32_t token, target;
};

// The edges of a state that has many, in order of recency: a linked list, and a hash table to find a token in it.
class Crowd {
  public:
    int32_t* find(int32_t token) {
        const uint32_t at = table_[slot(token)];
        return at == NONE ? nullptr : &links_[at].target;
    }

    // A token that is not there yet becomes the newest.
    void add(int32_t token, int32_t target) {
        if ((links_.size() + 1) * 4 > table_.size() * 3) widen();
        links_.push_back({token, target, newest_, NONE});
        const uint32_t at = uint32_t(links_.size() - 1);
        table_[slot(token)] = at;
        if (newest_ != NONE) links_[newest_].newer = at;
        newest_ = at;
    }

    // A token that is there becomes the newest. Where its edge leads.
    int32_t promote(int32_t token) {
        const uint32_t at = table_[slot(token)];
        Link& link = links_[at];
        if (at == newest_) return link.target;
        links_[link.newer].older = link.older;
        if (link.older != NONE) links_[link.older].newer = link.newer;
        links_[newest_].newer = at;
        link.older = newest_;
        link.newer = NONE;
        newest_ = at;
        return link.target;
    }

    // `visit(token)` from the newest on, until it returns false.
    template <class Visit>
    bool each(Visit&& visit) const {
        for (uint32_t at = newest_; at != NONE; at = links_[at].older)
            if (!visit(links_[at].token)) return false;
        return true;
    }

    size_t bytes() const { return sizeof(Crowd) + links_.capacity() * sizeof(Link) + table_.capacity() * sizeof(uint32_t); }

  private:
    struct Link {
        int32_t token, target;
        uint32_t older, newer;
    };

    // Where the token is, or where it would be.
    size_t slot(int32_t token) const {
        const size_t mask = table_.size() - 1;
        size_t at = size_t((uint64_t(uint32_t(token)) * 0x9e3779b97f4a7c15u) >> 32) & mask;
        while (table_[at] != NONE && links_[table_[at]].token != token) at = (at + 1) & mask;
        return at;
    }

    void widen() {
        const size_t size = std::max<size_t>(64, table_.size() * 2);
        links_.reserve(size / 4 * 3);
        table_.assign(size, NONE);
        for (size_t i = 0; i < links_.size(); ++i) table_[slot(links_[i].token)] = uint32_t(i);
    }

    std::vector<Link> links_;
    std::vector<uint32_t> table_;
    uint32_t newest_ = NONE;
};

// `length`, `link`, `newest`, `target`, `end` and `run` are those of the Python class. The other edges, the newest of them last, lie in
// block `edges` of the pool, or all edges in crowd number `edges`.
struct State {
    int32_t length, link, newest, target, end;
    uint32_t edges;
    uint32_t others : 24;
    uint32_t run : 8;
};
constexpr State ROOT{0, NOWHERE, NOWHERE, NOWHERE, 0, 0, 0, 0};
constexpr uint32_t CROWDED = (1u << 24) - 1;  // as a count of others
constexpr uint32_t LONGEST_BLOCK = 32;

struct Outlook {
    int32_t newest, run, branches;
};

// A node whose children are considered.
struct Spot {
    fr_cursor cursor;
    int32_t node, depth;
    Outlook outlook;
    double survival, rest;
    int32_t known;  // how many of `tokens` were found, -1: not asked
    int32_t tokens[3];
};

// A child that is considered: the rank-th of its spot. `tie` orders equals.
struct Candidate {
    double survival;
    int32_t tie, spot;
};

}  // namespace

struct fr_automaton {
  public:
    explicit fr_automaton(int32_t reach) : reach_(reach) { at(int32_t(states_.add(1))) = ROOT; }

    int32_t tokens() const { return states_[size_t(last_)].length; }
    int64_t states() const { return int64_t(states_.size()); }
    int64_t bytes() const {
        size_t sum = sizeof(*this) + states_.bytes() + pool_.bytes() + (crowds_.capacity() - crowds_.size()) * sizeof(Crowd);
        for (const Crowd& crowd : crowds_) sum += crowd.bytes();
        return int64_t(sum);
    }

    void clear() noexcept {
        states_.cut(1);
        states_[0] = ROOT;
        pool_.cut(0);
        crowds_.clear();
        std::fill(std::begin(free_), std::end(free_), NONE);
        last_ = 0;
    }

    void append(int32_t token) {
        if (states_.size() > size_t(INT32_MAX) - 2) throw std::bad_alloc();
        int32_t state = last_, found = NOWHERE;
        const int32_t current = int32_t(states_.add(1)), length = at(last_).length + 1;
        at(current) = State{length, 0, NOWHERE, NOWHERE, length, 0, 0, 0};
        while (state >= 0) {  // every suffix that was never followed by this token is now
            if ((found = step(state, token)) >= 0) break;
            lead(state, token, current);
            state = at(state).link;
        }
        last_ = current;
        if (found < 0) return;
        if (at(found).length != at(state).length + 1) found = split(found, state, token);
        at(current).link = found;
        note(state, token);
    }

    fr_cursor match() const {
        const int32_t state = at(last_).link;
        return state > 0 ? fr_cursor{state, at(state).length} : fr_cursor{0, 0};
    }

    fr_cursor advance(fr_cursor cursor, int32_t token) const {
        int32_t state = cursor.state, length = cursor.length, found = step(state, token);
        while (found < 0) {
            state = at(state).link;
            if (state < 0) return {0, 0};
            length = at(state).length;
            found = step(state, token);
        }
        if (found != last_) return {found, length + 1};
        found = at(found).link;  // only the whole text has nothing behind it
        return {found, at(found).length};
    }

    Outlook outlook(fr_cursor cursor) const {
        const State& state = at(cursor.state);
        return {state.newest, int32_t(state.run), state.others != 0};
    }

    int32_t end(fr_cursor cursor) const { return at(cursor.state).end; }

    int32_t continuations(fr_cursor cursor, int32_t count, int32_t shortest, int32_t* tokens) const {
        int32_t found = 0;
        auto visit = [&](int32_t token) {
            if (found < count && std::find(tokens, tokens + found, token) == tokens + found) tokens[found++] = token;
            return found < count;
        };
        int32_t state = cursor.state;
        for (int32_t met = 0; met < reach_ && state >= 0 && at(state).length >= shortest; ++met) {
            if (!each(at(state), visit)) break;
            state = at(state).link;
        }
        return found;
    }

    // Kept from draft to draft.
    std::vector<Spot> spots;
    std::vector<Candidate> heap;

  private:
    State& at(int32_t state) { return states_[size_t(state)]; }
    const State& at(int32_t state) const { return states_[size_t(state)]; }

    // Where the edge `token` of a state leads, NOWHERE without it.
    int32_t step(int32_t state, int32_t token) const {
        const State& from = at(state);
        if (from.newest == token) return from.target;
        if (!from.others) return NOWHERE;
        const int32_t* found = const_cast<fr_automaton*>(this)->other(from, token);
        return found ? *found : NOWHERE;
    }

    int32_t* other(const State& from, int32_t token) {
        if (from.others == CROWDED) return crowds_[from.edges].find(token);
        Edge* block = &pool_[from.edges];
        for (uint32_t i = from.others; i-- > 0;)
            if (block[i].token == token) return &block[i].target;
        return nullptr;
    }

    template <class Visit>
    bool each(const State& from, Visit&& visit) const {
        if (from.others == CROWDED) return crowds_[from.edges].each(visit);
        if (from.newest >= 0 && !visit(from.newest)) return false;
        for (uint32_t i = from.others; i-- > 0;)
            if (!visit(pool_[from.edges + i].token)) return false;
        return true;
    }

    // A new edge, the newest.
    void lead(int32_t state, int32_t token, int32_t target) {
        State& from = at(state);
        if (from.others == LONGEST_BLOCK) crowd(from);
        if (from.others == CROWDED) crowds_[from.edges].add(token, target);
        else if (from.newest >= 0) keep(from);
        from.newest = token;
        from.target = target;
        from.run = 1;
    }

    // The newest edge becomes the last of the others.
    void keep(State& from) {
        const uint32_t count = from.others;
        if (count == 0) from.edges = block(1);
        else if (std::has_single_bit(count)) {  // the block is full
            const uint32_t wider = block(2 * count);
            std::memcpy(static_cast<void*>(&pool_[wider]), &pool_[from.edges], count * sizeof(Edge));
            release(from.edges, count);
            from.edges = wider;
        }
        pool_[from.edges + count] = {from.newest, from.target};
        from.others = count + 1;
    }

    void crowd(State& from) {
        Crowd many;
        for (uint32_t i = 0; i < from.others; ++i) many.add(pool_[from.edges + i].token, pool_[from.edges + i].target);
        many.add(from.newest, from.target);
        crowds_.push_back(std::move(many));
        release(from.edges, from.others);
        from.edges = uint32_t(crowds_.size() - 1);
        from.others = CROWDED;
    }

    // Blocks of 1, 2, 4 ... edges; those that were left for wider ones are used again.
    uint32_t block(uint32_t room) {
        uint32_t& head = free_[std::countr_zero(room)];
        if (head != NONE) {
            const uint32_t found = head;
            head = uint32_t(pool_[found].token);
            return found;
        }
        if (pool_.size() + room >= NONE) throw std::bad_alloc();
        return uint32_t(pool_.add(room));
    }
    void release(uint32_t edges, uint32_t room) {
        uint32_t& head = free_[std::countr_zero(room)];
        pool_[edges].token = int32_t(head);
        head = edges;
    }

    // The shorter substrings of `whole` become a state of their own.
    int32_t split(int32_t whole, int32_t state, int32_t token) {
        const int32_t part = int32_t(states_.add(1));
        State& to = at(part);
        to = at(whole);
        to.length = at(state).length + 1;
        if (to.others == CROWDED) {
            crowds_.push_back(Crowd(crowds_[to.edges]));
            to.edges = uint32_t(crowds_.size() - 1);
        } else if (to.others) {
            const uint32_t from = to.edges;
            to.edges = block(std::bit_ceil(uint32_t(to.others)));
            std::memcpy(static_cast<void*>(&pool_[to.edges]), &pool_[from], to.others * sizeof(Edge));
        }
        at(whole).link = part;
        while (state >= 0 && redirect(at(state), token, whole, part)) state = at(state).link;
        return part;
    }

    // Lead the edge `token` of a state to `part` if it leads to `whole`; false if it does not.
    bool redirect(State& from, int32_t token, int32_t whole, int32_t part) {
        const bool newest = from.newest == token;
        int32_t* edge = newest ? &from.target : from.others ? other(from, token) : nullptr;
        if (!edge || *edge != whole) return false;
        *edge = part;
        if (newest && from.others == CROWDED) *crowds_[from.edges].find(token) = part;
        return true;
    }

    // `token` came once more after `state` and its suffixes.
    void note(int32_t state, int32_t token) {
        for (int32_t met = 0; met < reach_ && state > 0; ++met) {
            State& from = at(state);
            if (from.newest != token) promote(from, token);
            else if (from.run < 255) ++from.run;
            state = from.link;
        }
    }

    void promote(State& from, int32_t token) {
        if (from.others == CROWDED) {
            from.target = crowds_[from.edges].promote(token);
        } else {
            Edge *block = &pool_[from.edges], *last = block + from.others - 1, *found = last;
            while (found->token != token) --found;
            const int32_t target = found->target;
            std::memmove(static_cast<void*>(found), found + 1, size_t(last - found) * sizeof(Edge));
            *last = {from.newest, from.target};
            from.target = target;
        }
        from.newest = token;
        from.run = 1;
    }

    Table<State> states_;
    Table<Edge> pool_;
    std::vector<Crowd> crowds_;
    uint32_t free_[6] = {NONE, NONE, NONE, NONE, NONE, NONE};
    int32_t last_ = 0;
    const int32_t reach_;
};

namespace {

constexpr int32_t RANKS = 3, LENGTHS = 64, RUNS = 8;
constexpr double RATE = 0.1, RATE_PER_LENGTH = 0.2;

double* by_length(fr_view& view, int32_t length) { return &view.by_length[std::bit_width(uint32_t(std::min(length, LENGTHS)))]; }

double survival(fr_view& view, int32_t length, const Outlook& outlook, int32_t rank) {
    const int32_t near = std::min(length, LENGTHS), run = std::min(outlook.run, RUNS);
    const double prior = view.prior[((rank * LENGTHS + near - 1) * RUNS + run - 1) * 2 + outlook.branches];
    return 1 / (1 + std::exp(-(prior + view.all + *by_length(view, near))));
}

void learn(fr_view& view, fr_cursor cursor, int32_t token) {
    if (!cursor.length) return;
    const Outlook outlook = view.automaton->outlook(cursor);
    if (outlook.newest == SEPARATOR) return;
    const double surprise = double(outlook.newest == token) - survival(view, cursor.length, outlook, 0);
    view.all += RATE * surprise;
    *by_length(view, cursor.length) += RATE_PER_LENGTH * surprise;
}

void read(fr_view& view, const int32_t* tokens, int64_t count) {
    fr_automaton& automaton = *view.automaton;
    for (int64_t i = 0; i < count; ++i) {
        const bool teaches = count - i <= view.studied;
        if (view.own) {
            if (teaches) learn(view, automaton.match(), tokens[i]);
            automaton.append(tokens[i]);
        } else {
            if (teaches) learn(view, view.cursor, tokens[i]);
            view.cursor = automaton.advance(view.cursor, tokens[i]);
        }
    }
}

class Growth {
  public:
    explicit Growth(fr_view& view) : view_(view), automaton_(*view.automaton) {}

    int32_t grow(int32_t root, fr_cursor cursor) {
        automaton_.spots.clear();
        automaton_.heap.clear();
        add(root, -1, 1.0);
        if (view_.depth > 0 && !ends(root)) open(0, 0, cursor, 1.0);
        while (!automaton_.heap.empty() && count_ <= view_.nodes) take(pop());
        return count_;
    }

  private:
    void take(const Candidate& next) {
        Spot& spot = automaton_.spots[size_t(next.spot)];
        const int32_t rank = next.tie % RANKS, token = rank ? other(spot, rank) : spot.outlook.newest;
        if (token < 0) return;
        if (token != SEPARATOR) {
            add(token, spot.node, next.survival);
            spot.rest -= next.survival;
        }
        if (spot.rest > view_.cost) consider(next.spot, rank + 1);
        if (token == SEPARATOR || spot.depth + 1 >= view_.depth || ends(token)) return;
        const int32_t depth = spot.depth + 1;
        open(count_ - 1, depth, automaton_.advance(spot.cursor, token), next.survival);  // spots may move
    }

    void add(int32_t token, int32_t parent, double survival) {
        view_.tokens[count_] = token;
        view_.parents[count_] = parent;
        view_.survival[count_++] = survival;
    }

    void open(int32_t node, int32_t depth, fr_cursor cursor, double survival) {
        automaton_.spots.push_back({cursor, node, depth, automaton_.outlook(cursor), survival, survival, -1, {}});
        consider(int32_t(automaton_.spots.size() - 1), 0);
    }

    void consider(int32_t number, int32_t rank) {
        const Spot& spot = automaton_.spots[size_t(number)];
        const int32_t length = spot.cursor.length;
        if (rank >= RANKS || length < view_.min_match || spot.outlook.run < 1) return;
        double likely = spot.survival * survival(view_, length, spot.outlook, rank);
        if (likely > spot.rest) likely = spot.rest;
        if (likely <= view_.cost) return;
        automaton_.heap.push_back({likely, spot.node * RANKS + rank, number});
        std::push_heap(automaton_.heap.begin(), automaton_.heap.end(), later);
    }

    Candidate pop() {
        std::pop_heap(automaton_.heap.begin(), automaton_.heap.end(), later);
        const Candidate next = automaton_.heap.back();
        automaton_.heap.pop_back();
        return next;
    }

    static bool later(const Candidate& a, const Candidate& b) {
        return a.survival < b.survival || (a.survival == b.survival && a.tie > b.tie);
    }

    int32_t other(Spot& spot, int32_t rank) const {
        if (spot.known < 0) spot.known = automaton_.continuations(spot.cursor, RANKS, view_.min_match, spot.tokens);
        return rank < spot.known ? spot.tokens[rank] : -1;
    }

    bool ends(int32_t token) const { return std::find(view_.ends, view_.ends + view_.ends_count, token) != view_.ends + view_.ends_count; }

    fr_view& view_;
    fr_automaton& automaton_;
    int32_t count_ = 0;
};

bool are_tokens(const int32_t* tokens, int64_t count) {
    return std::all_of(tokens, tokens + count, [](int32_t token) { return token >= 0; });
}

bool is_place(const fr_automaton& automaton, fr_cursor cursor) {
    return cursor.state >= 0 && cursor.state < automaton.states() && cursor.length >= 0;
}

// What `body` returns, or `failed` after there was not enough memory. An automaton that grew is empty then.
template <class Body>
int32_t guarded(fr_automaton& automaton, bool grows, int32_t failed, Body&& body) {
    try {
        return body();
    } catch (const std::bad_alloc&) {
        if (grows) automaton.clear();
        return failed;
    }
}

}  // namespace

FR_API fr_automaton* fr_automaton_new(int32_t reach) {
    try {
        return new fr_automaton(reach);
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}
FR_API void fr_automaton_free(fr_automaton* automaton) { delete automaton; }

FR_API int32_t fr_automaton_extend(fr_automaton* automaton, const int32_t* tokens, int64_t count) {
    if (!are_tokens(tokens, count)) return FR_BAD_TOKEN;
    return guarded(*automaton, true, FR_NO_MEMORY, [&] {
        for (int64_t i = 0; i < count; ++i) automaton->append(tokens[i]);
        return int32_t(FR_FINE);
    });
}

FR_API void fr_automaton_size(const fr_automaton* automaton, int64_t* tokens_states_bytes) {
    tokens_states_bytes[0] = automaton->tokens();
    tokens_states_bytes[1] = automaton->states();
    tokens_states_bytes[2] = automaton->bytes();
}

FR_API void fr_automaton_match(const fr_automaton* automaton, fr_cursor* cursor) { *cursor = automaton->match(); }

FR_API int32_t fr_automaton_advance(const fr_automaton* automaton, fr_cursor* cursor, const int32_t* tokens, int64_t count) {
    if (!are_tokens(tokens, count)) return FR_BAD_TOKEN;
    if (!is_place(*automaton, *cursor)) return FR_BAD_PLACE;
    for (int64_t i = 0; i < count; ++i) *cursor = automaton->advance(*cursor, tokens[i]);
    return FR_FINE;
}

FR_API int32_t fr_automaton_outlook(const fr_automaton* automaton, const fr_cursor* cursor, int32_t* newest_run_branches_end) {
    if (!is_place(*automaton, *cursor)) return FR_BAD_PLACE;
    const Outlook found = automaton->outlook(*cursor);
    const int32_t all[] = {found.newest, found.run, found.branches, automaton->end(*cursor)};
    std::copy(std::begin(all), std::end(all), newest_run_branches_end);
    return FR_FINE;
}

FR_API int32_t fr_automaton_continuations(const fr_automaton* automaton, const fr_cursor* cursor, int32_t count, int32_t shortest,
                                          int32_t* tokens) {
    if (!is_place(*automaton, *cursor)) return -FR_BAD_PLACE;
    return automaton->continuations(*cursor, count, shortest, tokens);
}

FR_API int32_t fr_view_read(fr_view* view, const int32_t* tokens, int64_t count) {
    if (!are_tokens(tokens, count)) return FR_BAD_TOKEN;
    if (!is_place(*view->automaton, view->cursor)) return FR_BAD_PLACE;
    return guarded(*view->automaton, view->own, FR_NO_MEMORY, [&] {
        read(*view, tokens, count);
        return int32_t(FR_FINE);
    });
}

FR_API int32_t fr_view_draft(fr_view* view, const int32_t* tokens, int64_t firm, int64_t tentative, int32_t root) {
    if (view->nodes >= view->room || view->nodes < 0 || view->min_match < 1) return -FR_BAD_PLACE;
    if (!are_tokens(tokens, firm + tentative)) return -FR_BAD_TOKEN;
    if (!is_place(*view->automaton, view->cursor)) return -FR_BAD_PLACE;
    return guarded(*view->automaton, view->own, -FR_NO_MEMORY, [&] {
        read(*view, tokens, firm);
        fr_cursor cursor = view->own ? view->automaton->match() : view->cursor;
        for (int64_t i = 0; i < tentative; ++i) cursor = view->automaton->advance(cursor, tokens[firm + i]);
        return Growth(*view).grow(root, cursor);
    });
}

FR_API int32_t fr_view_next(fr_view* view, int32_t token) { return fr_view_draft(view, &token, 1, 0, token); }
