#include "work.h"

#include <cstdlib>
#include <new>

Scratch::~Scratch() { std::free(memory_); }

void* Scratch::bytes(int64_t count) {
    const int64_t wanted = round_up(count, 64) + 256;
    if (wanted > size_) {
        std::free(memory_);
        memory_ = std::aligned_alloc(64, size_t(wanted));
        if (!memory_) throw std::bad_alloc();
        size_ = wanted;
    }
    return memory_;
}

Step* Workspace::begin(int32_t threads, int64_t steps) {
    if (int32_t(own.size()) < threads) own = std::vector<Shelf>(size_t(threads));
    Step* first = steps_.get<Step>(steps);
    for (int64_t i = 0; i < steps; ++i) new (first + i) Step();
    return first;
}

void Tokens::read(const fr_feed& feed) {
    list.clear();
    row_begin.assign(1, 0);
    const int64_t scratch = feed.held + feed.count;
    paths.resize(feed.sees ? size_t(int64_t(feed.rows) * feed.count * scratch) : 0);
    for (int32_t row = 0; row < feed.rows; ++row) {
        for (int32_t i = 0; i < feed.counts[row]; ++i) {
            const int32_t place = row * feed.count + i, length = feed.lengths[row];
            Token token{row, feed.start + row, place, length + feed.held + i, length, length + feed.held + i,
                        feed.positions[place], nullptr, feed.tokens ? feed.tokens[place] : 0};
            if (feed.sees) {
                int32_t* path = paths.data() + place * scratch;
                const uint8_t* sees = feed.sees + place * scratch;
                int32_t depth = 0;
                for (int32_t s = 0; s < scratch; ++s)
                    if (sees[s]) path[depth++] = length + s;
                token.path = path;
                token.logical = length + depth - 1;
            }
            list.push_back(token);
        }
        row_begin.push_back(int32_t(list.size()));
    }
}

Workspace& workspace() {
    static thread_local Workspace work;
    return work;
}
