// Attention over packed trees for CPUs with bfloat16 products (AMX, or AVX-512 BF16), forward and backward.
//
// The same blocks as attention.py: queries [start, stop) see keys [first, middle) and [own, stop), but for what a bias of
// 0 and -inf over the last `width` keys hides. Scores live in a cache, a few rows or keys at a time, and never in memory;
// the forward pass keeps the logarithm of each row's sum, from which the backward pass makes the probabilities again.
//
// A result hangs on the number of threads and on nothing else.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "products.h"

struct Block {
    int64_t start, stop, first, middle, own, width;
    const half* hidden;  // [stop - start, width]
};

struct Heads {  // a tensor [tokens, heads, d], its last dimension in one piece
    half* at;
    int64_t token, head;  // strides
};

struct Work {
    const Block* blocks;
    int64_t n, tokens, groups, share, d;  // share: query heads of a key head
    float scale;
    int32_t threads, tiles;  // tiles: whether to use AMX
    Heads q, k, v, out, grad, dq, dk, dv;
    float* lse;  // [tokens, query heads], in base 2
};

// 0: this machine lacks the instructions; 1: AVX-512 BF16; 2: AMX too.
extern "C" int prefdistill_instructions() {
#ifdef TILES
    if (syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0) return 2;
#endif
#ifdef FAST
    return 1;
#else
    return 0;
#endif
}

