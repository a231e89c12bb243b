// What whole numbers in vectors (VNNI) and in tiles have in common.

#pragma once
#include <vector>
#include "codes.h"

#if defined(__AVX512VNNI__) && defined(WIDE)
#define DOTS 1

struct Memory {std::vector<uint8_t> held;
    uint8_t* of(int64_t bytes) {
        if (int64_t(held.size()) < bytes + 64) held.resize(bytes + 64);
        return (uint8_t*)((uintptr_t(held.data()) + 63) & ~uintptr_t(63));
    }
};

static inline void fetch(const uint8_t* from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch((const char*)from + i, _MM_HINT_T1);
}

// 16 x 16 numbers of 32 bits, rows and columns exchanged
static inline void turn(__m512i* r) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]), t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
            r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
        }
    for (int i = 0; i < 16; i += 8)
        for (int j = 0; j < 4; j++) {
            t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + 4 + j], 0x88);
            t[i + 4 + j] = _mm512_shuffle_i32x4(r[i + j], r[i + 4 + j], 0xdd);
        }
    for (int j = 0; j < 8; j++) {
        r[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
        r[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd);
    }
}
#endif
