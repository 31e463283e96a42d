// Sixteen floats at a time, for four instruction sets. Included inside a namespace of its own by every isa_*.cc, which says which
// set it is compiled for; nothing here may be shared between them.
//
// V: 16 floats. W: 16 words of 32 bits, each one fp32 or two bf16 (the even input in the low half).
// Nothing is contracted or reordered by the compiler: every fused multiply-add is written as one.

#if FR_ISA >= 2  // AVX-512

using V = __m512;
using W = __m512i;
static inline V zero() { return _mm512_setzero_ps(); }
static inline V all(float x) { return _mm512_set1_ps(x); }
static inline V load(const float* p) { return _mm512_loadu_ps(p); }
static inline void store(float* p, V x) { _mm512_storeu_ps(p, x); }
static inline V add(V a, V b) { return _mm512_add_ps(a, b); }
static inline V sub(V a, V b) { return _mm512_sub_ps(a, b); }
static inline V mul(V a, V b) { return _mm512_mul_ps(a, b); }
static inline V div(V a, V b) { return _mm512_div_ps(a, b); }
static inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
static inline V larger(V a, V b) { return _mm512_max_ps(a, b); }   // b where either is NaN
static inline V smaller(V a, V b) { return _mm512_min_ps(a, b); }  // b where either is NaN
static inline W load_words(const void* p) { return _mm512_loadu_si512(p); }
static inline void store_words(void* p, W w) { _mm512_storeu_si512(p, w); }
static inline W all_words(int32_t x) { return _mm512_set1_epi32(x); }
static inline V floats(W w) { return _mm512_castsi512_ps(w); }
static inline V low_bf16(W w) { return _mm512_castsi512_ps(_mm512_slli_epi32(w, 16)); }
static inline V high_bf16(W w) { return _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32(int32_t(0xffff0000)))); }
static inline V from_bf16(const uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
static inline V round_to_int(V x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline V times_power_of_two(V x, V n) { return _mm512_scalef_ps(x, n); }
static inline void to_bf16(uint16_t* p, V x) {
#if FR_ISA >= 3
    _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x));
#else
    __m512i u = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __m512i quiet = _mm512_or_si512(u, _mm512_set1_epi32(0x00400000));
    rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), quiet);
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
#endif
}
static inline V dot_bf16(V sum, W w, W x) {
#if FR_ISA >= 3
    return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x);
#else
    return fma(high_bf16(w), high_bf16(x), fma(low_bf16(w), low_bf16(x), sum));
#endif
}
static inline W dot_int8(W sum, W w, W x) {  // x unsigned, w signed
#if FR_ISA >= 3
    return _mm512_dpbusd_epi32(sum, x, w);
#else
    __m512i low = _mm512_madd_epi16(_mm512_cvtepu8_epi16(_mm512_castsi512_si256(x)), _mm512_cvtepi8_epi16(_mm512_castsi512_si256(w)));
    __m512i high = _mm512_madd_epi16(_mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(x, 1)), _mm512_cvtepi8_epi16(_mm512_extracti64x4_epi64(w, 1)));
    // Sums of pairs: neighbours belong together, eight words from each half.
    __m512i even = _mm512_permutex2var_epi32(low, _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30), high);
    __m512i uneven = _mm512_permutex2var_epi32(low, _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31), high);
    return _mm512_add_epi32(sum, _mm512_add_epi32(even, uneven));
#endif
}
static inline V int_to_float(W w) { return _mm512_cvtepi32_ps(w); }
static inline W subtract_words(W a, W b) { return _mm512_sub_epi32(a, b); }
static inline bool any_nan(V x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q) != 0; }
static inline float largest_of(V x) { return _mm512_reduce_max_ps(x); }
static inline W shift_left_7(W a) { return _mm512_slli_epi32(a, 7); }

// Halves of words: the first `count` of 32, and what they load; halves `from .. from + 15` of a and b by turns.
using Mask = __mmask32;
static inline Mask first_halves(int64_t count) { return count >= 32 ? ~Mask(0) : count <= 0 ? 0 : (Mask(1) << count) - 1; }
static inline W load_halves(Mask mask, const void* p) { return _mm512_maskz_loadu_epi16(mask, p); }
static inline W interleave(W a, W b, int16_t from) {
    const W index = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34,
                                     2, 33, 1, 32, 0);
    return _mm512_permutex2var_epi16(a, _mm512_add_epi16(index, _mm512_set1_epi16(from)), b);
}
// 16 rows of 16 words -> 16 columns.
static inline void transpose(W r[16], uint8_t* to, int64_t step) {
    W t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        W a = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88), b = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        W c = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd), d = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
        store_words(to + i * step, _mm512_shuffle_i32x4(a, b, 0x88));
        store_words(to + (4 + i) * step, _mm512_shuffle_i32x4(c, d, 0x88));
        store_words(to + (8 + i) * step, _mm512_shuffle_i32x4(a, b, 0xdd));
        store_words(to + (12 + i) * step, _mm512_shuffle_i32x4(c, d, 0xdd));
    }
}

