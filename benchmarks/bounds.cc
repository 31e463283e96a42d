// What this machine can do at best: how fast memory is copied and read, and how many products its vector units make.
// Compiled and called by benchmarks/products.py.
#include <immintrin.h>
#include <omp.h>

#include <chrono>
#include <cstdint>
#include <cstring>

static double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

extern "C" double copy_seconds(char* to, const char* from, int64_t bytes, int threads) {
    const double begun = seconds();
#pragma omp parallel num_threads(threads)
    {
        const int64_t rank = omp_get_thread_num(), share = bytes / threads;
        std::memcpy(to + rank * share, from + rank * share, size_t(share));
    }
    return seconds() - begun;
}

extern "C" double read_seconds(const char* from, int64_t bytes, int threads) {
    const double begun = seconds();
#pragma omp parallel num_threads(threads)
    {
        const int64_t share = bytes / threads;
        const char* at = from + omp_get_thread_num() * share;
        __m512i sum[4] = {};
        for (int64_t i = 0; i + 256 <= share; i += 256)
            for (int j = 0; j < 4; ++j) sum[j] = _mm512_add_epi64(sum[j], _mm512_loadu_si512(at + i + 64 * j));
        asm volatile("" ::"v"(sum[0]), "v"(sum[1]), "v"(sum[2]), "v"(sum[3]));
    }
    return seconds() - begun;
}

// Multiply-adds per second: bf16 pairs, fp32, or int8 quads, out of registers alone.
#define FR_PEAK(NAME, INSTRUCTION, PER_INSTRUCTION)                                                        \
    extern "C" double NAME(int64_t rounds, int threads) {                                                  \
        const double begun = seconds();                                                                    \
        _Pragma("omp parallel num_threads(threads)") {                                                     \
            __m512 x = _mm512_setzero_ps(), sum[24];                                                       \
            _Pragma("GCC unroll 24") for (int i = 0; i < 24; ++i) sum[i] = _mm512_setzero_ps();            \
            for (int64_t k = 0; k < rounds; ++k) {                                                         \
                _Pragma("GCC unroll 24") for (int i = 0; i < 24; ++i)                                      \
                    asm volatile(INSTRUCTION " %1, %1, %0" : "+v"(sum[i]) : "v"(x));                       \
            }                                                                                              \
        }                                                                                                  \
        return double(rounds) * 24 * PER_INSTRUCTION * threads / (seconds() - begun);                      \
    }
FR_PEAK(bf16_peak, "vdpbf16ps", 32)
FR_PEAK(fp32_peak, "vfmadd231ps", 16)
FR_PEAK(int8_peak, "vpdpbusd", 64)
