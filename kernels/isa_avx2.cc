// The kernels for processors with AVX2 and FMA.
#include <utility>

#include "work.h"
#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define FR_ISA 1
namespace avx2 {
#include "body.h"
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
const Kernels avx2_kernels = {avx2::read_row, avx2::write_row, avx2::linear, avx2::products,
                        avx2::norm, avx2::emit, avx2::attention, avx2::append_all, avx2::silu_gate, avx2::top,
                        avx2::temper, avx2::peaks, avx2::at_least, avx2::weigh, avx2::scale, avx2::excess};
#else
const Kernels avx2_kernels = portable_kernels;
#endif
