// y = x W^T for few rows of x, W read as it is stored: codes turned into bfloat16 in registers, whose products with x are
// exact in float32. What a weight is stands in codes.h.

#include <cstdlib>
#include <omp.h>
#include <vector>
#include "codes.h"

#ifdef WIDE
// What zeros take off M sums, all 16 lanes of which are one. sums: [M, k / group] of x.
template <int M>
static inline void take_zeros(const Weight& w, int64_t first, const float* sums, __m512* total) {
    const int64_t groups = w.k / w.group;
    for (int64_t g = 0; g < groups; g += 16) {
        const __mmask16 held = first_of(groups - g);
        _mm_prefetch((const char*)w.zero + (first + g) * (w.narrow ? 2 : 4) + AHEAD / 4, _MM_HINT_T0);
        __m512 z = loaded(w.zero, w.narrow, first + g, held);
        if (w.zeros == 1) z = _mm512_mul_ps(z, loaded(w.scale, w.narrow, first + g, held));
        for (int m = 0; m < M; m++) total[m] = _mm512_fnmadd_ps(z, _mm512_maskz_loadu_ps(held, sums + m * groups + g), total[m]);
    }
}

template <int M>
static inline void finish(const Weight& w, int64_t r, __m512* total, const float* sums, float* y) {
    if (w.zeros) take_zeros<M>(w, r * (w.k / w.group), sums, total);
    for (int m = 0; m < M; m++) y[m] = _mm512_reduce_add_ps(total[m]) * w.outer[r];
}

// Scales of 16, 8, 4, 2 or 1 groups, each over its share of 16 lanes
struct Scales {
    __m512i lanes;
    explicit Scales(int64_t count, int64_t from = 0) {
        alignas(64) int32_t index[16];
        for (int i = 0; i < 16; i++) index[i] = int32_t(from + i * count / 16);
        lanes = _mm512_load_si512(index);
    }
    static inline __m512 fetched(const Weight& w, int64_t i, __mmask16 held) {
        _mm_prefetch((const char*)w.scale + i * (w.narrow ? 2 : 4) + AHEAD / 4, _MM_HINT_T0);
        return loaded(w.scale, w.narrow, i, held);
    }
    inline __m512 operator()(__m512 found) const { return _mm512_permutexvar_ps(lanes, found); }
};

// Codes of 4 bits, 128 columns at a time: word i of 32 holds columns 4i to 4i + 3, and looking a word up in a table that is
// there twice leaves out what lies above its lowest 4 bits. x comes as `by_words` has it.
// Runs from i to `stop` of R rows of W are added to `sums`.
template <int M, int R>
static void rows_of_nibbles(const Weight& w, const Scales& scales, __m512i table, int64_t r, int64_t i, int64_t stop, const uint16_t* x, __m512 (*sums)[M]) {
    const int64_t groups = w.k / w.group, each = w.group < 128 ? 128 / w.group : 1;
    __m512 total[R][M];
    for (int q = 0; q < R; q++)
        for (int m = 0; m < M; m++) total[q][m] = sums[q][m];
    for (; i < stop; i++) {
        const __mmask32 words = 128 * (i + 1) <= w.k ? 0xffffffffu : 0xffffu;
        const int64_t g = 128 * i / w.group;
        const __mmask16 held = first_of(groups - g < each ? groups - g : each);
        __m512i v[R][4];
        __m512 s[R];
        for (int q = 0; q < R; q++) {
            const uint8_t* p = w.codes + (r + q) * (w.k / 2) + 64 * i;
            _mm_prefetch((const char*)p + 2 * R * (w.k / 2), _MM_HINT_T0);  // the same of rows to come
            const __m512i codes = _mm512_maskz_loadu_epi16(words, p);
            for (int j = 0; j < 4; j++) v[q][j] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4 * j), table);
            s[q] = scales(Scales::fetched(w, (r + q) * groups + g, held));
        }
        for (int m = 0; m < M; m++) {
            const __m512i* at = (const __m512i*)(x + (i * M + m) * 128);
            for (int q = 0; q < R; q++) {
                __m512 even = _mm512_dpbf16_ps(_mm512_setzero_ps(), (__m512bh)v[q][0], (__m512bh)at[0]);
                __m512 odd = _mm512_dpbf16_ps(_mm512_setzero_ps(), (__m512bh)v[q][1], (__m512bh)at[1]);
                even = _mm512_dpbf16_ps(even, (__m512bh)v[q][2], (__m512bh)at[2]);
                odd = _mm512_dpbf16_ps(odd, (__m512bh)v[q][3], (__m512bh)at[3]);
                total[q][m] = _mm512_fmadd_ps(_mm512_add_ps(even, odd), s[q], total[q][m]);
            }
        }
    }
    for (int q = 0; q < R; q++)
        for (int m = 0; m < M; m++) sums[q][m] = total[q][m];
}

