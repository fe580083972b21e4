// Products of float32 in registers, and what lays their right sides out: panels of PANEL columns, [columns / PANEL][k][PANEL].
#pragma once

#include "blocks.h"

#ifdef SERVED
namespace {

constexpr int64_t PANEL = 2 * WIDTH;
constexpr int PIECE = WIDTH == 16 ? 12 : 6;  // rows whose sums fit into the registers

// Eight rows x of eight numbers as eight columns y; x is written over.
inline void turn(__m256* x, __m256* y) {
    for (int i = 0; i < 8; i += 2) {
        y[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
        y[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            x[i + 2 * j] = _mm256_shuffle_ps(y[i + j], y[i + 2 + j], 0x44);
            x[i + 2 * j + 1] = _mm256_shuffle_ps(y[i + j], y[i + 2 + j], 0xee);
        }
    for (int i = 0; i < 4; i++) {
        y[i] = _mm256_permute2f128_ps(x[i], x[4 + i], 0x20);
        y[4 + i] = _mm256_permute2f128_ps(x[i], x[4 + i], 0x31);
    }
}

// Rows of x as columns of a right side. `row` gives a row, or null for zeros; rows in multiples of PANEL, d of 8.
template <class Row>
void pack_columns(int64_t rows, int64_t d, Row row, float* to) {
    static const float none[8] = {};
    for (int64_t p = 0; p < rows; p += 8) {
        float* panel = to + p / PANEL * PANEL * d + p % PANEL;
        const float* from[8];
        for (int i = 0; i < 8; i++) from[i] = row(p + i);
        for (int64_t c = 0; c < d; c += 8) {
            __m256 r[8], t[8];
            for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_ps(from[i] ? from[i] + c : none);
            turn(r, t);
            for (int i = 0; i < 8; i++) _mm256_storeu_ps(panel + (c + i) * PANEL, t[i]);
        }
    }
}

// Rows of x as rows of a right side; d in multiples of PANEL.
template <class Row>
void pack_rows(int64_t rows, int64_t d, Row row, float* to) {
    for (int64_t r = 0; r < rows; r++) {
        const float* x = row(r);
        for (int64_t c = 0; c < d; c += PANEL)
            for (int64_t j = 0; j < PANEL; j += WIDTH)
                store(to + c * rows + r * PANEL + j, x ? load(x + c + j) : splat(0.0f));
    }
}

// Element (i, s) of a left side stands at a[i * row + s * step].
template <int ROWS>
void piece(int64_t k, const float* a, int64_t row, int64_t step, const float* b, float* c, int64_t ldc, bool add) {
    vec sum[ROWS][2];
    // Unrolled by hand's hint: only then do the sums stay in registers.
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; r++) {
        sum[r][0] = splat(0.0f);
        sum[r][1] = splat(0.0f);
    }
#pragma GCC unroll 4
    for (int64_t s = 0; s < k; s++) {
        const vec x = load(b + s * PANEL), y = load(b + s * PANEL + WIDTH);
        const float *a0 = a + s * step, *a3 = a0 + 3 * row, *a6 = a0 + 6 * row, *a9 = a0 + 9 * row;
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; r++) {
            const float* from = r < 3 ? a0 : r < 6 ? a3 : r < 9 ? a6 : a9;
            const vec z = splat(from[r % 3 * row]);
            sum[r][0] = fma(z, x, sum[r][0]);
            sum[r][1] = fma(z, y, sum[r][1]);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; r++) {
        // Here, not before: added one by one to a large sum, a thousand products would each be rounded by its size.
        store(c + r * ldc, add ? load(c + r * ldc) + sum[r][0] : sum[r][0]);
        store(c + r * ldc + WIDTH, add ? load(c + r * ldc + WIDTH) + sum[r][1] : sum[r][1]);
    }
}

// The last m < ROWS rows.
template <int ROWS>
void rest(int64_t m, int64_t k, const float* a, int64_t row, int64_t step, const float* b, float* c, int64_t ldc, bool add) {
    if constexpr (ROWS > 1) {
        if (m == ROWS - 1) return piece<ROWS - 1>(k, a, row, step, b, c, ldc, add);
        rest<ROWS - 1>(m, k, a, row, step, b, c, ldc, add);
    }
}

// c [m, n] (+)= a [m, k] b [k, n]; n in multiples of PANEL, b in panels `panel` numbers apart.
void product(int64_t m, int64_t n, int64_t k, const float* a, int64_t row, int64_t step, const float* b, int64_t panel,
             float* c, int64_t ldc, bool add) {
    for (int64_t j = 0; j < n; j += PANEL) {
        const float* right = b + j / PANEL * panel;
        int64_t i = 0;
        for (; i + PIECE <= m; i += PIECE) piece<PIECE>(k, a + i * row, row, step, right, c + i * ldc + j, ldc, add);
        rest<PIECE>(m - i, k, a + i * row, row, step, right, c + i * ldc + j, ldc, add);
    }
}

}  // namespace
#endif
