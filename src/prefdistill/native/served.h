// What this CPU has: SERVED, float32; LONG, sixteen numbers in a register; FAST, bfloat16 too.
#pragma once

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define SERVED 1
#define LONG 1
#if defined(__AVX512BF16__)
#define FAST 1
#endif
#elif defined(__AVX2__) && defined(__FMA__)
#define SERVED 1
#endif
