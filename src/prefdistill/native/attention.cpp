// Attention over packed trees for CPUs with bfloat16 products (AMX, or AVX-512 BF16), forward and backward.
//
// Scores live in a cache, a few rows or keys at a time, and never in memory; the forward pass keeps the logarithm of each
// row's sum, from which the backward pass makes the probabilities again.

#include <cmath>

#include "products.h"

// 0: this machine lacks the instructions; 1: AVX2, float32; 2: AVX-512 BF16, bfloat16 too; 3: by AMX.
extern "C" int prefdistill_instructions() {
#ifdef TILES
    if (syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0) return 3;
#endif
#if defined(FAST)
    return 2;
#elif defined(SERVED)
    return 1;
#else
    return 0;
#endif
}

#ifdef FAST
namespace {

constexpr int64_t ROWS = 32;   // queries at a time
constexpr int64_t KEYS = 128;  // at a time in the backward pass

// x + bias of keys [key, key + 16) for query `row`; -inf beyond the last key.
__m512 biased(__m512 x, const Block& b, const Shape& s, int64_t row, int64_t key) {
    const __m512 never = _mm512_set1_ps(-INFINITY);
    int64_t left = s.keys - key;
    __mmask16 real = left >= 16 ? 0xffff : left <= 0 ? 0 : (__mmask16)((1u << left) - 1);
    int64_t skip = key < s.seen ? s.seen - key : 0;  // keys of these 16 that stand before the biased ones
    __mmask16 hidden = skip >= 16 ? 0 : real & (__mmask16)(0xffffu << skip);
    if (hidden) {
        __m256i bias = _mm256_maskz_loadu_epi16(hidden, b.hidden + row * b.width + key - s.seen);
        x = _mm512_add_ps(x, wide(bias));
    }
    return _mm512_mask_mov_ps(never, real, x);
}

struct ForwardRoom {
    int64_t ld;
    Room<half> columns, rows, q, p;
    Room<float> scores, sums;
    ForwardRoom(int64_t keys, int64_t d)
        : ld(keys + 16),
          columns(keys * d),
          rows(keys * d),
          q(ROWS * d),
          p(ROWS * (keys + 32)),
          scores(ROWS * ld),
          sums(ROWS * d) {}
};

void forward_block(const Work<half>& w, const Block& b, int64_t group, ForwardRoom& room) {
    const Shape s(b);
    const int64_t d = w.d, ldp = s.padded + 32;
    pack_columns(s.padded, d, keys_of(w.k, b, s, group), room.columns);
    pack_rows(s.padded, d, keys_of(w.v, b, s, group), room.rows);
    const float c = w.scale * LOG2E;
    for (int64_t m = 0; m < s.queries; m += ROWS) {
        const int64_t limit = limit_of(b, s, m, ROWS), count = s.queries - m < ROWS ? s.queries - m : ROWS;
        for (int64_t g = 0; g < w.share; g++) {
            const int64_t head = group * w.share + g;
            for (int64_t r = 0; r < ROWS; r++) {
                half* to = room.q + r * d;
                if (r < count)
                    std::memcpy(to, w.q.at + (b.start + m + r) * w.q.token + head * w.q.head, d * sizeof(half));
                else
                    std::memset(to, 0, d * sizeof(half));
            }
            product(w.tiles, ROWS, limit, d, room.q, d, room.columns, d * 16, room.scores, room.ld, false);
            float sums[ROWS];
            for (int64_t r = 0; r < count; r++) {
                float* x = room.scores + r * room.ld;
                half* p = room.p + r * ldp;
                __m512 top = _mm512_set1_ps(-INFINITY);
                int64_t j = 0;
                for (; j + 16 <= s.seen && j < limit; j += 16) top = _mm512_max_ps(top, _mm512_loadu_ps(x + j));
                for (; j < limit; j += 16) {
                    __m512 y = biased(_mm512_loadu_ps(x + j), b, s, m + r, j);
                    _mm512_storeu_ps(x + j, y);
                    top = _mm512_max_ps(top, y);
                }
                const float most = _mm512_reduce_max_ps(top) * c;
                const __m512 shift = _mm512_set1_ps(most), factor = _mm512_set1_ps(c);
                __m512 sum = _mm512_setzero_ps();
                for (j = 0; j < limit; j += 16) {
                    __m512 e = exp2_16(_mm512_fmsub_ps(_mm512_loadu_ps(x + j), factor, shift));
                    sum = _mm512_add_ps(sum, e);
                    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + j), narrow(e));
                }
                sums[r] = _mm512_reduce_add_ps(sum);
                w.kept[2 * ((b.start + m + r) * w.groups * w.share + head)] = most + std::log2(sums[r]);
            }
            for (int64_t r = count; r < ROWS; r++) std::memset(room.p + r * ldp, 0, limit * sizeof(half));
            product(w.tiles, ROWS, d, limit, room.p, ldp, room.rows, s.padded * 16, room.sums, d, false);
            for (int64_t r = 0; r < count; r++) {
                half* to = w.out.at + (b.start + m + r) * w.out.token + head * w.out.head;
                const __m512 share = _mm512_set1_ps(1.0f / sums[r]);
                for (int64_t j = 0; j < d; j += 16)
                    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + j),
                                        narrow(_mm512_mul_ps(_mm512_load_ps(room.sums + r * d + j), share)));
            }
        }
    }
}

