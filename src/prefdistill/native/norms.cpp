// RMS norms of float32 states to bfloat16, and their gradients: one pass over memory each way.

#include <cmath>
#include <cstring>

#include "vectors.h"

#ifdef FAST
namespace {

__mmask16 mask_of(int64_t left) { return left >= 16 ? (__mmask16)0xffff : (__mmask16)((1u << left) - 1); }

}  // namespace

// out = weight * x * scale, scale = 1 / sqrt(mean(x^2) + eps); x [rows, d], scale [rows].
extern "C" void prefdistill_norm(const float* x, const float* weight, half* out, float* scale, int64_t rows, int64_t d,
                                 float eps, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const float* row = x + r * d;
        __m512 sum = _mm512_setzero_ps();
        for (int64_t j = 0; j < d; j += 16) {
            const __m512 y = _mm512_maskz_loadu_ps(mask_of(d - j), row + j);
            sum = _mm512_fmadd_ps(y, y, sum);
        }
        scale[r] = 1.0f / std::sqrt(_mm512_reduce_add_ps(sum) / d + eps);
        const __m512 s = _mm512_set1_ps(scale[r]);
        for (int64_t j = 0; j < d; j += 16) {
            const __mmask16 m = mask_of(d - j);
            const __m512 y = _mm512_mul_ps(_mm512_maskz_loadu_ps(m, row + j), s);
            _mm256_mask_storeu_epi16(out + r * d + j, m, narrow(_mm512_mul_ps(y, _mm512_maskz_loadu_ps(m, weight + j))));
        }
    }
}

// dx = scale (w g - n mean(w g n)), n = x scale; dweight = sum g n over rows (null: not wanted).
// A thread sums up its own rows, so dweight hangs on the number of threads; `parts` [threads, d] holds those sums.
extern "C" void prefdistill_norm_backward(const float* x, const float* weight, const float* scale, const half* grad,
                                          float* dx, float* dweight, float* parts, int64_t rows, int64_t d,
                                          int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int32_t t = 0; t < threads; t++) {
        float* part = parts + t * d;
        if (dweight) std::memset(part, 0, d * sizeof(float));
        for (int64_t r = rows * t / threads; r < rows * (t + 1) / threads; r++) {
            const float* row = x + r * d;
            const half* g = grad + r * d;
            const __m512 s = _mm512_set1_ps(scale[r]);
            __m512 along = _mm512_setzero_ps();
            for (int64_t j = 0; j < d; j += 16) {
                const __mmask16 m = mask_of(d - j);
                const __m512 n = _mm512_mul_ps(_mm512_maskz_loadu_ps(m, row + j), s);
                const __m512 gn = _mm512_mul_ps(wide(_mm256_maskz_loadu_epi16(m, g + j)), n);
                along = _mm512_fmadd_ps(gn, _mm512_maskz_loadu_ps(m, weight + j), along);
                if (dweight) _mm512_mask_storeu_ps(part + j, m, _mm512_add_ps(_mm512_maskz_loadu_ps(m, part + j), gn));
            }
            const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(along) / d);
            for (int64_t j = 0; j < d; j += 16) {
                const __mmask16 m = mask_of(d - j);
                const __m512 n = _mm512_mul_ps(_mm512_maskz_loadu_ps(m, row + j), s);
                const __m512 wg = _mm512_mul_ps(wide(_mm256_maskz_loadu_epi16(m, g + j)), _mm512_maskz_loadu_ps(m, weight + j));
                _mm512_mask_storeu_ps(dx + r * d + j, m, _mm512_mul_ps(_mm512_fnmadd_ps(n, mean, wg), s));
            }
        }
    }
    if (dweight)
        for (int64_t j = 0; j < d; j++) {
            float sum = 0.0f;
            for (int32_t t = 0; t < threads; t++) sum += parts[t * d + j];
            dweight[j] = sum;
        }
}
#endif