#elif FR_ISA == 1  // AVX2 and FMA

struct V { __m256 a, b; };
struct W { __m256i a, b; };
static inline V zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
static inline V all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
static inline V load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline void store(float* p, V x) { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
static inline V add(V x, V y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
static inline V sub(V x, V y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
static inline V mul(V x, V y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
static inline V div(V x, V y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
static inline V fma(V x, V y, V z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
static inline V larger(V x, V y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
static inline V smaller(V x, V y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
static inline W load_words(const void* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)};
}
static inline void store_words(void* p, W w) { _mm256_storeu_si256((__m256i*)p, w.a); _mm256_storeu_si256((__m256i*)p + 1, w.b); }
static inline W all_words(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
static inline V floats(W w) { return {_mm256_castsi256_ps(w.a), _mm256_castsi256_ps(w.b)}; }
static inline V low_bf16(W w) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(w.a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(w.b, 16))};
}
static inline V high_bf16(W w) {
    __m256i mask = _mm256_set1_epi32(int32_t(0xffff0000));
    return {_mm256_castsi256_ps(_mm256_and_si256(w.a, mask)), _mm256_castsi256_ps(_mm256_and_si256(w.b, mask))};
}
static inline __m256 half_from_bf16(const uint16_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
static inline V from_bf16(const uint16_t* p) { return {half_from_bf16(p), half_from_bf16(p + 8)}; }
static inline V round_to_int(V x) {
    return {_mm256_round_ps(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), _mm256_round_ps(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
static inline __m256 half_power_of_two(__m256 n) {  // n a whole number in -126 .. 127
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
static inline V times_power_of_two(V x, V n) {
    return {_mm256_mul_ps(x.a, half_power_of_two(n.a)), _mm256_mul_ps(x.b, half_power_of_two(n.b))};
}
static inline void half_to_bf16(uint16_t* p, __m256 x) {
    __m256i u = _mm256_castps_si256(x);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x00400000));
    rounded = _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
    rounded = _mm256_srli_epi32(rounded, 16);
    _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1)));
}
static inline void to_bf16(uint16_t* p, V x) { half_to_bf16(p, x.a); half_to_bf16(p + 8, x.b); }
static inline V dot_bf16(V sum, W w, W x) { return fma(high_bf16(w), high_bf16(x), fma(low_bf16(w), low_bf16(x), sum)); }
static inline __m256i half_dot_int8(__m256i sum, __m256i w, __m256i x) {
    __m256i low = _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm256_castsi256_si128(x)), _mm256_cvtepi8_epi16(_mm256_castsi256_si128(w)));
    __m256i high = _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm256_extracti128_si256(x, 1)), _mm256_cvtepi8_epi16(_mm256_extracti128_si256(w, 1)));
    __m256i pairs = _mm256_permute4x64_epi64(_mm256_hadd_epi32(low, high), 0xd8);
    return _mm256_add_epi32(sum, pairs);
}
static inline W dot_int8(W sum, W w, W x) { return {half_dot_int8(sum.a, w.a, x.a), half_dot_int8(sum.b, w.b, x.b)}; }
static inline V int_to_float(W w) { return {_mm256_cvtepi32_ps(w.a), _mm256_cvtepi32_ps(w.b)}; }
static inline bool any_nan(V x) {
    return _mm256_movemask_ps(_mm256_or_ps(_mm256_cmp_ps(x.a, x.a, _CMP_UNORD_Q), _mm256_cmp_ps(x.b, x.b, _CMP_UNORD_Q))) != 0;
}
static inline W subtract_words(W x, W y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
static inline W shift_left_7(W x) { return {_mm256_slli_epi32(x.a, 7), _mm256_slli_epi32(x.b, 7)}; }

#else  // plain C++

struct V { float f[16]; };
struct W { uint32_t u[16]; };
#define FR_EACH for (int i = 0; i < 16; ++i)
static inline float float_of(uint32_t u) { float f; __builtin_memcpy(&f, &u, 4); return f; }
static inline uint32_t bits_of(float f) { uint32_t u; __builtin_memcpy(&u, &f, 4); return u; }
static inline V zero() { V r; FR_EACH r.f[i] = 0; return r; }
static inline V all(float x) { V r; FR_EACH r.f[i] = x; return r; }
static inline V load(const float* p) { V r; FR_EACH r.f[i] = p[i]; return r; }
static inline void store(float* p, V x) { FR_EACH p[i] = x.f[i]; }
static inline V add(V x, V y) { FR_EACH x.f[i] = x.f[i] + y.f[i]; return x; }
static inline V sub(V x, V y) { FR_EACH x.f[i] = x.f[i] - y.f[i]; return x; }
static inline V mul(V x, V y) { FR_EACH x.f[i] = x.f[i] * y.f[i]; return x; }
static inline V div(V x, V y) { FR_EACH x.f[i] = x.f[i] / y.f[i]; return x; }
static inline V fma(V x, V y, V z) { FR_EACH z.f[i] = x.f[i] * y.f[i] + z.f[i]; return z; }
static inline V larger(V x, V y) { FR_EACH y.f[i] = x.f[i] > y.f[i] ? x.f[i] : y.f[i]; return y; }
static inline V smaller(V x, V y) { FR_EACH y.f[i] = x.f[i] < y.f[i] ? x.f[i] : y.f[i]; return y; }
static inline W load_words(const void* p) { W r; __builtin_memcpy(r.u, p, 64); return r; }
static inline void store_words(void* p, W w) { __builtin_memcpy(p, w.u, 64); }
static inline W all_words(int32_t x) { W r; FR_EACH r.u[i] = uint32_t(x); return r; }
static inline V floats(W w) { V r; FR_EACH r.f[i] = float_of(w.u[i]); return r; }
static inline V low_bf16(W w) { V r; FR_EACH r.f[i] = float_of(w.u[i] << 16); return r; }
static inline V high_bf16(W w) { V r; FR_EACH r.f[i] = float_of(w.u[i] & 0xffff0000u); return r; }
static inline V from_bf16(const uint16_t* p) { V r; FR_EACH r.f[i] = float_of(uint32_t(p[i]) << 16); return r; }
static inline V round_to_int(V x) { FR_EACH x.f[i] = __builtin_nearbyintf(x.f[i]); return x; }
static inline V times_power_of_two(V x, V n) { FR_EACH x.f[i] *= float_of(uint32_t(int32_t(n.f[i]) + 127) << 23); return x; }
static inline void to_bf16(uint16_t* p, V x) {
    FR_EACH {
        uint32_t u = bits_of(x.f[i]);
        p[i] = x.f[i] != x.f[i] ? uint16_t((u >> 16) | 0x40) : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
    }
}
static inline V dot_bf16(V sum, W w, W x) { return fma(high_bf16(w), high_bf16(x), fma(low_bf16(w), low_bf16(x), sum)); }
static inline W dot_int8(W sum, W w, W x) {
    FR_EACH for (int j = 0; j < 32; j += 8) {
        sum.u[i] += uint32_t(int32_t(int8_t(w.u[i] >> j)) * int32_t((x.u[i] >> j) & 0xff));
    }
    return sum;
}
static inline V int_to_float(W w) { V r; FR_EACH r.f[i] = float(int32_t(w.u[i])); return r; }
static inline bool any_nan(V x) { bool nan = false; FR_EACH nan |= x.f[i] != x.f[i]; return nan; }
static inline W subtract_words(W x, W y) { FR_EACH x.u[i] -= y.u[i]; return x; }
static inline W shift_left_7(W x) { FR_EACH x.u[i] <<= 7; return x; }

#endif

// Sixteen lanes to one value, always in the same tree.
static inline float sum_of(V x) {
    float f[16];
    store(f, x);
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; ++i) f[i] += f[i + half];
    return f[0];
}
#if FR_ISA < 2
static inline float largest_of(V x) {
    float f[16], best;
    store(f, x);
    best = f[0];
    for (int i = 1; i < 16; ++i) best = f[i] > best ? f[i] : best;
    return best;
}
#endif

// e ** x: exact to about one unit in the last place; below -104 it is zero, above 88 infinite; NaN stays NaN.
static inline V exponential(V x) {
    V clamped = smaller(all(89.0f), larger(all(-130.0f), x));
    V n = round_to_int(mul(clamped, all(1.44269504f)));
    V r = fma(n, all(-0.693359375f), clamped);
    r = fma(n, all(2.12194440e-4f), r);
    V p = all(1.9875691500e-4f);
    p = fma(p, r, all(1.3981999507e-3f));
    p = fma(p, r, all(8.3334519073e-3f));
    p = fma(p, r, all(4.1665795894e-2f));
    p = fma(p, r, all(1.6666665459e-1f));
    p = fma(p, r, all(5.0000001201e-1f));
    p = add(fma(mul(r, r), p, r), all(1.0f));
    // In two steps, so that every power is a normal number.
    V half = round_to_int(mul(n, all(0.5f)));
    return times_power_of_two(times_power_of_two(p, half), sub(n, half));
}
static inline V silu(V x) { return div(x, add(all(1.0f), exponential(sub(zero(), x)))); }
