// The blocks of packed trees, as attention.py gives them, and who works on which.
//
// Queries [start, stop) see keys [first, middle) and [own, stop), but for what a bias of 0 and -inf over the last `width`
// keys hides. A result hangs on the number of threads and on nothing else.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "vectors.h"

struct Block {
    int64_t start, stop, first, middle, own, width;
    const half* hidden;  // [stop - start, width]
};

template <class T>
struct Heads {  // a tensor [tokens, heads, d], its last dimension in one piece
    T* at;
    int64_t token, head;  // strides
};

template <class T>
struct Work {
    const Block* blocks;
    int64_t n, tokens, groups, share, d;  // share: query heads of a key head
    float scale;
    int32_t threads, tiles;  // tiles: whether to use AMX
    Heads<T> q, k, v, out, grad, dq, dk, dv;
    float* kept;  // [tokens, query heads, 2], what the backward pass makes a row's probabilities from
};

#ifdef SERVED
namespace {

int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <class T>
struct Room {  // uninitialised, aligned to cache lines
    T* at;
    explicit Room(int64_t n) : at(static_cast<T*>(std::aligned_alloc(64, up((n > 0 ? n : 1) * sizeof(T), 64)))) {
        if (!at) throw std::bad_alloc();
    }
    ~Room() { std::free(at); }
    Room(const Room&) = delete;
    Room& operator=(const Room&) = delete;
    operator T*() const { return at; }
};

struct Flush {  // a thread's rounding of the smallest numbers to 0, given back at the end
    unsigned control = _mm_getcsr();
    Flush() { _mm_setcsr(control | FLUSH); }
    ~Flush() { _mm_setcsr(control); }
};

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
template <class T>
auto keys_of(const Heads<T>& x, const Block& b, const Shape& s, int64_t group, int64_t from = 0) {
    return [&, group, from](int64_t key) -> const T* {
        key += from;
        return key < s.keys ? x.at + token_of(b, s, key) * x.token + group * x.head : nullptr;
    };
}

// The keys that queries [row, row + rows) see are all below this, a multiple of 32.
int64_t limit_of(const Block& b, const Shape& s, int64_t row, int64_t rows) {
    int64_t last = 0;
    for (int64_t r = row; r < row + rows && r < s.queries; r++) {
        int64_t w = b.width;
        while (w > last && b.hidden[r * b.width + w - 1]) --w;
        last = w;
    }
    return up(s.seen + last, 32);
}

template <class T, class Of>
int64_t most(const Work<T>& w, Of of) {
    int64_t found = 0;
    for (int64_t i = 0; i < w.n; i++) found = std::max<int64_t>(found, of(Shape(w.blocks[i])));
    return found;
}

// The blocks of a tree, shared out to lanes that add up keys' gradients on their own.
template <class T>
std::vector<std::vector<std::vector<int64_t>>> lanes_of(const Work<T>& w, int64_t lanes) {
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

constexpr int32_t DONE = 0, NO_MEMORY = 1;  // what a function of the library returns

// What a thread works with, or null where memory falls short: nothing may be thrown out of a parallel region.
template <class Part, class From>
std::unique_ptr<Part> part_of(const From& from, std::atomic<bool>& lacking) {
    try {
        return std::make_unique<Part>(from);
    } catch (const std::bad_alloc&) {
        lacking = true;
        return nullptr;
    }
}

// Every block and key head once; a thread makes a Part of its own, which takes a block and a head.
template <class Part, class T>
int32_t forward(const Work<T>& w) {
    std::atomic<bool> lacking{false};
#pragma omp parallel num_threads(w.threads)
    {
        const auto part = part_of<Part>(w, lacking);
#pragma omp barrier
        if (!lacking) {
#pragma omp for schedule(dynamic) collapse(2)
            for (int64_t i = 0; i < w.n; i++)
                for (int64_t group = 0; group < w.groups; group++) (*part)(w.blocks[i], group);
        }
    }
    return lacking ? NO_MEMORY : DONE;
}

// The same, with float32 sums [tokens, key heads, d] of the keys' and values' gradients that a Part adds to, and
// Part::put, which rounds 16 of them into their place.
template <class Part, class T>
int32_t backward(const Work<T>& w) try {
    const int64_t size = w.tokens * w.groups * w.d;
    int64_t trees = 0, blocks = 0, longest = 0;  // longest: the most blocks of a tree
    for (int64_t i = 0; i < w.n; i++) {
        const bool starts = i == 0 || w.blocks[i].first != w.blocks[i - 1].first;
        trees += starts;
        blocks = starts ? 1 : blocks + 1;
        longest = std::max(longest, blocks);
    }
    int64_t lanes = (4 * w.threads + trees * w.groups - 1) / (trees * w.groups);
    lanes = w.threads == 1 ? 1 : std::min(lanes, longest);  // each lane is a copy of all sums
    std::atomic<bool> lacking{false};
    const auto shared = lanes_of(w, lanes);
    Room<float> dk(lanes * size), dv(lanes * size);
    const auto finish = [&](const float* sums, const Heads<T>& to, int64_t t, int64_t group, int64_t j) {
        const int64_t at = (t * w.groups + group) * w.d + j;
        float x[16];
        for (int64_t i = 0; i < 16; i += WIDTH) {
            vec sum = load(sums + at + i);
            for (int64_t lane = 1; lane < lanes; lane++) sum = sum + load(sums + lane * size + at + i);
            store(x + i, sum);
        }
        Part::put(to.at + t * to.token + group * to.head + j, x);
    };
#pragma omp parallel num_threads(w.threads)
    {
        const auto part = part_of<Part>(w, lacking);
#pragma omp barrier
        if (!lacking) {
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
                            (*part)(w.blocks[i], group, dk + lane * size, dv + lane * size);
#pragma omp for schedule(static)
            for (int64_t t = 0; t < w.tokens; t++)
                for (int64_t group = 0; group < w.groups; group++)
                    for (int64_t j = 0; j < w.d; j += 16) {
                        finish(dk, w.dk, t, group, j);
                        finish(dv, w.dv, t, group, j);
                    }
        }
    }
    return lacking ? NO_MEMORY : DONE;
} catch (const std::bad_alloc&) {
    return NO_MEMORY;
}

}  // namespace
#endif