struct BackwardRoom {
    Room<half> k_columns, v_columns, k_rows, q, grad, q_across, grad_across, p_pairs, ds_pairs, ds;
    Room<float> scores, dp, dq, dk, dv, lse, delta;
    Room<int64_t> limits;
    BackwardRoom(int64_t m, int64_t d, int64_t share)
        : k_columns(KEYS * d),
          v_columns(KEYS * d),
          k_rows(KEYS * d),
          q(share * m * d),
          grad(share * m * d),
          q_across(share * m * d),
          grad_across(share * m * d),
          p_pairs(m * KEYS),
          ds_pairs(m * KEYS),
          ds(ROWS * (KEYS + 32)),
          scores(ROWS * (KEYS + 16)),
          dp(ROWS * (KEYS + 16)),
          dq(share * m * d),
          dk(d * (KEYS + 16)),
          dv(d * (KEYS + 16)),
          lse(share * m),
          delta(share * m),
          limits(m / ROWS + 1) {}
};

// Adds the transpose of x [d, n] to the keys' places in `sums` [tokens, groups, d].
void add_across(const Work<half>& w, const Block& b, const Shape& s, int64_t group, int64_t key, int64_t n, const float* x,
                int64_t ld, float* sums) {
    for (int64_t p = 0; p < n; p += 16)
        for (int64_t c = 0; c < w.d; c += 16) {
            __m512i r[16];
            for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(x + (c + i) * ld + p);
            transpose16(r);
            for (int i = 0; i < 16 && key + p + i < s.keys; i++) {
                float* to = sums + (token_of(b, s, key + p + i) * w.groups + group) * w.d + c;
                _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), _mm512_castsi512_ps(r[i])));
            }
        }
}

