// x rounded to int8, and what its products with whole codes are worth.

#pragma once
#include <cmath>
#include "vectors.h"

#ifdef DOTS
// x: [rows, k] bfloat16 -> codes int8, a factor of each row, and sums of groups of codes [groups, padded]
struct Rounded {
    std::vector<int8_t> codes;
    std::vector<float> factors, sums;
};

static float largest(const uint16_t* x, int64_t k) {  // a NaN is larger than all
    __m512i top = _mm512_setzero_si512();
    for (int64_t c = 0; c < k; c += 32)
        top = _mm512_max_epu16(top, _mm512_and_si512(_mm512_loadu_si512(x + c), _mm512_set1_epi16(0x7fff)));
    alignas(64) uint16_t each[32];
    _mm512_store_si512(each, top);
    uint16_t found = 0;
    for (int i = 0; i < 32; i++) found = each[i] > found ? each[i] : found;
    return of_bf16(found);
}

static Rounded rounded(const uint16_t* x, int64_t rows, int64_t k, int64_t group, float reach, float least, bool summed) {
    const int64_t groups = k / group, padded = (rows + 31) / 32 * 32;
    Rounded r{std::vector<int8_t>(rows * k), std::vector<float>(padded), std::vector<float>(summed ? groups * padded : 0)};
#pragma omp parallel for schedule(static) if (rows > 8)
    for (int64_t m = 0; m < rows; m++) {
        const float top = largest(x + m * k, k) / reach, factor = top == 0 ? least : top;
        const __m512 by = _mm512_set1_ps(factor);
        r.factors[m] = factor;
        for (int64_t g = 0; g < groups; g++) {
            __m512i total = _mm512_setzero_si512();
            for (int64_t c = g * group; c < (g + 1) * group; c += 16) {
                const __m256i half = _mm256_loadu_si256((const __m256i*)(x + m * k + c));
                const __m512 v = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
                const __m512i code = _mm512_min_epi32(_mm512_cvtps_epi32(_mm512_div_ps(v, by)), _mm512_set1_epi32(127));
                _mm_storeu_si128((__m128i*)(r.codes.data() + m * k + c), _mm512_cvtsepi32_epi8(code));
                total = _mm512_add_epi32(total, _mm512_max_epi32(code, _mm512_set1_epi32(-128)));
            }
            if (summed) r.sums[g * padded + m] = float(_mm512_reduce_add_epi32(total));
        }
    }
    return r;
}

// What sums of whole numbers multiply by, and what they take off: of up to 16 groups from one of them
static inline void units(const Weight& w, int64_t first, __m512 outer, __mmask16 held, __m512& scale, __m512& less) {
    const __m512 s = loaded(w.scale, w.narrow, first, held), shift = _mm512_set1_ps(w.kind == UINT8 ? 128 : 0);
    const __m512 z = w.zeros ? loaded(w.zero, w.narrow, first, held) : _mm512_setzero_ps();
    scale = _mm512_mul_ps(s, outer);
    less = _mm512_mul_ps(w.zeros == 2 ? _mm512_fnmadd_ps(shift, s, z) : _mm512_mul_ps(_mm512_sub_ps(z, shift), s), outer);
}
// Of row n
static inline void units(const Weight& w, int64_t n, int64_t i, __mmask16 held, __m512& scale, __m512& less) {
    units(w, n * (w.k / w.group) + i, _mm512_set1_ps(w.outer[n]), held, scale, less);
}
#endif