// x: [rows, k] -> [runs of 128, rows, 4, 32], zeros behind k: word i of a run's j-th part is its column 4i + j
static uint16_t* by_words(const uint16_t* x, int64_t rows, int64_t k) {
    const int64_t runs = (k + 127) / 128;
    uint16_t* out = (uint16_t*)aligned_alloc(64, rows * runs * 256);
    alignas(64) uint16_t index[32];
    for (int i = 0; i < 32; i++) index[i] = uint16_t(4 * i);
    const __m512i first = _mm512_load_si512(index);
    for (int64_t m = 0; m < rows; m++)
        for (int64_t i = 0; i < runs; i++) {
            __m512i part[4];
            for (int64_t t = 0; t < 4; t++) {
                const int64_t c = 128 * i + 32 * t;
                part[t] = c < k ? _mm512_loadu_si512(x + m * k + c) : _mm512_setzero_si512();
            }
            for (int j = 0; j < 4; j++) {
                const __m512i from = _mm512_add_epi16(first, _mm512_set1_epi16(j));
                const __m512i low = _mm512_permutex2var_epi16(part[0], from, part[1]), high = _mm512_permutex2var_epi16(part[2], from, part[3]);
                _mm512_store_si512(out + (i * rows + m) * 128 + 32 * j, _mm512_inserti64x4(low, _mm512_castsi512_si256(high), 1));
            }
        }
    return out;
}

