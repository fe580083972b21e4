// Attention over packed trees in float32, forward and backward: what attention.cpp does in bfloat16.

#include <cmath>

#include "products_float.h"

#ifdef SERVED
namespace {

constexpr int64_t ROWS = 24;  // queries at a time
constexpr int64_t KEYS = WIDTH == 16 ? 64 : 48;  // at a time in the backward pass
static_assert(KEYS % PANEL == 0 && 32 % PANEL == 0, "keys are packed by panels, and padded to 32");

// Adds query `row`'s bias to its scores x of keys [from, to); -inf beyond the last key.
void hide(float* x, const Block& b, const Shape& s, int64_t row, int64_t from, int64_t to) {
    const half* bias = b.hidden + row * b.width - s.seen;
    const int64_t end = std::min(to, s.keys);
    for (int64_t key = std::max(from, s.seen); key < end; key++) x[key - from] = bias[key] ? -INFINITY : x[key - from];
    for (int64_t key = std::max(from, end); key < to; key++) x[key - from] = -INFINITY;
}

struct Forward {
    const Work<float>& w;
    Flush flush;
    int64_t ld;  // of scores: an odd number of cache lines
    Room<float> columns, rows, scores, sums;
    explicit Forward(const Work<float>& w) : Forward(w, most(w, [](const Shape& s) { return s.padded; })) {}
    Forward(const Work<float>& w, int64_t keys)
        : w(w), ld(keys + 16), columns(keys * w.d), rows(keys * w.d), scores(ROWS * ld), sums(ROWS * w.d) {}

    void operator()(const Block& b, int64_t group) {
        const Shape s(b);
        const int64_t d = w.d;
        pack_columns(s.padded, d, keys_of(w.k, b, s, group), columns);
        pack_rows(s.padded, d, keys_of(w.v, b, s, group), rows);
        const float c = w.scale * LOG2E;
        for (int64_t m = 0; m < s.queries; m += ROWS) {
            const int64_t limit = limit_of(b, s, m, ROWS), count = std::min(ROWS, s.queries - m);
            for (int64_t head = group * w.share; head < (group + 1) * w.share; head++) {
                const float* q = w.q.at + (b.start + m) * w.q.token + head * w.q.head;
                product(count, limit, d, q, w.q.token, 1, columns, d * PANEL, scores, ld, false);
                float shares[ROWS];
                for (int64_t r = 0; r < count; r++) {
                    float* x = scores + r * ld;
                    hide(x, b, s, m + r, 0, limit);
                    vec top = load(x);
                    for (int64_t j = WIDTH; j < limit; j += WIDTH) top = larger(top, load(x + j));
                    const float most = largest(top);
                    const vec shift = splat(most), factor = splat(c);
                    vec sum = splat(0.0f);
                    for (int64_t j = 0; j < limit; j += WIDTH) {
                        const vec e = exp2_whole((load(x + j) - shift) * factor);
                        sum = sum + e;
                        store(x + j, e);
                    }
                    shares[r] = 1.0f / total(sum);
                    // Not the logarithm of their sum: its rounding would be that of scores of some tens.
                    float* kept = w.kept + 2 * ((b.start + m + r) * w.groups * w.share + head);
                    kept[0] = most;
                    kept[1] = shares[r];
                }
                product(count, d, limit, scores, ld, 1, rows, s.padded * PANEL, sums, d, false);
                for (int64_t r = 0; r < count; r++) {
                    float* to = w.out.at + (b.start + m + r) * w.out.token + head * w.out.head;
                    for (int64_t j = 0; j < d; j += WIDTH) store(to + j, load(sums + r * d + j) * splat(shares[r]));
                }
            }
        }
    }
};

struct Backward {
    static constexpr int64_t LD = KEYS + 16;
    const Work<float>& w;
    Flush flush;
    Room<float> k_columns, v_columns, k_rows, q_rows, grad_rows, p, ds, dq, delta;
    Room<int64_t> limits;
    explicit Backward(const Work<float>& w) : Backward(w, most(w, [](const Shape& s) { return s.queries; })) {}
    Backward(const Work<float>& w, int64_t m)
        : w(w),
          k_columns(KEYS * w.d),
          v_columns(KEYS * w.d),
          k_rows(KEYS * w.d),
          q_rows(w.share * m * w.d),
          grad_rows(w.share * m * w.d),
          p(m * LD),
          ds(m * LD),
          dq(w.share * m * w.d),
          delta(w.share * m),
          limits(m / ROWS + 1) {}

