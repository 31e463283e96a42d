// What is asked of the processor outside of the kernels proper: these and the vectors of simd.h are the only places that know instruction
// sets.
#pragma once
#include "forerun_kernels.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) || __GNUC__ >= 11)
#define FR_KNOWS_AMX 1
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

// Whether the processor has a matrix unit for bf16, and the system lets this process use it.
static inline bool gets_amx() {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;  // amx-bf16, amx-tile
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;                                               // ARCH_REQ_XCOMP_PERM
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}
#endif

// The best instruction set that this processor runs.
static inline int32_t best_isa() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")) {
#if FR_KNOWS_AMX
        if (gets_amx()) return FR_AMX;
#endif
        return FR_AVX512_BF16;
    }
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
