// silu(gate) * up of bfloat16, and its gradients: one pass over memory each way.

#include "vectors.h"

#ifdef FAST
namespace {

constexpr int64_t PIECE = 4096;  // numbers that a thread takes at a time

// 1 / (1 + e^-x); 0 where that is below 2^-125.
__m512 sigmoid(__m512 x) {
    const __m512 y = _mm512_mul_ps(x, _mm512_set1_ps(-LOG2E)), most = _mm512_set1_ps(125.0f), one = _mm512_set1_ps(1.0f);
    const __mmask16 some = _mm512_cmp_ps_mask(y, most, _CMP_NGE_UQ);  // what is not a number stays so
    return _mm512_maskz_div_ps(some, one, _mm512_add_ps(one, exp2_16(_mm512_min_ps(most, y))));
}

template <class Sixteen>
void each(int64_t n, int32_t threads, Sixteen sixteen) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t from = 0; from < n; from += PIECE) {
        const int64_t to = from + PIECE < n ? from + PIECE : n;
        for (int64_t i = from; i < to; i += 16) sixteen(i, to - i >= 16 ? (__mmask16)0xffff : (__mmask16)((1u << (to - i)) - 1));
    }
}

__m512 read(__mmask16 m, const half* x) { return wide(_mm256_maskz_loadu_epi16(m, x)); }
void write(__mmask16 m, half* x, __m512 y) { _mm256_mask_storeu_epi16(x, m, narrow(y)); }

}  // namespace

extern "C" void prefdistill_gate(const half* gate, const half* up, half* out, int64_t n, int32_t threads) {
    each(n, threads, [=](int64_t i, __mmask16 m) {
        const __m512 x = read(m, gate + i);
        write(m, out + i, _mm512_mul_ps(_mm512_mul_ps(x, sigmoid(x)), read(m, up + i)));
    });
}

extern "C" void prefdistill_gate_backward(const half* gate, const half* up, const half* grad, half* dgate, half* dup,
                                          int64_t n, int32_t threads) {
    const __m512 one = _mm512_set1_ps(1.0f);
    each(n, threads, [=](int64_t i, __mmask16 m) {
        const __m512 x = read(m, gate + i), y = read(m, up + i), g = read(m, grad + i), s = sigmoid(x);
        const __m512 silu = _mm512_mul_ps(x, s);
        // d silu = s (1 + x (1 - s))
        const __m512 slope = _mm512_mul_ps(s, _mm512_fmadd_ps(x, _mm512_sub_ps(one, s), one));
        write(m, dgate + i, _mm512_mul_ps(_mm512_mul_ps(g, y), slope));
        write(m, dup + i, _mm512_mul_ps(g, silu));
    });
}
#endif
