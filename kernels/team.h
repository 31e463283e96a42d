// A team of threads inside one parallel region, and the barrier between its steps.
#pragma once
#include <atomic>
#include <climits>
#include <cstdint>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#include <sched.h>

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

// All arrive, then all go on. Waiting threads spin for about the time a step of a forward takes; on a busy machine they then sleep,
// because the thread they wait for may be waiting for their core.
struct Barrier {
    alignas(64) std::atomic<int32_t> arrived{0};
    alignas(64) std::atomic<int32_t> round{0};
    alignas(64) std::atomic<int32_t> sleepers{0};

    void wait(int32_t size) {
        const int32_t mine = round.load(std::memory_order_relaxed);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
            arrived.store(0, std::memory_order_relaxed);
            round.store(mine + 1, std::memory_order_seq_cst);
            if (sleepers.load(std::memory_order_seq_cst)) wake_all(round);
            return;
        }
        for (int32_t turns = 0; turns < SPINS; ++turns) {
            if (round.load(std::memory_order_acquire) != mine) return;
#if defined(__x86_64__)
            _mm_pause();
#endif
        }
        sleepers.fetch_add(1, std::memory_order_seq_cst);
        while (round.load(std::memory_order_seq_cst) == mine) sleep_while(round, mine);
        sleepers.fetch_sub(1, std::memory_order_seq_cst);
    }

    enum { SPINS = 4000 };
};

struct Range {
    int64_t begin, end;
};

struct Team {
    int32_t rank, size;
    Barrier* barrier;

    void wait() const {
        if (size > 1) barrier->wait(size);
    }
    // This thread's part of `count` equal pieces of work.
    Range share(int64_t count) const { return {count * rank / size, count * (rank + 1) / size}; }
};

// Run `body(team)` on `threads` threads. OpenMP keeps them: it is the runtime torch uses, so there is one pool for both.
template <class Body>
static void together(int32_t threads, Body&& body) {
    Barrier barrier;
#ifdef _OPENMP
    if (threads > 1 && !omp_in_parallel()) {
#pragma omp parallel num_threads(threads)
        body(Team{omp_get_thread_num(), omp_get_num_threads(), &barrier});
        return;
    }
#endif
    body(Team{0, 1, &barrier});
}