#ifdef FAST
namespace {

constexpr int64_t ROWS = 32;   // queries at a time
constexpr int64_t KEYS = 128;  // at a time in the backward pass

// -- blocks -----------------------------------------------------------------------------------------------------------

struct Shape {
    int64_t queries, keys, before, seen, padded;  // seen: keys that no bias hides; padded: keys, to multiples of 32
    explicit Shape(const Block& b)
        : queries(b.stop - b.start),
          keys(b.middle - b.first + b.stop - b.own),
          before(b.middle - b.first),
          seen(keys - b.width),
          padded(up(keys, 32)) {}
};

int64_t token_of(const Block& b, const Shape& s, int64_t key) {
    return key < s.before ? b.first + key : b.own + key - s.before;
}

// Row `key` of the block's keys from `from` on, or null beyond the last.
auto keys_of(const Heads& x, const Block& b, const Shape& s, int64_t group, int64_t from = 0) {
    return [&, group, from](int64_t key) -> const half* {
        key += from;
        return key < s.keys ? x.at + token_of(b, s, key) * x.token + group * x.head : nullptr;
    };
}

// The keys that queries [row, row + ROWS) see are all below this, a multiple of 32.
int64_t limit_of(const Block& b, const Shape& s, int64_t row) {
    int64_t last = 0;
    for (int64_t r = row; r < row + ROWS && r < s.queries; r++) {
        int64_t w = b.width;
        while (w > last && b.hidden[r * b.width + w - 1]) --w;
        last = w;
    }
    return up(s.seen + last, 32);
}

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

template <class Of>
int64_t most(const Work& w, Of of) {
    int64_t found = 0;
    for (int64_t i = 0; i < w.n; i++) found = std::max<int64_t>(found, of(Shape(w.blocks[i])));
    return found;
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

void forward_block(const Work& w, const Block& b, int64_t group, ForwardRoom& room) {
    const Shape s(b);
    const int64_t d = w.d, ldp = s.padded + 32;
    pack_columns(s.padded, d, keys_of(w.k, b, s, group), room.columns);
    pack_rows(s.padded, d, keys_of(w.v, b, s, group), room.rows);
    const float c = w.scale * LOG2E;
    for (int64_t m = 0; m < s.queries; m += ROWS) {
        const int64_t limit = limit_of(b, s, m), count = s.queries - m < ROWS ? s.queries - m : ROWS;
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
                w.lse[(b.start + m + r) * w.groups * w.share + head] = most + std::log2(sums[r]);
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
          delta(share * m) {}
};

// Adds the transpose of x [d, n] to the keys' places in `sums` [tokens, groups, d].
void add_across(const Work& w, const Block& b, const Shape& s, int64_t group, int64_t key, int64_t n, const float* x,
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

void backward_block(const Work& w, const Block& b, int64_t group, BackwardRoom& room, float* dk, float* dv) {
    const Shape s(b);
    const int64_t d = w.d, m = up(s.queries, ROWS), lds = KEYS + 16, ldd = KEYS + 32, part = m * d;
    const float c = w.scale * LOG2E;
    const __m512 factor = _mm512_set1_ps(c), scale = _mm512_set1_ps(w.scale);
    for (int64_t g = 0; g < w.share; g++) {
        const int64_t head = group * w.share + g;
        auto queries_of = [&](const Heads& x) {
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
                room.lse[g * m + r] = w.lse[(b.start + r) * w.groups * w.share + head];
            } else {
                std::memset(to_q, 0, d * sizeof(half));
                std::memset(to_grad, 0, d * sizeof(half));
                room.delta[g * m + r] = 0.0f;
                room.lse[g * m + r] = INFINITY;  // its probabilities come out as 0
            }
        }
    }
    std::memset(room.dq, 0, w.share * part * sizeof(float));
    std::vector<int64_t> limits;
    for (int64_t r = 0; r < m; r += ROWS) limits.push_back(limit_of(b, s, r));
    for (int64_t from = 0; from < s.padded; from += KEYS) {
        const int64_t n = s.padded - from < KEYS ? s.padded - from : KEYS;
        int64_t first = 0;  // query that sees one of these keys
        while (first < m && limits[first / ROWS] <= from) first += ROWS;
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

// The blocks of a tree, shared out to lanes that add up keys' gradients on their own.
std::vector<std::vector<std::vector<int64_t>>> lanes_of(const Work& w, int64_t lanes) {
    std::vector<std::vector<std::vector<int64_t>>> trees;
    std::vector<int64_t> load;
    for (int64_t i = 0; i < w.n; i++) {
        if (i == 0 || w.blocks[i].first != w.blocks[i - 1].first) {
            trees.emplace_back(lanes);
            load.assign(lanes, 0);
        }
        int64_t least = 0;
        for (int64_t l = 1; l < lanes; l++)
            if (load[l] < load[least]) least = l;
        trees.back()[least].push_back(i);
        load[least] += Shape(w.blocks[i]).queries * Shape(w.blocks[i]).padded;
    }
    return trees;
}

}  // namespace

extern "C" void prefdistill_forward(const Work* work) {
    const Work& w = *work;
    const int64_t keys = most(w, [](const Shape& s) { return s.padded; });
#pragma omp parallel num_threads(w.threads)
    {
        Thread thread(w.tiles);
        ForwardRoom room(keys, w.d);
#pragma omp for schedule(dynamic) collapse(2)
        for (int64_t i = 0; i < w.n; i++)
            for (int64_t group = 0; group < w.groups; group++) forward_block(w, w.blocks[i], group, room);
    }
}

extern "C" void prefdistill_backward(const Work* work) {
    const Work& w = *work;
    const int64_t queries = most(w, [](const Shape& s) { return up(s.queries, ROWS); }), size = w.tokens * w.groups * w.d;
    int64_t trees = 0;
    for (int64_t i = 0; i < w.n; i++) trees += i == 0 || w.blocks[i].first != w.blocks[i - 1].first;
    int64_t lanes = (4 * w.threads + trees * w.groups - 1) / (trees * w.groups);
    if (w.threads == 1) lanes = 1;
    const auto shared = lanes_of(w, lanes);
    Room<float> dk(lanes * size), dv(lanes * size);
#pragma omp parallel num_threads(w.threads)
    {
        Thread thread(w.tiles);
        BackwardRoom room(queries, w.d, w.share);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < lanes * w.tokens; t++) {
            std::memset(dk + t * w.groups * w.d, 0, w.groups * w.d * sizeof(float));
            std::memset(dv + t * w.groups * w.d, 0, w.groups * w.d * sizeof(float));
        }
#pragma omp for schedule(dynamic) collapse(3)
        for (int64_t tree = 0; tree < trees; tree++)
            for (int64_t lane = 0; lane < lanes; lane++)
                for (int64_t group = 0; group < w.groups; group++)
                    for (int64_t i : shared[tree][lane])
                        backward_block(w, w.blocks[i], group, room, dk + lane * size, dv + lane * size);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < w.tokens; t++)
            for (int64_t group = 0; group < w.groups; group++)
                for (int64_t j = 0; j < w.d; j += 16) {
                    const int64_t at = (t * w.groups + group) * w.d + j;
                    __m512 x = _mm512_loadu_ps(dk + at), y = _mm512_loadu_ps(dv + at);
                    for (int64_t lane = 1; lane < lanes; lane++) {
                        x = _mm512_add_ps(x, _mm512_loadu_ps(dk + lane * size + at));
                        y = _mm512_add_ps(y, _mm512_loadu_ps(dv + lane * size + at));
                    }
                    _mm256_storeu_si256(reinterpret_cast<__m256i*>(w.dk.at + t * w.dk.token + group * w.dk.head + j), narrow(x));
                    _mm256_storeu_si256(reinterpret_cast<__m256i*>(w.dv.at + t * w.dv.token + group * w.dv.head + j), narrow(y));
                }
    }
}
#endif
