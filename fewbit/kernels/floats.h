// float32 and bfloat16 (as uint16_t) in memory, and what they are worth; exp.

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

// exp, within 2 ulp: a power of two times a polynomial, in plain operations that compilers make vectors of
static inline float exp_of(float x) {
    const float held = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    const float near = held * 1.44269504f + 12582912.0f, power = near - 12582912.0f;
    const float r = (held - power * 0.693359375f) + power * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f, p = p * r + 8.3334519073e-3f, p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f, p = p * r + 5.0000001201e-1f, p = p * r * r + r + 1.0f;
    const float found = p * of_bits(uint32_t(int32_t(power) + 127) << 23);
    return x != x ? x : found;
}