void backward_block(const Work<half>& w, const Block& b, int64_t group, BackwardRoom& room, float* dk, float* dv) {
    const Shape s(b);
    const int64_t d = w.d, m = up(s.queries, ROWS), lds = KEYS + 16, ldd = KEYS + 32, part = m * d;
    const float c = w.scale * LOG2E;
    const __m512 factor = _mm512_set1_ps(c), scale = _mm512_set1_ps(w.scale);
    for (int64_t g = 0; g < w.share; g++) {
        const int64_t head = group * w.share + g;
        auto queries_of = [&](const Heads<half>& x) {
            return [&, x](int64_t r) -> const half* {
                return r < s.queries ? x.at + (b.start + r) * x.token + head * x.head : nullptr;
            };
        };
        auto q = queries_of(w.q), grad = queries_of(w.grad), out = queries_of(w.out);
        transpose_rows(m, d, q, room.q_across + g * part);
        transpose_rows(m, d, grad, room.grad_across + g * part);
        for (int64_t r = 0; r < m; r++) {
            half *to_q = room.q + g * part + r * d, *to_grad = room.grad + g * part + r * d;
            if (r < s.queries) {
                std::memcpy(to_q, q(r), d * sizeof(half));
                std::memcpy(to_grad, grad(r), d * sizeof(half));
                __m512 sum = _mm512_setzero_ps();
                for (int64_t j = 0; j < d; j += 16) sum = _mm512_fmadd_ps(wide(grad(r) + j), wide(out(r) + j), sum);
                room.delta[g * m + r] = _mm512_reduce_add_ps(sum);
                room.lse[g * m + r] = w.kept[2 * ((b.start + r) * w.groups * w.share + head)];
            } else {
                std::memset(to_q, 0, d * sizeof(half));
                std::memset(to_grad, 0, d * sizeof(half));
                room.delta[g * m + r] = 0.0f;
                room.lse[g * m + r] = INFINITY;  // its probabilities come out as 0
            }
        }
    }
    std::memset(room.dq, 0, w.share * part * sizeof(float));
    for (int64_t r = 0; r < m; r += ROWS) room.limits[r / ROWS] = limit_of(b, s, r, ROWS);
    for (int64_t from = 0; from < s.padded; from += KEYS) {
        const int64_t n = s.padded - from < KEYS ? s.padded - from : KEYS;
        int64_t first = 0;  // query that sees one of these keys
        while (first < m && room.limits[first / ROWS] <= from) first += ROWS;
        if (first >= m) continue;
        pack_columns(n, d, keys_of(w.k, b, s, group, from), room.k_columns);
        pack_columns(n, d, keys_of(w.v, b, s, group, from), room.v_columns);
        pack_rows(n, d, keys_of(w.k, b, s, group, from), room.k_rows);
        for (int64_t g = 0; g < w.share; g++) {
            for (int64_t at = first; at < m; at += ROWS) {
                product(w.tiles, ROWS, n, d, room.q + g * part + at * d, d, room.k_columns, d * 16, room.scores, lds, false);
                product(w.tiles, ROWS, n, d, room.grad + g * part + at * d, d, room.v_columns, d * 16, room.dp, lds, false);
                for (int64_t r = 0; r < ROWS; r += 2)
                    for (int64_t j = 0; j < n; j += 16) {
                        __m256i p[2], ds[2];
                        for (int h = 0; h < 2; h++) {
                            const int64_t row = at + r + h;
                            __m512 x = _mm512_loadu_ps(room.scores + (r + h) * lds + j);
                            if (from + j + 16 > s.seen && row < s.queries) x = biased(x, b, s, row, from + j);
                            __m512 e = exp2_16(_mm512_fmsub_ps(x, factor, _mm512_set1_ps(room.lse[g * m + row])));
                            __m512 y = _mm512_sub_ps(_mm512_loadu_ps(room.dp + (r + h) * lds + j),
                                                     _mm512_set1_ps(room.delta[g * m + row]));
                            p[h] = narrow(e);
                            ds[h] = narrow(_mm512_mul_ps(_mm512_mul_ps(e, y), scale));
                            _mm256_storeu_si256(reinterpret_cast<__m256i*>(room.ds + (r + h) * ldd + j), ds[h]);
                        }
                        const int64_t place = j * m + (at + r) * 16;
                        _mm512_store_si512(room.p_pairs + place, pairs(p[0], p[1]));
                        _mm512_store_si512(room.ds_pairs + place, pairs(ds[0], ds[1]));
                    }
                product(w.tiles, ROWS, d, n, room.ds, ldd, room.k_rows, n * 16, room.dq + g * part + at * d, d, true);
            }
            const half *grads = room.grad_across + g * part + first, *queries = room.q_across + g * part + first;
            product(w.tiles, d, n, m - first, grads, m, room.p_pairs + first * 16, m * 16, room.dv, lds, g > 0);
            product(w.tiles, d, n, m - first, queries, m, room.ds_pairs + first * 16, m * 16, room.dk, lds, g > 0);
        }
        add_across(w, b, s, group, from, n, room.dk, lds, dk);
        add_across(w, b, s, group, from, n, room.dv, lds, dv);
    }
    for (int64_t g = 0; g < w.share; g++)
        for (int64_t r = 0; r < s.queries; r++) {
            half* to = w.dq.at + (b.start + r) * w.dq.token + (group * w.share + g) * w.dq.head;
            for (int64_t j = 0; j < d; j += 16)
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + j),
                                    narrow(_mm512_load_ps(room.dq + g * part + r * d + j)));
        }
}

struct Forward {
    const Work<half>& w;
    Thread thread;
    ForwardRoom room;
    explicit Forward(const Work<half>& w)
        : w(w), thread(w.tiles), room(most(w, [](const Shape& s) { return s.padded; }), w.d) {}
    void operator()(const Block& b, int64_t group) { forward_block(w, b, group, room); }
};

struct Backward {
    const Work<half>& w;
    Thread thread;
    BackwardRoom room;
    explicit Backward(const Work<half>& w)
        : w(w), thread(w.tiles), room(most(w, [](const Shape& s) { return up(s.queries, ROWS); }), w.d, w.share) {}
    void operator()(const Block& b, int64_t group, float* dk, float* dv) { backward_block(w, b, group, room, dk, dv); }
    static void put(half* to, const float* x) { write(to, load(x), 16); }
};

}  // namespace

extern "C" int32_t prefdistill_forward_half(const Work<half>* work) { return forward<Forward>(*work); }
extern "C" int32_t prefdistill_backward_half(const Work<half>* work) { return backward<Backward>(*work); }
#endif
