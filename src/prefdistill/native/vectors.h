// A vector of float32 in a register, and what reads and writes it: float32 and, with AVX-512 BF16, bfloat16 in memory.
#pragma once

#include <cstdint>

#include "served.h"

typedef uint16_t half;  // the bits of a bfloat16

#ifdef SERVED
#include <immintrin.h>

constexpr float LOG2E = 1.4426950408889634f;
constexpr unsigned FLUSH = 0x8040;  // of the control register: numbers below 2^-126 are 0, not a hundred cycles each

#ifdef LONG
#include "vectors16.h"
#else
#include "vectors8.h"
#endif

// 2^x for x < 127, to float32's rounding; 0 below 2^-125.
inline vec exp2_whole(vec x) {
    const vec f = x - nearest(x);
    vec p = splat(1.535336203e-4f);
    p = fma(p, f, splat(1.339887465e-3f));
    p = fma(p, f, splat(9.618437359e-3f));
    p = fma(p, f, splat(5.550332471e-2f));
    p = fma(p, f, splat(2.402264791e-1f));
    p = fma(p, f, splat(6.931472029e-1f));
    p = fma(p, f, splat(1.0f));
    return where_not_below(x, -125.0f, raise(p, x));
}

#ifdef FAST

inline __m512 wide(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
inline __m512 wide(const half* x) { return wide(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))); }
inline __m256i narrow(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

inline vec read(const half* x, int64_t left) { return wide(_mm256_maskz_loadu_epi16(first(left), x)); }
inline void write(half* x, vec y, int64_t left) { _mm256_mask_storeu_epi16(x, first(left), narrow(y)); }

// 2^x for x < 127, to far less than bfloat16's rounding; 0 below 2^-100, which no sum of bfloat16 would show.
inline __m512 exp2_16(__m512 x) {
    const __mmask16 seen = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-100.0f), _CMP_NLT_UQ);  // not a number stays so
    const __m512i whole = _mm512_cvtps_epi32(x);
    const __m512 f = _mm512_sub_ps(x, _mm512_cvtepi32_ps(whole));
    __m512 p = _mm512_set1_ps(1.3333558e-3f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6181291e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5504109e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022651e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    const __m512i raised = _mm512_add_epi32(_mm512_castps_si512(p), _mm512_slli_epi32(whole, 23));
    return _mm512_castsi512_ps(_mm512_maskz_mov_epi32(seen, raised));
}

#endif
#endif
