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

namespace {

const int32_t* path_of(const fr_feed& feed, int32_t place) { return feed.paths + int64_t(place) * feed.reach; }

int32_t length_of(const int32_t* path, int32_t reach) {
    int32_t length = 0;
    while (length < reach && path[length] >= 0) ++length;
    return length;
}

}  // namespace

bool paths_hold(const fr_feed& feed) {
    for (int32_t row = 0; feed.paths && row < feed.rows; ++row) {
        for (int32_t i = 0; i < feed.counts[row]; ++i) {
            const int32_t* path = path_of(feed, row * feed.count + i);
            const int32_t length = length_of(path, feed.reach);
            if (length == 0 || path[length - 1] != feed.held + i) return false;
            for (int32_t j = 1; j < length; ++j)
                if (path[j] <= path[j - 1]) return false;
        }
    }
    return true;
}

void Tokens::read(const fr_feed& feed) {
    list.clear();
    row_begin.assign(1, 0);
    for (int32_t row = 0; row < feed.rows; ++row) {
        for (int32_t i = 0; i < feed.counts[row]; ++i) {
            const int32_t place = row * feed.count + i, length = feed.lengths[row];
            Token token{row, feed.start + row, place, length + feed.held + i, length, length + feed.held + i,
                        feed.positions[place], nullptr, feed.tokens ? feed.tokens[place] : 0};
            if (feed.paths) {
                token.path = path_of(feed, place);
                token.logical = length + length_of(token.path, feed.reach) - 1;
            } else if (feed.mutual) {
                token.logical = length + feed.held + feed.counts[row] - 1;
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