    void operator()(const Block& b, int64_t group, float* dk, float* dv) {
        const Shape s(b);
        const int64_t d = w.d, m = s.queries, part = m * d, heads = w.groups * w.share;
        const auto row_of = [&](const Heads<float>& x, int64_t g, int64_t r) {
            return x.at + (b.start + r) * x.token + (group * w.share + g) * x.head;
        };
        for (int64_t g = 0; g < w.share; g++) {
            pack_rows(m, d, [&](int64_t r) { return row_of(w.q, g, r); }, q_rows + g * part);
            pack_rows(m, d, [&](int64_t r) { return row_of(w.grad, g, r); }, grad_rows + g * part);
            for (int64_t r = 0; r < m; r++) {
                const float *grad = row_of(w.grad, g, r), *out = row_of(w.out, g, r);
                vec sum = splat(0.0f);
                for (int64_t j = 0; j < d; j += WIDTH) sum = fma(load(grad + j), load(out + j), sum);
                delta[g * m + r] = total(sum);
            }
        }
        std::memset(dq, 0, w.share * part * sizeof(float));
        for (int64_t r = 0; r < m; r += ROWS) limits[r / ROWS] = limit_of(b, s, r, ROWS);
        for (int64_t from = 0; from < s.padded; from += KEYS) {
            const int64_t n = std::min(KEYS, s.padded - from);
            int64_t first = 0;  // query that sees one of these keys
            while (first < m && limits[first / ROWS] <= from) first += ROWS;
            if (first >= m) continue;
            pack_columns(n, d, keys_of(w.k, b, s, group, from), k_columns);
            pack_columns(n, d, keys_of(w.v, b, s, group, from), v_columns);
            pack_rows(n, d, keys_of(w.k, b, s, group, from), k_rows);
            for (int64_t g = 0; g < w.share; g++) {
                for (int64_t at = first; at < m; at += ROWS) {
                    const int64_t count = std::min(ROWS, m - at);
                    float *x = p + at * LD, *y = ds + at * LD;
                    product(count, n, d, row_of(w.q, g, at), w.q.token, 1, k_columns, d * PANEL, x, LD, false);
                    product(count, n, d, row_of(w.grad, g, at), w.grad.token, 1, v_columns, d * PANEL, y, LD, false);
                    for (int64_t r = 0; r < count; r++)
                        slopes(x + r * LD, y + r * LD, b, s, at + r, from, n, delta[g * m + at + r],
                               w.kept + 2 * ((b.start + at + r) * heads + group * w.share + g));
                    product(count, d, n, y, LD, 1, k_rows, n * PANEL, dq + g * part + at * d, d, true);
                }
                add_up(b, s, group, from, n, m - first, p + first * LD, grad_rows + g * part + first * PANEL, part, dv);
                add_up(b, s, group, from, n, m - first, ds + first * LD, q_rows + g * part + first * PANEL, part, dk);
            }
        }
        for (int64_t g = 0; g < w.share; g++)
            for (int64_t r = 0; r < m; r++)
                std::memcpy(w.dq.at + (b.start + r) * w.dq.token + (group * w.share + g) * w.dq.head,
                            dq + g * part + r * d, d * sizeof(float));
    }

    // A row's scores x become probabilities, and their gradients y those of the scores.
    void slopes(float* x, float* y, const Block& b, const Shape& s, int64_t row, int64_t from, int64_t n, float delta,
                const float* kept) const {
        if (from + n > s.seen) hide(x, b, s, row, from, from + n);
        const vec factor = splat(w.scale * LOG2E), shift = splat(kept[0]), share = splat(kept[1]);
        const vec less = splat(delta), scale = splat(w.scale);
        for (int64_t j = 0; j < n; j += WIDTH) {
            const vec e = exp2_whole((load(x + j) - shift) * factor) * share;
            store(x + j, e);
            store(y + j, e * (load(y + j) - less) * scale);
        }
    }

    // Adds left' right to the sums of keys [from, from + n): left [rows, n], right [rows, d] in panels of `rows` queries
    // of all `part` / d. The keys lie in one piece before and one from `own` on.
    void add_up(const Block& b, const Shape& s, int64_t group, int64_t from, int64_t n, int64_t rows, const float* left,
                const float* right, int64_t part, float* sums) const {
        const int64_t end = std::min(from + n, s.keys), ld = w.groups * w.d, panel = part / w.d * PANEL;
        for (int64_t key = from; key < end;) {
            const int64_t stop = key < s.before ? std::min(end, s.before) : end;
            float* to = sums + token_of(b, s, key) * ld + group * w.d;
            product(stop - key, w.d, rows, left + key - from, 1, LD, right, panel, to, ld, true);
            key = stop;
        }
    }

    static void put(float* to, const float* x) { std::memcpy(to, x, 16 * sizeof(float)); }
};

}  // namespace

extern "C" int32_t prefdistill_forward_float(const Work<float>* work) { return forward<Forward>(*work); }
extern "C" int32_t prefdistill_backward_float(const Work<float>* work) { return backward<Backward>(*work); }
#endif
