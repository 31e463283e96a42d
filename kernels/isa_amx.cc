// The kernels for processors that have a matrix unit for bf16 beside AVX-512.
#include <utility>

#include "work.h"
#if FR_KNOWS_AMX
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,amx-tile,amx-bf16"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,amx-tile,amx-bf16")
#endif
#define FR_ISA 4
namespace amx {
#include "body.h"
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
const Kernels amx_kernels = {amx::read_row, amx::write_row, amx::linear, amx::products,
                        amx::norm, amx::emit, amx::attention, amx::append_all, amx::silu_gate, amx::top,
                        amx::temper, amx::peaks, amx::at_least, amx::weigh, amx::scale, amx::excess};
#else
const Kernels amx_kernels = portable_kernels;
#endif
