// The kernels for processors with AVX-512.
#include <utility>

#include "work.h"
#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif
#define FR_ISA 2
namespace avx512 {
#include "body.h"
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
const Kernels avx512_kernels = {avx512::read_row, avx512::write_row, avx512::linear, avx512::products,
                        avx512::norm, avx512::emit, avx512::attention, avx512::append_all, avx512::silu_gate, avx512::top,
                        avx512::temper, avx512::peaks, avx512::at_least, avx512::weigh, avx512::scale, avx512::excess};
#else
const Kernels avx512_kernels = portable_kernels;
#endif
