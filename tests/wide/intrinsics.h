// AVX-512, AVX-512 BF16 and AMX as Intel's manual says, number by number: what the library's code asks of them, and no more.
//
// Where such a CPU would fault (an address that must be aligned, tiles without a configuration), the process ends.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace stand {

typedef int32_t words __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));
typedef long long pairs __attribute__((vector_size(64)));

inline void must(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "this would be a fault: %s\n", what);
    std::abort();
}
inline void must_be_aligned(const void* at) { must(reinterpret_cast<uintptr_t>(at) % 64 == 0, "an unaligned address"); }

template <class To, class From>
To bits(From x) {
    static_assert(sizeof(To) == sizeof(From), "of one size");
    To y;
    std::memcpy(&y, &x, sizeof y);
    return y;
}

template <class V>
V read(const void* at) {
    V x;
    std::memcpy(&x, at, sizeof x);
    return x;
}
template <class V>
V read_aligned(const void* at) {
    must_be_aligned(at);
    return read<V>(at);
}
template <class V>
void write(void* at, V x) {
    std::memcpy(at, &x, sizeof x);
}
template <class V>
void write_aligned(void* at, V x) {
    must_be_aligned(at);
    write(at, x);
}

#define EACH for (int i = 0; i < 16; i++)

// -- float32 ----------------------------------------------------------------------------------------------------------

inline __m512 splat(float x) { return __m512{} + x; }
inline __m512 zero() { return __m512{}; }
inline __m512 add(__m512 x, __m512 y) { return x + y; }
inline __m512 subtract(__m512 x, __m512 y) { return x - y; }
inline __m512 multiply(__m512 x, __m512 y) { return x * y; }
inline __m512 multiply_add(__m512 x, __m512 y, __m512 z) {
    EACH z[i] = std::fma(x[i], y[i], z[i]);
    return z;
}
inline __m512 multiply_subtract(__m512 x, __m512 y, __m512 z) { return multiply_add(x, y, -z); }
// The second operand where one is not a number.
inline __m512 larger(__m512 x, __m512 y) {
    EACH y[i] = x[i] > y[i] ? x[i] : y[i];
    return y;
}
inline __m512 smaller(__m512 x, __m512 y) {
    EACH y[i] = x[i] < y[i] ? x[i] : y[i];
    return y;
}
inline float total(__m512 x) {
    for (int n = 8; n; n /= 2)
        for (int i = 0; i < n; i++) x[i] += x[i + n];
    return x[0];
}
inline float largest(__m512 x) {
    for (int n = 8; n; n /= 2)
        for (int i = 0; i < n; i++) x[i] = x[i] > x[i + n] ? x[i] : x[i + n];
    return x[0];
}
inline __mmask16 compare(__m512 x, __m512 y, int how) {
    must(how == _CMP_NLT_UQ, "another comparison than `not less`");
    unsigned mask = 0;
    EACH mask |= unsigned(!(x[i] < y[i])) << i;
    return mask;
}
inline __m512 put(__m512 x, __mmask16 mask, __m512 y) {
    EACH if (mask >> i & 1) x[i] = y[i];
    return x;
}
inline __m512 keep(__mmask16 mask, __m512 x) { return put(zero(), mask, x); }
// What a mask leaves out is neither read nor written.
inline __m512 read_some(__mmask16 mask, const void* at) {
    __m512 x{};
    EACH if (mask >> i & 1) x[i] = static_cast<const float*>(at)[i];
    return x;
}
inline void write_some(void* at, __mmask16 mask, __m512 x) {
    EACH if (mask >> i & 1) static_cast<float*>(at)[i] = x[i];
}

// -- whole numbers ----------------------------------------------------------------------------------------------------

