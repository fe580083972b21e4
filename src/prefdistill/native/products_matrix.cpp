// Products of float32 matrices, several at once where they share a side.
//
// A thread lays a piece of a left side out in its second cache, and meets panels of right sides in the first. A number is
// added up in an order that hangs on the length of its sum alone, not on threads or on what else is asked for.

#include "products_float.h"

#if defined(SERVED) && !defined(LONG)
namespace {

constexpr int64_t LONGEST = 1 << 10;  // of a sum at a time
constexpr int64_t DEEP = 288;  // of it between two looks at the result: 18 KiB of a panel
constexpr int64_t LEFT = 1 << 16, RIGHT = 1 << 21;  // numbers laid out at a time, by a thread and for all

struct Side {  // a matrix [size, length], one of its strides 1
    const float* at;
    int64_t size, row, step;
};

struct Product {  // outs [lefts, rights] of [left's size, right's size] (+)= left right'
    const Side* lefts;
    int64_t n_lefts;
    const Side* rights;
    int64_t n_rights;
    float* const* outs;
    int64_t length;
    int32_t add, threads;
};

struct Panel {  // PANEL columns of a right side
    int64_t right, column;
};

struct Rows {  // what a thread takes at a time
    int64_t left, from, count;
};

struct Kept {  // from call to call, since the kernel would zero its pages anew every time
    std::unique_ptr<Room<float>> room;
    int64_t size = 0;
    float* of(int64_t n) {
        if (n > size) {
            room.reset();
            size = 0;
            room = std::make_unique<Room<float>>(n);
            size = n;
        }
        return *room;
    }
};

thread_local Kept left_room, right_room;

// Rows of a left side in pieces, [rows / PIECE][k][PIECE], zeros beyond the last; two numbers after it are written to.
void pack_left(const Side& x, int64_t rows, int64_t k, const float* from, float* to) {
    static const float none[8] = {};
    if (x.step == 1) {
        for (int64_t i = 0; i < rows; i += PIECE) {
            const float* of[PIECE];
            for (int64_t r = 0; r < PIECE; r++) of[r] = i + r < rows ? from + (i + r) * x.row : nullptr;
            for (int64_t s = 0; s < k; s += 8) {
                __m256 r[8], t[8];
                for (int64_t j = 0; j < 8; j++) r[j] = _mm256_loadu_ps(j < PIECE && of[j] ? of[j] + s : none);
                turn(r, t);
                // Each of eight numbers, the last two of which the next one's cover.
                for (int64_t j = 0; j < 8; j++) _mm256_storeu_ps(to + i * k + (s + j) * PIECE, t[j]);
            }
        }
        return;
    }
    for (int64_t begin = 0; begin < k; begin += 16)
        for (int64_t i = 0; i < rows; i += PIECE) {
            const int64_t count = std::min<int64_t>(PIECE, rows - i);
            for (int64_t s = begin; s < std::min(k, begin + 16); s++) {
                const float* row = from + i + s * x.step;
                float* at = to + i * k + s * PIECE;
                if (count == PIECE) {
                    std::memcpy(at, row, PIECE * sizeof(float));
                } else {
                    for (int64_t r = 0; r < PIECE; r++) at[r] = r < count ? row[r] : 0.0f;
                }
            }
        }
}

// c [PIECE, PANEL] (+)= a b, of a piece of a left side and a panel of a right one; a function whose strides are known.
__attribute__((noinline, flatten)) void tile(int64_t k, const float* a, const float* b, float* c, int64_t ldc, bool add) {
    piece<PIECE>(k, a, 1, PIECE, b, c, ldc, add);
}

void pack_right(const Product& p, const std::vector<Panel>& panels, int64_t begin, int64_t k, float* to) {
    const int64_t n = panels.size();
#pragma omp for schedule(static)
    for (int64_t i = 0; i < n; i++) {
        const Side& x = p.rights[panels[i].right];
        if (x.step != 1) continue;
        const float* from = x.at + panels[i].column * x.row + begin;
        pack_columns(PANEL, k, [=](int64_t r) { return from + r * x.row; }, to + i * PANEL * k);
    }
    // Row by row where rows are in one piece: a panel's would be as many pages.
#pragma omp for schedule(static)
    for (int64_t from = 0; from < k; from += 32)
        for (int64_t i = 0; i < n; i++) {
            const Side& x = p.rights[panels[i].right];
            if (x.step == 1) continue;
            for (int64_t s = from; s < std::min(k, from + 32); s++) {
                const float* row = x.at + panels[i].column + (begin + s) * x.step;
                float* at = to + (i * k + s) * PANEL;
                store(at, load(row));
                store(at + WIDTH, load(row + WIDTH));
            }
        }
}

void multiply(const Product& p, const std::vector<Panel>& panels, const Rows& rows, int64_t begin, int64_t k, float* left,
              const float* right) {
    const Side& x = p.lefts[rows.left];
    pack_left(x, rows.count, k, x.at + rows.from * x.row + begin * x.step, left);
    const int64_t parts = (k + DEEP - 1) / DEEP, deep = up((k + parts - 1) / parts, 4);
    const int64_t pieces = (rows.count + PIECE - 1) / PIECE, lines = (deep * PANEL / 16 + pieces - 1) / pieces;
    for (int64_t i = 0; i < static_cast<int64_t>(panels.size()); i++) {
        const int64_t ldc = p.rights[panels[i].right].size;
        float* out = p.outs[rows.left * p.n_rights + panels[i].right] + rows.from * ldc + panels[i].column;
        for (int64_t s = 0; s < k; s += deep) {
            const int64_t now = std::min(deep, k - s);
            const float* b = right + (i * k + s) * PANEL;
            const bool add = p.add || begin + s > 0;
            for (int64_t r = 0; r < rows.count; r += PIECE) {
                const float* next = b + now * PANEL + r / PIECE * lines * 16;
                for (int64_t l = 0; l < lines; l++) __builtin_prefetch(next + l * 16, 0, 2);
                const float* a = left + r * k + s * PIECE;
                if (r + PIECE <= rows.count)
                    tile(now, a, b, out + r * ldc, ldc, add);
                else
                    rest<PIECE>(rows.count - r, now, a, 1, PIECE, b, out + r * ldc, ldc, add);
            }
        }
    }
}

// Lefts in parts of about one size, as many to a thread as to another.
std::vector<Rows> parts_of(const Product& p, int64_t k) {
    std::vector<Rows> found;
    const int64_t most = std::max<int64_t>(PIECE, LEFT / k / PIECE * PIECE);
    for (int64_t l = 0; l < p.n_lefts; l++) {
        const int64_t m = p.lefts[l].size, parts = up((m + most - 1) / most, p.threads);
        const int64_t size = up((m + parts - 1) / parts, PIECE);
        for (int64_t from = 0; from < m; from += size) found.push_back({l, from, std::min(size, m - from)});
    }
    return found;
}

void products(const Product& p) {
    std::vector<Panel> all;
    for (int64_t r = 0; r < p.n_rights; r++)
        for (int64_t c = 0; c < p.rights[r].size; c += PANEL) all.push_back({r, c});
    for (int64_t begin = 0; begin < p.length; begin += LONGEST) {
        const int64_t k = std::min(LONGEST, p.length - begin), most = RIGHT / (k * PANEL);
        const std::vector<Rows> parts = parts_of(p, k);
        int64_t highest = 0;
        for (const Rows& rows : parts) highest = std::max(highest, up(rows.count, PIECE));
        for (size_t first = 0; first < all.size(); first += most) {
            const std::vector<Panel> panels(all.begin() + first, all.begin() + std::min(all.size(), first + most));
            float* right = right_room.of(panels.size() * PANEL * k);
            std::atomic<size_t> next{0};
            std::atomic<bool> lacking{false};
#pragma omp parallel num_threads(p.threads)
            {
                float* left = nullptr;
                try {
                    left = left_room.of(highest * k + 8);
                } catch (const std::bad_alloc&) {
                    lacking = true;
                }
                pack_right(p, panels, begin, k, right);
                for (size_t i; left && (i = next++) < parts.size();) multiply(p, panels, parts[i], begin, k, left, right);
            }
            if (lacking) throw std::bad_alloc();
        }
    }
}

}  // namespace

// Whether this is faster than PyTorch's products: MKL's leave a third of an AMD core idle.
extern "C" int32_t prefdistill_multiplies() {
    __builtin_cpu_init();
    return __builtin_cpu_is("amd") ? 1 : 0;
}

extern "C" int32_t prefdistill_product_float(const Product* work) {
    try {
        products(*work);
        return DONE;
    } catch (const std::bad_alloc&) {
        return NO_MEMORY;
    }
}
#endif
