// Rotary position embeddings, x cos + (-x2, x1) sin of a head's halves x1 and x2, and their gradients: one pass each.

#include "vectors.h"

#ifdef SERVED
namespace {

// x and out [tokens, heads, d], cos and sin [tokens, d]; `back`: of the gradient by what came out, that by what went in.
template <class T>
void rotate(const T* x, T* out, const float* cos, const float* sin, int64_t tokens, int64_t heads, int64_t d, bool back,
            int32_t threads) {
    const int64_t half_d = d / 2;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t j = 0; j < half_d; j += WIDTH) {
            const int64_t left = half_d - j;
            const float *c = cos + t * d + j, *s = sin + t * d + j;
            const vec c1 = read(c, left), c2 = read(c + half_d, left);
            vec s1 = read(s, left), s2 = read(s + half_d, left);
            if (back) {
                const vec first = s1;
                s1 = splat(0.0f) - s2;
                s2 = splat(0.0f) - first;
            }
            for (int64_t h = 0; h < heads; h++) {
                const int64_t at = (t * heads + h) * d + j;
                const vec x1 = read(x + at, left), x2 = read(x + at + half_d, left);
                write(out + at, x1 * c1 - x2 * s1, left);
                write(out + at + half_d, x2 * c2 + x1 * s2, left);
            }
        }
}

}  // namespace

extern "C" void prefdistill_rotary_float(const float* x, float* out, const float* cos, const float* sin, int64_t tokens,
                                         int64_t heads, int64_t d, int32_t back, int32_t threads) {
    rotate(x, out, cos, sin, tokens, heads, d, back, threads);
}

#ifdef FAST
extern "C" void prefdistill_rotary_half(const half* x, half* out, const float* cos, const float* sin, int64_t tokens,
                                        int64_t heads, int64_t d, int32_t back, int32_t threads) {
    rotate(x, out, cos, sin, tokens, heads, d, back, threads);
}
#endif
#endif
