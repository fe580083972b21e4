// Products of bfloat16 with sums in float32, by AMX tiles or AVX-512 BF16, and what lays their sides out.
//
// Products take their right side in panels of 16 columns with rows in pairs, as both instruction sets want it:
// panel[k / 2][16][2].
#pragma once

#include <cstring>

#include "blocks.h"

#if defined(FAST) && defined(__AMX_BF16__) && defined(__linux__)
#define TILES 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

#ifdef FAST
namespace {

// -- pieces of 16 x 16 -----------------------------------------------------------------------------------------------

__m512i pairs(__m256i low, __m256i high) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

void transpose16(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
            r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
        }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
        r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
        r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
    }
}

// -- packing ----------------------------------------------------------------------------------------------------------

// Rows of x as columns of a right side: panels [rows / 16][d / 2][16][2]. `row` gives a row, or null for zeros.
template <class Row>
void pack_columns(int64_t rows, int64_t d, Row row, half* to) {
    for (int64_t p = 0; p < rows; p += 16)
        for (int64_t c = 0; c < d; c += 32) {
            __m512i r[16];
            for (int i = 0; i < 16; i++) {
                const half* x = row(p + i);
                r[i] = x ? _mm512_loadu_si512(x + c) : _mm512_setzero_si512();
            }
            transpose16(r);
            for (int i = 0; i < 16; i++) _mm512_store_si512(to + p * d + (c / 2 + i) * 32, r[i]);
        }
}

// Rows of x as rows of a right side: panels [d / 16][rows / 2][16][2].
template <class Row>
void pack_rows(int64_t rows, int64_t d, Row row, half* to) {
    const __m256i none = _mm256_setzero_si256();
    for (int64_t r = 0; r < rows; r += 2) {
        const half *a = row(r), *b = row(r + 1);
        for (int64_t c = 0; c < d; c += 16) {
            __m256i low = a ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a + c)) : none;
            __m256i high = b ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + c)) : none;
            _mm512_store_si512(to + c * rows + r * 16, pairs(low, high));
        }
    }
}

// The transpose [d, rows] of rows of x, as a left side; rows in multiples of 32.
template <class Row>
void transpose_rows(int64_t rows, int64_t d, Row row, half* to) {
    const __m256i none = _mm256_setzero_si256();
    for (int64_t p = 0; p < rows; p += 32)
        for (int64_t c = 0; c < d; c += 16) {
            __m512i r[16];
            for (int i = 0; i < 16; i++) {
                const half *a = row(p + 2 * i), *b = row(p + 2 * i + 1);
                r[i] = pairs(a ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a + c)) : none,
                             b ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + c)) : none);
            }
            transpose16(r);
            for (int i = 0; i < 16; i++) _mm512_store_si512(to + (c + i) * rows + p, r[i]);
        }
}

// -- products ---------------------------------------------------------------------------------------------------------

#ifdef TILES
struct alignas(64) TileConfig {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
    TileConfig() {
        for (int i = 0; i < 8; i++) bytes[i] = 64, rows[i] = 16;
    }
};

void product_tiles(int64_t m, int64_t n, int64_t k, const half* a, int64_t lda, const half* b, int64_t panel, float* c,
                   int64_t ldc, bool add) {
    for (int64_t j = 0; j < n; j += 32)
        for (int64_t i = 0; i < m; i += 32) {
            float *c0 = c + i * ldc + j, *c1 = c0 + 16 * ldc;
            if (add) {
                _tile_loadd(0, c0, ldc * 4);
                _tile_loadd(1, c0 + 16, ldc * 4);
                _tile_loadd(2, c1, ldc * 4);
                _tile_loadd(3, c1 + 16, ldc * 4);
            } else {
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
            }
            const half *a0 = a + i * lda, *a1 = a0 + 16 * lda, *b0 = b + j / 16 * panel, *b1 = b0 + panel;
            for (int64_t s = 0; s < k; s += 32) {
                _tile_loadd(4, a0 + s, lda * 2);
                _tile_loadd(6, b0 + s * 16, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(7, b1 + s * 16, 64);
                _tile_dpbf16ps(1, 4, 7);
                _tile_loadd(5, a1 + s, lda * 2);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, c0, ldc * 4);
            _tile_stored(1, c0 + 16, ldc * 4);
            _tile_stored(2, c1, ldc * 4);
            _tile_stored(3, c1 + 16, ldc * 4);
        }
}
#endif

void product_vectors(int64_t m, int64_t n, int64_t k, const half* a, int64_t lda, const half* b, int64_t panel, float* c,
                     int64_t ldc, bool add) {
    constexpr int R = 8;
    for (int64_t j = 0; j < n; j += 32)
        for (int64_t i = 0; i < m; i += R) {
            __m512 sum[R][2];
            for (int r = 0; r < R; r++)
                for (int h = 0; h < 2; h++)
                    sum[r][h] = add ? _mm512_loadu_ps(c + (i + r) * ldc + j + 16 * h) : _mm512_setzero_ps();
            const half *b0 = b + j / 16 * panel, *b1 = b0 + panel;
            for (int64_t s = 0; s < k; s += 2) {
                __m512bh x0 = (__m512bh)_mm512_load_si512(b0 + s * 16), x1 = (__m512bh)_mm512_load_si512(b1 + s * 16);
                for (int r = 0; r < R; r++) {
                    int32_t pair;
                    std::memcpy(&pair, a + (i + r) * lda + s, 4);
                    __m512bh y = (__m512bh)_mm512_set1_epi32(pair);
                    sum[r][0] = _mm512_dpbf16_ps(sum[r][0], x0, y);
                    sum[r][1] = _mm512_dpbf16_ps(sum[r][1], x1, y);
                }
            }
            for (int r = 0; r < R; r++)
                for (int h = 0; h < 2; h++) _mm512_storeu_ps(c + (i + r) * ldc + j + 16 * h, sum[r][h]);
        }
}

// c [m, n] (+)= a [m, k] b [k, n]; m, n and k in multiples of 32, b in panels.
void product(bool tiles, int64_t m, int64_t n, int64_t k, const half* a, int64_t lda, const half* b, int64_t panel,
             float* c, int64_t ldc, bool add) {
#ifdef TILES
    if (tiles) return product_tiles(m, n, k, a, lda, b, panel, c, ldc, add);
#endif
    product_vectors(m, n, k, a, lda, b, panel, c, ldc, add);
}

struct Thread {  // a thread's tile registers, given back at the end
    Flush flush;
    bool on;
    explicit Thread(bool tiles) : on(tiles) {
#ifdef TILES
        static const TileConfig config;
        if (on) _tile_loadconfig(&config);
#endif
    }
    ~Thread() {
#ifdef TILES
        if (on) _tile_release();
#endif
    }
};

}  // namespace
#endif
