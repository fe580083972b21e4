// Gradients of weights in bfloat16 by AMX, sums in float32: PyTorch's products of two sides that both lie across take
// twice as long as others, and round what has to be float32 again.

#include "products.h"

#ifdef TILES
namespace {

constexpr int64_t LEFT = 32;  // rows of the result that a thread takes at a time
constexpr int64_t LONGEST = 512;  // tokens at a time: a thread's left side stays in its first cache

struct Flat {  // [tokens, size], its rows in one piece each
    const half* at;
    int64_t size, row;
    auto from(int64_t token, int64_t tokens, int64_t column) const {
        return [=](int64_t r) -> const half* { return r < tokens ? at + (token + r) * row + column : nullptr; };
    }
};

// out [g's size, x's size] = g' x; sizes in multiples of 32.
void outer(const Flat& g, const Flat& x, float* out, int64_t tokens, int32_t threads) {
    const int64_t parts = (tokens + LONGEST - 1) / LONGEST, most = up((tokens + parts - 1) / parts, 32);
    Room<half> right(most * x.size);
    std::atomic<bool> lacking{false};
#pragma omp parallel num_threads(threads)
    {
        const Thread registers(true);
        const auto left = part_of<Room<half>>(LEFT * most, lacking);
#pragma omp barrier
        if (!lacking)
            for (int64_t begin = 0; begin < tokens; begin += most) {
                const int64_t count = std::min(most, tokens - begin), k = up(count, 32);
#pragma omp for schedule(static)
                for (int64_t c = 0; c < x.size; c += 16) pack_rows(k, 16, x.from(begin, count, c), right + c * k);
#pragma omp for schedule(dynamic)
                for (int64_t r = 0; r < g.size; r += LEFT) {
                    transpose_rows(k, LEFT, g.from(begin, count, r), *left);
                    product_tiles(LEFT, x.size, k, *left, k, right, k * 16, out + r * x.size, x.size, begin > 0);
                }
            }
    }
    if (lacking) throw std::bad_alloc();
}

}  // namespace

extern "C" int32_t prefdistill_outer_half(const half* g, int64_t g_size, int64_t g_row, const half* x, int64_t x_size,
                                          int64_t x_row, float* out, int64_t tokens, int32_t threads) {
    try {
        outer({g, g_size, g_row}, {x, x_size, x_row}, out, tokens, threads);
        return DONE;
    } catch (const std::bad_alloc&) {
        return NO_MEMORY;
    }
}
#endif