inline __m512i of(words x) { return bits<__m512i>(x); }
inline words from(__m512i x) { return bits<words>(x); }
inline __m512i no_words() { return __m512i{}; }
inline __m512i splat_word(int32_t x) { return of(words{} + x); }
inline __m512i add_words(__m512i x, __m512i y) { return of(from(x) + from(y)); }
inline __m512i either(__m512i x, __m512i y) { return of(from(x) | from(y)); }
inline __m512i shift_left(__m512i x, int n) { return of(from(x) << n); }
inline __m512i widen(__m256i x) { return of(__builtin_convertvector(bits<halves>(x), words)); }
inline __m512i keep_words(__mmask16 mask, __m512i x) {
    words y = from(x);
    EACH if (!(mask >> i & 1)) y[i] = 0;
    return of(y);
}
inline __m512i rounded(__m512 x) {
    words y{};
    EACH y[i] = x[i] >= -0x1p31f && x[i] < 0x1p31f ? static_cast<int32_t>(std::nearbyint(x[i])) : INT32_MIN;
    return of(y);
}
inline __m512 as_floats(__m512i x) { return __builtin_convertvector(from(x), __m512); }

// Of every 128 bits the lower or upper half, of x and y in turn.
inline __m512i weave(__m512i x, __m512i y, int upper) {
    const words a = from(x), b = from(y);
    words found{};
    for (int lane = 0; lane < 16; lane += 4)
        for (int i = 0; i < 2; i++) {
            found[lane + 2 * i] = a[lane + 2 * upper + i];
            found[lane + 2 * i + 1] = b[lane + 2 * upper + i];
        }
    return of(found);
}
inline __m512i weave_pairs(__m512i x, __m512i y, int upper) {
    const pairs a = bits<pairs>(x), b = bits<pairs>(y);
    pairs found{};
    for (int lane = 0; lane < 8; lane += 2) {
        found[lane] = a[lane + upper];
        found[lane + 1] = b[lane + upper];
    }
    return bits<__m512i>(found);
}
inline __m512i low_words(__m512i x, __m512i y) { return weave(x, y, 0); }
inline __m512i high_words(__m512i x, __m512i y) { return weave(x, y, 1); }
inline __m512i low_pairs(__m512i x, __m512i y) { return weave_pairs(x, y, 0); }
inline __m512i high_pairs(__m512i x, __m512i y) { return weave_pairs(x, y, 1); }
// Two of x's four 128 bits, then two of y's.
inline __m512i shuffle(__m512i x, __m512i y, int which) {
    const words a = from(x), b = from(y);
    words found{};
    EACH found[i] = (i < 8 ? a : b)[4 * (which >> (i / 4 * 2) & 3) + i % 4];
    return of(found);
}

// -- bfloat16 ---------------------------------------------------------------------------------------------------------

inline float widened(uint16_t x) { return bits<float>(uint32_t(x) << 16); }
inline __m256i narrowed(__m512 x) {
    halves found{};
    EACH {
        const uint32_t n = bits<uint32_t>(float(x[i])), size = n & 0x7fffffff;
        const bool none = size > 0x7f800000, tiny = size < 0x00800000;
        // To the nearest, to even ones between two; the smallest numbers are 0.
        found[i] = none ? n >> 16 | 0x40 : tiny ? n >> 16 & 0x8000 : (n + 0x7fff + (n >> 16 & 1)) >> 16;
    }
    return bits<__m256i>(found);
}
inline float dot(float sum, uint32_t x, uint32_t y) {
    sum = std::fma(widened(x >> 16), widened(y >> 16), sum);
    return std::fma(widened(x), widened(y), sum);
}
inline __m512 dots(__m512 sums, __m512i x, __m512i y) {
    EACH sums[i] = dot(sums[i], from(x)[i], from(y)[i]);
    return sums;
}
inline __m256i read_some_halves(__mmask16 mask, const void* at) {
    halves x{};
    EACH if (mask >> i & 1) x[i] = static_cast<const uint16_t*>(at)[i];
    return bits<__m256i>(x);
}
inline void write_some_halves(void* at, __mmask16 mask, __m256i x) {
    EACH if (mask >> i & 1) static_cast<uint16_t*>(at)[i] = bits<halves>(x)[i];
}

// -- tiles ------------------------------------------------------------------------------------------------------------

struct Tiles {
    bool on = false;
    words at[8][16];  // rows of 64 bytes
};
inline thread_local Tiles tiles;

