// RMS norms of float32 states to float32 or bfloat16, and their gradients: one pass over memory each way.

#include <cmath>
#include <cstring>

#include "vectors.h"

#ifdef SERVED
namespace {

// out = weight * x * scale, scale = 1 / sqrt(mean(x^2) + eps); x [rows, d], scale [rows].
template <class T>
void forward(const float* x, const float* weight, T* out, float* scale, int64_t rows, int64_t d, float eps,
             int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const float* row = x + r * d;
        vec sum = splat(0.0f);
        for (int64_t j = 0; j < d; j += WIDTH) {
            const vec y = read(row + j, d - j);
            sum = fma(y, y, sum);
        }
        scale[r] = 1.0f / std::sqrt(total(sum) / d + eps);
        const vec s = splat(scale[r]);
        for (int64_t j = 0; j < d; j += WIDTH)
            write(out + r * d + j, read(row + j, d - j) * s * read(weight + j, d - j), d - j);
    }
}

// dx = scale (w g - n mean(w g n)), n = x scale; dweight = sum g n over rows (null: not wanted).
// A thread sums up its own rows, so dweight hangs on the number of threads; `parts` [threads, d] holds those sums.
template <class T>
void backward(const float* x, const float* weight, const float* scale, const T* grad, float* dx, float* dweight,
              float* parts, int64_t rows, int64_t d, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int32_t t = 0; t < threads; t++) {
        float* part = parts + t * d;
        if (dweight) std::memset(part, 0, d * sizeof(float));
        for (int64_t r = rows * t / threads; r < rows * (t + 1) / threads; r++) {
            const float* row = x + r * d;
            const T* g = grad + r * d;
            const vec s = splat(scale[r]);
            vec along = splat(0.0f);
            for (int64_t j = 0; j < d; j += WIDTH) {
                const vec gn = read(g + j, d - j) * (read(row + j, d - j) * s);
                along = fma(gn, read(weight + j, d - j), along);
                if (dweight) write(part + j, read(part + j, d - j) + gn, d - j);
            }
            const vec mean = splat(total(along) / d);
            for (int64_t j = 0; j < d; j += WIDTH) {
                const vec n = read(row + j, d - j) * s, wg = read(g + j, d - j) * read(weight + j, d - j);
                write(dx + r * d + j, (wg - n * mean) * s, d - j);
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

}  // namespace

extern "C" void prefdistill_norm_float(const float* x, const float* weight, float* out, float* scale, int64_t rows,
                                       int64_t d, float eps, int32_t threads) {
    forward(x, weight, out, scale, rows, d, eps, threads);
}

extern "C" void prefdistill_norm_backward_float(const float* x, const float* weight, const float* scale,
                                                const float* grad, float* dx, float* dweight, float* parts, int64_t rows,
                                                int64_t d, int32_t threads) {
    backward(x, weight, scale, grad, dx, dweight, parts, rows, d, threads);
}

#ifdef FAST
extern "C" void prefdistill_norm_half(const float* x, const float* weight, half* out, float* scale, int64_t rows,
                                      int64_t d, float eps, int32_t threads) {
    forward(x, weight, out, scale, rows, d, eps, threads);
}

extern "C" void prefdistill_norm_backward_half(const float* x, const float* weight, const float* scale, const half* grad,
                                               float* dx, float* dweight, float* parts, int64_t rows, int64_t d,
                                               int32_t threads) {
    backward(x, weight, scale, grad, dx, dweight, parts, rows, d, threads);
}
#endif
#endif
