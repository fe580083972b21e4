// Sixteen float32 in a register, by AVX-512.
#pragma once

#include <immintrin.h>

#include <cstdint>

typedef __m512 vec;
constexpr int64_t WIDTH = 16;

inline vec load(const float* x) { return _mm512_loadu_ps(x); }
inline void store(float* x, vec y) { _mm512_storeu_ps(x, y); }
inline vec splat(float x) { return _mm512_set1_ps(x); }
inline vec fma(vec x, vec y, vec z) { return _mm512_fmadd_ps(x, y, z); }
inline vec larger(vec x, vec y) { return _mm512_max_ps(x, y); }
inline vec smaller(vec x, vec y) { return _mm512_min_ps(x, y); }
inline float total(vec x) { return _mm512_reduce_add_ps(x); }
inline float largest(vec x) { return _mm512_reduce_max_ps(x); }

// y where x is at least `least` or not a number, else 0.
inline vec where_not_below(vec x, float least, vec y) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, splat(least), _CMP_NLT_UQ), y);
}

// x 2^n for the nearest whole number n to y, which lies in float32's range of exponents.
inline vec raise(vec x, vec y) {
    const __m512i n = _mm512_slli_epi32(_mm512_cvtps_epi32(y), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(x), n));
}
inline vec nearest(vec x) { return _mm512_cvtepi32_ps(_mm512_cvtps_epi32(x)); }

// The first `left` numbers at x and zeros after them; all of them where there are as many.
inline __mmask16 first(int64_t left) { return left >= 16 ? (__mmask16)0xffff : (__mmask16)((1u << left) - 1); }
inline vec read(const float* x, int64_t left) { return _mm512_maskz_loadu_ps(first(left), x); }
inline void write(float* x, vec y, int64_t left) { _mm512_mask_storeu_ps(x, first(left), y); }
