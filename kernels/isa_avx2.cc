// The kernels for processors with AVX2 and FMA.
#include <utility>

#include "work.h"
#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC target("avx2,fma")
#define FR_ISA 1
namespace avx2 {
#include "body.h"
}
const Kernels avx2_kernels = {avx2::linear, avx2::norm,      avx2::emit,
                                     avx2::attention, avx2::silu_gate, avx2::top};
#else
const Kernels avx2_kernels = portable_kernels;
#endif
