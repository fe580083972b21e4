// A vector of float32 in a register, and what reads and writes it: float32 and, with AVX-512 BF16, bfloat16 in memory.
#pragma once

#include <cstdint>

typedef uint16_t half;  // the bits of a bfloat16

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define SERVED 1  // float32
#define LONG 1    // sixteen numbers in a register, eight elsewhere
#if defined(__AVX512BF16__)
#define FAST 1  // bfloat16 too
#endif
#elif defined(__AVX2__) && defined(__FMA__)
#define SERVED 1
#endif

#ifdef SERVED
#include <immintrin.h>

constexpr float LOG2E = 1.4426950408889634f;
constexpr unsigned FLUSH = 0x8040;  // of the control register: numbers below 2^-126 are 0, not a hundred cycles each

#ifdef LONG

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

#else

typedef __m256 vec;
constexpr int64_t WIDTH = 8;

inline vec load(const float* x) { return _mm256_loadu_ps(x); }
inline void store(float* x, vec y) { _mm256_storeu_ps(x, y); }
inline vec splat(float x) { return _mm256_set1_ps(x); }
inline vec fma(vec x, vec y, vec z) { return _mm256_fmadd_ps(x, y, z); }
inline vec larger(vec x, vec y) { return _mm256_max_ps(x, y); }
inline vec smaller(vec x, vec y) { return _mm256_min_ps(x, y); }
inline float total(vec x) {
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
inline float largest(vec x) {
    __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}

inline vec where_not_below(vec x, float least, vec y) {
    return _mm256_and_ps(_mm256_cmp_ps(x, splat(least), _CMP_NLT_UQ), y);
}

inline vec raise(vec x, vec y) {
    const __m256i n = _mm256_slli_epi32(_mm256_cvtps_epi32(y), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), n));
}
inline vec nearest(vec x) { return _mm256_cvtepi32_ps(_mm256_cvtps_epi32(x)); }

inline __m256i first(int64_t left) {
    static const int32_t ends[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(ends + (left >= 8 ? 0 : 8 - left)));
}
inline vec read(const float* x, int64_t left) { return _mm256_maskload_ps(x, first(left)); }
inline void write(float* x, vec y, int64_t left) { _mm256_maskstore_ps(x, first(left), y); }

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
