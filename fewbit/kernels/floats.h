// float32 and bfloat16 (as uint16_t) in memory, and what they are worth.

#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__) && !defined(__clang__)
#pragma GCC target("prefer-vector-width=512")
#endif

static inline float of_bits(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
static inline uint32_t bits_of(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }
static inline float of_bf16(uint16_t h) { return of_bits(uint32_t(h) << 16); }
static inline uint16_t to_bf16(float f) {
    const uint32_t u = bits_of(f), near = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return uint16_t((u & 0x7fffffff) > 0x7f800000 ? (u >> 16) | 64 : near);
}
static inline float load(const float* p) { return *p; }
static inline float load(const uint16_t* p) { return of_bf16(*p); }
static inline void store(float* p, float v) { *p = v; }
static inline void store(uint16_t* p, float v) { *p = to_bf16(v); }
