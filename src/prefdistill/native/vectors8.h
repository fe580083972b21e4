// Eight float32 in a register, by AVX2.
#pragma once

#include <immintrin.h>

#include <cstdint>

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