inline void configure(const void* at) {
    const auto config = static_cast<const uint8_t*>(at);
    must(config[0] == 1 && config[1] == 0, "a palette that does not exist");
    for (int i = 0; i < 8; i++) {
        must(read<uint16_t>(config + 16 + 2 * i) == 64 && config[48 + i] == 16, "other tiles than of 16 rows of 64 bytes");
        must(read<uint16_t>(config + 32 + 2 * i) == 0 && config[56 + i] == 0, "more than eight tiles");
    }
    tiles.on = true;
    std::memset(tiles.at, 0, sizeof tiles.at);
}
inline void release() { tiles.on = false; }
inline auto& tile(int n) {
    must(tiles.on && n < 8, "tiles without a configuration");
    return tiles.at[n];
}
inline void clear_tile(int n) {
    EACH tile(n)[i] = words{};
}
inline void read_tile(int n, const void* at, int64_t stride) {
    EACH tile(n)[i] = read<words>(static_cast<const char*>(at) + i * stride);
}
inline void write_tile(int n, void* at, int64_t stride) {
    EACH write(static_cast<char*>(at) + i * stride, tile(n)[i]);
}
inline void dots_of_tiles(int to, int left, int right) {
    auto &sums = tile(to), &a = tile(left), &b = tile(right);
    EACH {
        __m512 sum = bits<__m512>(sums[i]);
        for (int k = 0; k < 16; k++) sum = dots(sum, of(words{} + a[i][k]), of(b[k]));
        sums[i] = bits<words>(sum);
    }
}

#undef EACH

}  // namespace stand

#undef _mm512_cmp_ps_mask
#undef _mm512_shuffle_i32x4
#undef _mm512_slli_epi32
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps

#define __m512bh __m512i
#define _mm256_mask_storeu_epi16 stand::write_some_halves
#define _mm256_maskz_loadu_epi16 stand::read_some_halves
#define _mm512_add_epi32 stand::add_words
#define _mm512_add_ps stand::add
#define _mm512_castps_si512 stand::bits<__m512i>
#define _mm512_castsi512_ps stand::bits<__m512>
#define _mm512_cmp_ps_mask stand::compare
#define _mm512_cvtepi32_ps stand::as_floats
#define _mm512_cvtepu16_epi32 stand::widen
#define _mm512_cvtneps_pbh stand::narrowed
#define _mm512_cvtps_epi32 stand::rounded
#define _mm512_dpbf16_ps stand::dots
#define _mm512_fmadd_ps stand::multiply_add
#define _mm512_fmsub_ps stand::multiply_subtract
#define _mm512_load_ps stand::read_aligned<__m512>
#define _mm512_load_si512 stand::read_aligned<__m512i>
#define _mm512_loadu_ps stand::read<__m512>
#define _mm512_loadu_si512 stand::read<__m512i>
#define _mm512_mask_mov_ps stand::put
#define _mm512_mask_storeu_ps stand::write_some
#define _mm512_maskz_loadu_ps stand::read_some
#define _mm512_maskz_mov_epi32 stand::keep_words
#define _mm512_maskz_mov_ps stand::keep
#define _mm512_max_ps stand::larger
#define _mm512_min_ps stand::smaller
#define _mm512_mul_ps stand::multiply
#define _mm512_or_si512 stand::either
#define _mm512_reduce_add_ps stand::total
#define _mm512_reduce_max_ps stand::largest
#define _mm512_set1_epi32 stand::splat_word
#define _mm512_set1_ps stand::splat
#define _mm512_setzero_ps stand::zero
#define _mm512_setzero_si512 stand::no_words
#define _mm512_shuffle_i32x4 stand::shuffle
#define _mm512_slli_epi32 stand::shift_left
#define _mm512_store_si512 stand::write_aligned<__m512i>
#define _mm512_storeu_ps stand::write<__m512>
#define _mm512_sub_ps stand::subtract
#define _mm512_unpackhi_epi32 stand::high_words
#define _mm512_unpackhi_epi64 stand::high_pairs
#define _mm512_unpacklo_epi32 stand::low_words
#define _mm512_unpacklo_epi64 stand::low_pairs
#define _tile_dpbf16ps stand::dots_of_tiles
#define _tile_loadconfig stand::configure
#define _tile_loadd stand::read_tile
#define _tile_release stand::release
#define _tile_stored stand::write_tile
#define _tile_zero stand::clear_tile
