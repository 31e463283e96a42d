// What is asked of the processor outside of the kernels proper: these and the vectors of simd.h are the only places that know instruction
// sets.
#pragma once
#include "forerun_kernels.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// The best instruction set that this processor runs.
static inline int32_t best_isa() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")) return FR_AVX512_BF16;
    if (avx512) return FR_AVX512;
    if (avx2) return FR_AVX2;
#endif
    return FR_PORTABLE;
}

// Between two looks at what another thread is about to write.
static inline void pause_briefly() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}