// M rows of x against one row of W
template <int KIND, int M>
static void row_times(const Weight& w, const Decode<KIND>& decode, int64_t r, const uint16_t* x, const float* sums, float* y) {
    const int64_t bytes = 8 * w.bits;  // of 64 codes
    const uint8_t* p = w.codes + r * (w.k / 64) * bytes;
    const int64_t groups = w.k / w.group, first = r * groups;
    __m512 total[M];
    for (int m = 0; m < M; m++) total[m] = _mm512_setzero_ps();
    if (w.group >= 64) {
        for (int64_t g = 0; g < groups; g++) {
            __m512 even[M], odd[M];
            for (int m = 0; m < M; m++) even[m] = odd[m] = _mm512_setzero_ps();
            for (int64_t c = g * w.group; c < (g + 1) * w.group; c += 64, p += bytes) {
                __m512i a, b;
                _mm_prefetch((const char*)p + AHEAD, _MM_HINT_T0);
                decode.two(p, a, b);
                for (int m = 0; m < M; m++) {
                    even[m] = _mm512_dpbf16_ps(even[m], (__m512bh)a, (__m512bh)_mm512_loadu_si512(x + m * w.k + c));
                    odd[m] = _mm512_dpbf16_ps(odd[m], (__m512bh)b, (__m512bh)_mm512_loadu_si512(x + m * w.k + c + 32));
                }
            }
            const __m512 s = _mm512_set1_ps(at(w.scale, w.narrow, first + g));
            for (int m = 0; m < M; m++) total[m] = _mm512_fmadd_ps(_mm512_add_ps(even[m], odd[m]), s, total[m]);
        }
    } else {
        const __m512 zero = _mm512_setzero_ps();
        const int64_t step = 32 / w.group;  // groups of half a run
        const Scales left(step), right(step, step);
        __m512 other[M];
        for (int m = 0; m < M; m++) other[m] = zero;
        for (int64_t c = 0, i = first; c < w.k; c += 64, i += 2 * step, p += bytes) {
            __m512i a, b;
            _mm_prefetch((const char*)p + AHEAD, _MM_HINT_T0);
            decode.two(p, a, b);
            const __m512 found = Scales::fetched(w, i, first_of(2 * step)), s = left(found), t = right(found);
            for (int m = 0; m < M; m++) {
                const __m512 u = _mm512_dpbf16_ps(zero, (__m512bh)a, (__m512bh)_mm512_loadu_si512(x + m * w.k + c));
                const __m512 v = _mm512_dpbf16_ps(zero, (__m512bh)b, (__m512bh)_mm512_loadu_si512(x + m * w.k + c + 32));
                total[m] = _mm512_fmadd_ps(u, s, total[m]);
                other[m] = _mm512_fmadd_ps(v, t, other[m]);
            }
        }
        for (int m = 0; m < M; m++) total[m] = _mm512_add_ps(total[m], other[m]);
    }
    finish<M>(w, r, total, sums, y);
}
#else
template <int KIND> struct Decode { explicit Decode(const Weight&) {} };
template <int KIND, int M>
static void row_times(const Weight& w, const Decode<KIND>&, int64_t r, const uint16_t* x, const float*, float* y) {
    const uint8_t* row = w.codes + r * (w.k / 8) * w.bits;
    const int64_t groups = w.k / w.group;
    float total[M] = {};
    for (int64_t g = 0; g < groups; g++) {
        const float s = at(w.scale, w.narrow, r * groups + g), z = w.zeros ? at(w.zero, w.narrow, r * groups + g) : 0;
        for (int64_t c = g * w.group; c < (g + 1) * w.group; c++) {
            const float v = code_value(w, row, c), value = w.zeros == 1 ? (v - z) * s : v * s - z;
            for (int m = 0; m < M; m++) total[m] += value * of_bf16(x[m * w.k + c]);
        }
    }
    for (int m = 0; m < M; m++) y[m] = total[m] * w.outer[r];
}
#endif

#ifdef WIDE
template <int M>
static void rows_times_nibbles(const Weight& w, const uint16_t* x, const float* sums, uint16_t* y) {
    alignas(64) uint16_t two[32];
    memcpy(two, w.table, 32), memcpy(two + 16, w.table, 32);
    const __m512i table = _mm512_load_si512(two);
    const Scales scales(w.group < 128 ? 128 / w.group : 1);
    // Rows of W that meet x at once, rows that meet as much of x as the first cache holds, runs of it
    constexpr int64_t R = M < 4 ? 1 : 2, ROWS = 16, SPAN = 128 / M;
    const int64_t runs = (w.k + 127) / 128;
    uint16_t* words = by_words(x, M, w.k);
#pragma omp parallel for schedule(static)
    for (int64_t first = 0; first < w.n; first += ROWS) {
        const int64_t count = w.n - first < ROWS ? w.n - first : ROWS;
        __m512 total[ROWS][M];
        for (int64_t r = 0; r < count; r++)
            for (int m = 0; m < M; m++) total[r][m] = _mm512_setzero_ps();
        for (int64_t i = 0; i < runs; i += SPAN) {
            const int64_t stop = i + SPAN < runs ? i + SPAN : runs;
            int64_t r = 0;
            for (; r + R <= count; r += R) rows_of_nibbles<M, R>(w, scales, table, first + r, i, stop, words, total + r);
            for (; r < count; r++) rows_of_nibbles<M, 1>(w, scales, table, first + r, i, stop, words, total + r);
        }
        for (int64_t r = 0; r < count; r++) {
            float found[M];
            finish<M>(w, first + r, total[r], sums, found);
            for (int m = 0; m < M; m++) y[m * w.n + first + r] = to_bf16(found[m]);
        }
    }
    free(words);
}
#endif

