// The kernels for processors with AVX-512 and its bf16 and int8 products.
#include <utility>

#include "work.h"
#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma")
#endif
#define FR_ISA 3
namespace avx512_bf16 {
#include "body.h"
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
const Kernels avx512_bf16_kernels = {avx512_bf16::read_row, avx512_bf16::write_row, avx512_bf16::linear, avx512_bf16::products,
                        avx512_bf16::norm, avx512_bf16::emit, avx512_bf16::attention, avx512_bf16::append_all, avx512_bf16::silu_gate, avx512_bf16::top,
                        avx512_bf16::temper, avx512_bf16::peaks, avx512_bf16::at_least, avx512_bf16::weigh, avx512_bf16::scale, avx512_bf16::excess};
#else
const Kernels avx512_bf16_kernels = portable_kernels;
#endif
