// Stands in for the library's own: what AVX-512 does to sixteen float32, by the compiler's vectors.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

typedef float vec __attribute__((vector_size(64)));
typedef int32_t whole_vec __attribute__((vector_size(64)));
constexpr int64_t WIDTH = 16;

inline vec read(const float* x, int64_t left) {
    vec y = {};
    std::memcpy(&y, x, (left < WIDTH ? left : WIDTH) * sizeof(float));
    return y;
}
inline void write(float* x, vec y, int64_t left) {
    std::memcpy(x, &y, (left < WIDTH ? left : WIDTH) * sizeof(float));
}
inline vec load(const float* x) { return read(x, WIDTH); }
inline void store(float* x, vec y) { write(x, y, WIDTH); }
inline vec splat(float x) { return vec{} + x; }
inline vec fma(vec x, vec y, vec z) { return x * y + z; }
inline vec larger(vec x, vec y) { return x > y ? x : y; }
inline vec smaller(vec x, vec y) { return x < y ? x : y; }
inline float total(vec x) {
    float sum = 0.0f;
    for (int i = 0; i < WIDTH; i++) sum += x[i];
    return sum;
}
inline float largest(vec x) {
    float most = x[0];
    for (int i = 1; i < WIDTH; i++) most = x[i] > most ? x[i] : most;
    return most;
}
inline vec where_not_below(vec x, float least, vec y) { return x < splat(least) ? vec{} : y; }
inline whole_vec rounded(vec x) {
    whole_vec n = {};
    // What cannot be an exponent comes out as the conversion's own sign for it would: something that is not used.
    for (int i = 0; i < WIDTH; i++) n[i] = std::abs(x[i]) < 1e6f ? (int32_t)std::nearbyint(x[i]) : INT32_MIN;
    return n;
}
inline vec nearest(vec x) { return __builtin_convertvector(rounded(x), vec); }
inline vec raise(vec x, vec y) {
    whole_vec bits;
    std::memcpy(&bits, &x, sizeof bits);
    bits = bits + (rounded(y) << 23);
    std::memcpy(&x, &bits, sizeof bits);
    return x;
}