template <int KIND, int M>
static void rows_times(const Weight& w, const uint16_t* x, const float* sums, uint16_t* y) {
#ifdef WIDE
    if (KIND == TABLE32 && w.bits == 4 && (w.group < 128 || w.group % 128 == 0)) return rows_times_nibbles<M>(w, x, sums, y);
#endif
    const Decode<KIND> decode(w);
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < w.n; r++) {
        float found[M];
        row_times<KIND, M>(w, decode, r, x, sums, found);
        for (int m = 0; m < M; m++) y[m * w.n + r] = to_bf16(found[m]);
    }
}

template <int KIND>
static void any_rows(const Weight& w, const uint16_t* x, int64_t rows, const float* sums, uint16_t* y) {
    const int64_t groups = w.k / w.group;
    while (rows) {
        const int64_t m = rows >= 8 ? 8 : rows >= 4 ? 4 : rows >= 2 ? 2 : 1;
        if (m == 8) rows_times<KIND, 8>(w, x, sums, y);
        else if (m == 4) rows_times<KIND, 4>(w, x, sums, y);
        else if (m == 2) rows_times<KIND, 2>(w, x, sums, y);
        else rows_times<KIND, 1>(w, x, sums, y);
        x += m * w.k, y += m * w.n, rows -= m;
        if (sums) sums += m * groups;
    }
}

template <int KIND>
static void decode_rows(const Weight& w, int64_t start, int64_t stop, uint16_t* out) {
    const Decode<KIND> decode(w);
    const int64_t groups = w.k / w.group;
#pragma omp parallel for schedule(static)
    for (int64_t r = start; r < stop; r++) {
        const uint8_t* row = w.codes + r * (w.k / 8) * w.bits;
        uint16_t* to = out + (r - start) * w.k;
        float s[4], less[4];  // of a run of 64 columns
        for (int64_t c = 0; c < w.k; c += 64) {
            const int64_t step = w.group < 64 ? 64 / w.group : 1, first = r * groups + c / w.group;
            for (int64_t i = 0; i < 4; i++) {
                const int64_t g = first + i * step / 4;
                const float z = w.zeros ? at(w.zero, w.narrow, g) : 0;
                s[i] = at(w.scale, w.narrow, g);
                less[i] = (w.zeros == 1 ? z * s[i] : z) * w.outer[r];
                s[i] *= w.outer[r];
            }
#ifdef WIDE
            __m512i half[2];
            decode.two(row + c / 8 * w.bits, half[0], half[1]);
            for (int i = 0; i < 4; i++) {
                const __m256i h = i & 1 ? _mm512_extracti64x4_epi64(half[i >> 1], 1) : _mm512_castsi512_si256(half[i >> 1]);
                const __m512 v = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
                const __m512 value = _mm512_fmsub_ps(v, _mm512_set1_ps(s[i]), _mm512_set1_ps(less[i]));
                _mm256_storeu_si256((__m256i*)(to + c + 16 * i), (__m256i)_mm512_cvtneps_pbh(value));
            }
#else
            for (int i = 0; i < 64; i++) to[c + i] = to_bf16(code_value(w, row, c + i) * s[i >> 4] - less[i >> 4]);
#endif
        }
    }
}

// Runs of x, each `length` long -> their sums
static std::vector<float> group_sums(const uint16_t* x, int64_t count, int64_t length) {
    std::vector<float> out(count);
    for (int64_t i = 0; i < count; i++) {
        float lanes[16] = {};  // apart, so that the compiler may add them side by side
        for (int64_t j = 0; j < length; j++) lanes[j & 15] += of_bf16(x[i * length + j]);
        for (int j = 0; j < 16; j++) out[i] += lanes[j];
    }
    return out;
}

