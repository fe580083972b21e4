// silu(gate) * up and its gradients: one pass over memory each way.

#include "vectors.h"

#ifdef SERVED
namespace {

constexpr int64_t PIECE = 4096;  // numbers that a thread takes at a time

// 1 / (1 + e^-x); 0 where that is below 2^-125.
vec sigmoid(vec x) {
    const vec y = x * splat(-LOG2E), one = splat(1.0f);
    // Second operands of smaller() are what comes out where one is not a number.
    const vec slope = one / (one + exp2_whole(smaller(splat(126.0f), y)));
    return where_not_below(x, -125.0f / LOG2E, slope);
}

template <class Some>
void each(int64_t n, int32_t threads, Some some) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t from = 0; from < n; from += PIECE) {
        const int64_t to = from + PIECE < n ? from + PIECE : n;
        for (int64_t i = from; i < to; i += WIDTH) some(i, to - i);
    }
}

template <class T>
void forward(const T* gate, const T* up, T* out, int64_t n, int32_t threads) {
    each(n, threads, [=](int64_t i, int64_t left) {
        const vec x = read(gate + i, left);
        write(out + i, x * sigmoid(x) * read(up + i, left), left);
    });
}

template <class T>
void backward(const T* gate, const T* up, const T* grad, T* dgate, T* dup, int64_t n, int32_t threads) {
    each(n, threads, [=](int64_t i, int64_t left) {
        const vec x = read(gate + i, left), y = read(up + i, left), g = read(grad + i, left), s = sigmoid(x);
        // d silu = s (1 + x (1 - s))
        const vec one = splat(1.0f), slope = s * fma(x, one - s, one);
        write(dgate + i, g * y * slope, left);
        write(dup + i, g * (x * s), left);
    });
}

}  // namespace

extern "C" void prefdistill_gate_float(const float* gate, const float* up, float* out, int64_t n, int32_t threads) {
    forward(gate, up, out, n, threads);
}

extern "C" void prefdistill_gate_backward_float(const float* gate, const float* up, const float* grad, float* dgate,
                                                float* dup, int64_t n, int32_t threads) {
    backward(gate, up, grad, dgate, dup, n, threads);
}

#ifdef FAST
extern "C" void prefdistill_gate_half(const half* gate, const half* up, half* out, int64_t n, int32_t threads) {
    forward(gate, up, out, n, threads);
}

extern "C" void prefdistill_gate_backward_half(const half* gate, const half* up, const half* grad, half* dgate, half* dup,
                                               int64_t n, int32_t threads) {
    backward(gate, up, grad, dgate, dup, n, threads);
}
#endif
#endif
