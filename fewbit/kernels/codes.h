// A weight as it is stored: codes of 2 to 8 bits, one after the other along a row, and how they become bfloat16. Every
// code's value is exact in bfloat16. A group is `group` columns (16, 32 or a multiple of 64) that share a scale and a zero:
//     value = (element[code] - zero) * scale * outer[row]           zeros in units of codes
//     value = (element[code] * scale - zero) * outer[row]           zeros in units of values

#pragma once
#include "floats.h"
#if defined(__AVX512BF16__) && defined(__AVX512VBMI__) && defined(__AVX512VL__)
#include <immintrin.h>
#define WIDE 1
#endif

enum { TABLE32, TABLE64, TABLE128, INT8, UINT8 };

static const int AHEAD = 2048;  // bytes fetched ahead: with more than a few instructions a byte, the processor does not by itself

struct Weight {
    const uint8_t* codes;   // [n, k * bits / 8]
    const void* scale;      // [n, k / group]
    const void* zero;       // the same, or null
    const float* outer;     // [n]
    const uint16_t* table;  // [256] bfloat16: what each code means
    int64_t n, k, group;
    int32_t bits, kind;
    int32_t narrow;         // type of scale and zero: 0 float32, 1 float16, 2 bfloat16
    int32_t zeros;          // 0: none, 1: in codes, 2: in values
    int32_t turned;         // scale and zero are [n / 16, groups, 16]
};

static inline float at(const void* p, int32_t narrow, int64_t i) {
    if (narrow == 0) return ((const float*)p)[i];
    if (narrow == 1) return float(((const _Float16*)p)[i]);
    return of_bf16(((const uint16_t*)p)[i]);
}
static inline float code_value(const Weight& w, const uint8_t* row, int64_t c) {
    const int64_t bit = c * w.bits;
    uint32_t two = row[bit >> 3];
    if ((bit & 7) + w.bits > 8) two |= uint32_t(row[(bit >> 3) + 1]) << 8;
    return of_bf16(w.table[(two >> (bit & 7)) & ((1u << w.bits) - 1)]);
}

#ifdef WIDE
// Up to 16 scales or zeros from one of them
static inline __m512 loaded(const void* p, int32_t narrow, int64_t i, __mmask16 mask) {
    if (narrow == 0) return _mm512_maskz_loadu_ps(mask, (const float*)p + i);
    const __m256i half = _mm256_maskz_loadu_epi16(mask, (const uint16_t*)p + i);
    return narrow == 1 ? _mm512_cvtph_ps(half) : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// The first of so many that are left
static inline __mmask16 first_of(int64_t left) { return __mmask16((1u << (left > 16 ? 16 : left)) - 1); }

// 64 codes, a byte each: the bits of 8 codes are brought into one lane of 64 bits, then each to its byte
struct Unpack {
    __m512i spread, shifts, mask;
    __mmask64 bytes;
    int bits;
    explicit Unpack(int b) : bits(b) {
        alignas(64) uint8_t index[64], shift[64];
        for (int i = 0; i < 64; i++) index[i] = uint8_t((i >> 3) * b + (i & 7)), shift[i] = uint8_t((i & 7) * b);
        spread = _mm512_load_si512(index), shifts = _mm512_load_si512(shift);
        mask = _mm512_set1_epi8(char((1 << b) - 1));
        bytes = b == 8 ? ~0ull : (1ull << (8 * b)) - 1;
    }
    inline __m512i operator()(const uint8_t* p) const {
        if (bits == 8) return _mm512_loadu_si512(p);
        const __m512i lanes = _mm512_permutexvar_epi8(spread, _mm512_maskz_loadu_epi8(bytes, p));
        return _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts, lanes), mask);
    }
};

static inline __m512i bf16_of_ints(__m512i low, __m512i high) {
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_cvtepi32_ps(high), _mm512_cvtepi32_ps(low));
}

// 64 codes, a byte each -> 32 values in bfloat16, and 32 more
template <int KIND> struct Lookup {
    __m512i t0, t1;
    explicit Lookup(const uint16_t* t) { t0 = _mm512_loadu_si512(t), t1 = _mm512_loadu_si512(t + 32); }
    inline __m512i half(__m256i codes) const {
        if (KIND == INT8) return bf16_of_ints(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(codes)), _mm512_cvtepi8_epi32(_mm256_extracti128_si256(codes, 1)));
        if (KIND == UINT8) return bf16_of_ints(_mm512_cvtepu8_epi32(_mm256_castsi256_si128(codes)), _mm512_cvtepu8_epi32(_mm256_extracti128_si256(codes, 1)));
        const __m512i wide = _mm512_cvtepu8_epi16(codes);
        return KIND == TABLE32 ? _mm512_permutexvar_epi16(wide, t0) : _mm512_permutex2var_epi16(t0, wide, t1);
    }
    inline void operator()(__m512i codes, __m512i& a, __m512i& b) const {
        a = half(_mm512_castsi512_si256(codes)), b = half(_mm512_extracti64x4_epi64(codes, 1));
    }
};

// The two bytes of a value are looked up apart, its sign is a byte code's own
template <> struct Lookup<TABLE128> {
    __m512i low[2], high[2];
    explicit Lookup(const uint16_t* t) {
        alignas(64) uint8_t lows[128], highs[128];
        for (int i = 0; i < 128; i++) lows[i] = uint8_t(t[i]), highs[i] = uint8_t(t[i] >> 8);
        for (int i = 0; i < 2; i++) low[i] = _mm512_load_si512(lows + 64 * i), high[i] = _mm512_load_si512(highs + 64 * i);
    }
    inline void operator()(__m512i codes, __m512i& a, __m512i& b) const {
        const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);  // so that the halves of lanes come out in order
        codes = _mm512_permutexvar_epi64(order, codes);
        const __m512i sign = _mm512_and_si512(codes, _mm512_set1_epi8(char(128)));
        const __m512i l = _mm512_permutex2var_epi8(low[0], codes, low[1]);
        const __m512i h = _mm512_or_si512(_mm512_permutex2var_epi8(high[0], codes, high[1]), sign);
        a = _mm512_unpacklo_epi8(l, h), b = _mm512_unpackhi_epi8(l, h);
    }
};

template <int KIND> struct Decode {
    Unpack unpack;
    Lookup<KIND> lookup;
    explicit Decode(const Weight& w) : unpack(w.bits), lookup(w.table) {}
    inline void two(const uint8_t* p, __m512i& a, __m512i& b) const {
        lookup(unpack(p), a, b);
    }
};
#endif