#ifdef WIDE
// x: [rows, k] -> [runs of 64, rows, 64]: rows that lie a power of two apart push one another out of a cache
static uint16_t* by_runs(const uint16_t* x, int64_t rows, int64_t k) {
    uint16_t* out = (uint16_t*)aligned_alloc(64, rows * k * 2);
    for (int64_t c = 0; c < k; c += 64)
        for (int64_t m = 0; m < rows; m++) memcpy(out + c * rows + m * 64, x + m * k + c, 128);
    return out;
}
#endif

// M rows of x against W in bfloat16
template <int M>
static void dense_rows(const uint16_t* w, int64_t n, int64_t k, const uint16_t* x, uint16_t* y) {
    uint16_t* runs = nullptr;
#ifdef WIDE
    if (M > 1) x = runs = by_runs(x, M, k);
#endif
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < n; r++) {
        const uint16_t* p = w + r * k;
        float found[M];
#ifdef WIDE
        __m512 even[M], odd[M];
        for (int m = 0; m < M; m++) even[m] = odd[m] = _mm512_setzero_ps();
        for (int64_t c = 0; c < k; c += 64) {
            _mm_prefetch((const char*)(p + c) + AHEAD, _MM_HINT_T0);
            _mm_prefetch((const char*)(p + c) + AHEAD + 64, _MM_HINT_T0);
            const __m512i a = _mm512_loadu_si512(p + c), b = _mm512_loadu_si512(p + c + 32);
            for (int m = 0; m < M; m++) {
                even[m] = _mm512_dpbf16_ps(even[m], (__m512bh)a, (__m512bh)_mm512_loadu_si512(x + c * M + m * 64));
                odd[m] = _mm512_dpbf16_ps(odd[m], (__m512bh)b, (__m512bh)_mm512_loadu_si512(x + c * M + m * 64 + 32));
            }
        }
        for (int m = 0; m < M; m++) found[m] = _mm512_reduce_add_ps(_mm512_add_ps(even[m], odd[m]));
#else
        for (int m = 0; m < M; m++) {
            found[m] = 0;
            for (int64_t c = 0; c < k; c++) found[m] += of_bf16(p[c]) * of_bf16(x[m * k + c]);
        }
#endif
        for (int m = 0; m < M; m++) y[m * n + r] = to_bf16(found[m]);
    }
    free(runs);
}

#define BY_KIND(call)                  \
    switch (w->kind) {                 \
        case TABLE32: call(TABLE32);   \
        case TABLE64: call(TABLE64);   \
        case TABLE128: call(TABLE128); \
        case INT8: call(INT8);         \
        default: call(UINT8);          \
    }

extern "C" {

// x: [rows, k] -> y: [rows, n], bfloat16
void packed_times(const Weight* w, const uint16_t* x, int64_t rows, uint16_t* y) {
    std::vector<float> sums;
    if (w->zeros) sums = group_sums(x, rows * (w->k / w->group), w->group);
#define TIMES(KIND) return any_rows<KIND>(*w, x, rows, w->zeros ? sums.data() : nullptr, y)
    BY_KIND(TIMES)
}

// x: [rows, k], w: [n, k] -> y: [rows, n], all bfloat16; k in whole runs
void packed_dense(const uint16_t* w, int64_t n, int64_t k, const uint16_t* x, int64_t rows, uint16_t* y) {
    while (rows) {
        const int64_t m = rows >= 8 ? 8 : rows >= 4 ? 4 : rows >= 2 ? 2 : 1;
        if (m == 8) dense_rows<8>(w, n, k, x, y);
        else if (m == 4) dense_rows<4>(w, n, k, x, y);
        else if (m == 2) dense_rows<2>(w, n, k, x, y);
        else dense_rows<1>(w, n, k, x, y);
        x += m * k, y += m * n, rows -= m;
    }
}

// Rows start to stop of W -> out: [stop - start, k] bfloat16
void packed_decode(const Weight* w, int64_t start, int64_t stop, uint16_t* out) {
#define DECODE(KIND) return decode_rows<KIND>(*w, start, stop, out)
    BY_KIND(DECODE)
}

}
