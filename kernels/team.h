// A team of threads inside one parallel region, and the barrier between its steps.
#pragma once
#include <atomic>
#include <climits>
#include <cstdint>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#include <sched.h>

#include "cpu.h"

// Sleep until `word` is no longer `value` (or for no reason), and wake everybody who does.
static inline void sleep_while(std::atomic<int32_t>& word, int32_t value) {
#if defined(__linux__)
    syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
#else
    (void)word, (void)value;
    sched_yield();
#endif
}
static inline void wake_all(std::atomic<int32_t>& word) {
#if defined(__linux__)
    syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
#else
    (void)word;
#endif
}

// One step of the work of a team: pieces are claimed one after the other by whoever is free, and the step is over when all are done.
// Nobody waits for a thread that is not running: it finds no pieces left when it comes, and goes on.
struct alignas(64) Step {
    std::atomic<int32_t> claimed{0}, done{0}, sleepers{0};

    void finish_one(int32_t pieces) {
        if (done.fetch_add(1, std::memory_order_seq_cst) + 1 == pieces && sleepers.load(std::memory_order_seq_cst)) wake_all(done);
    }

    // Spin for about the time that a step takes; on a busy machine, sleep then.
    void wait(int32_t pieces) {
        for (int32_t turns = 0; turns < SPINS; ++turns) {
            if (done.load(std::memory_order_acquire) == pieces) return;
            pause_briefly();
        }
        sleepers.fetch_add(1, std::memory_order_seq_cst);
        for (int32_t seen; (seen = done.load(std::memory_order_seq_cst)) != pieces;) sleep_while(done, seen);
        sleepers.fetch_sub(1, std::memory_order_seq_cst);
    }

    static constexpr int32_t SPINS = 4000;  // pauses: 40 microseconds or more, by processor
};

// Every thread of a team takes the same steps in the same order; `next` is the one that this thread takes next.
struct Team {
    int32_t rank, size;
    Step* next;

    // `body(begin, end)` for all of 0 .. count, in pieces of `grain`, and wait until all of it is done.
    template <class Body>
    void each(int64_t count, int64_t grain, Body&& body) {
        if (size == 1) {
            if (count) body(int64_t(0), count);
            return;
        }
        Step& step = *next++;
        const int32_t pieces = int32_t((count + grain - 1) / grain);
        for (int32_t piece; (piece = step.claimed.fetch_add(1, std::memory_order_relaxed)) < pieces;) {
            const int64_t begin = piece * grain, end = begin + grain < count ? begin + grain : count;
            body(begin, end);
            step.finish_one(pieces);
        }
        step.wait(pieces);
    }

    // A grain that gives every thread a few pieces.
    int64_t grain(int64_t count, int64_t pieces_each) const {
        const int64_t each = count / (size * pieces_each);
        return each > 1 ? each : 1;
    }
};

// Run `body(team)` on `threads` threads; `steps` is room for all the steps it takes, freshly made. OpenMP keeps the threads: it is the
// runtime torch uses, so there is one pool for both.
template <class Body>
static void together(int32_t threads, Step* steps, Body&& body) {
#ifdef _OPENMP
    if (threads > 1 && !omp_in_parallel()) {
#pragma omp parallel num_threads(threads)
        body(Team{omp_get_thread_num(), omp_get_num_threads(), steps});
        return;
    }
#endif
    body(Team{0, 1, steps});
}
