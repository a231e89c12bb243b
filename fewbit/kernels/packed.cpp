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

// Scales of 16, 8, 4, 2 or 1 groups, each over its share of 16 lanes
struct Scales {
    __m512i lanes;
    explicit Scales(int64_t count, int64_t from = 0) {
        alignas(64) int32_t index[16];
        for (int i = 0; i < 16; i++) index[i] = int32_t(from + i * count / 16);
        lanes = _mm512_load_si512(index);
    }
    static inline __m512 fetched(const Weight& w, int64_t i, __mmask16 held, int64_t ahead = AHEAD / 4) {
        _mm_prefetch((const char*)w.scale + i * (w.narrow ? 2 : 4) + ahead, _MM_HINT_T0);
        return loaded(w.scale, w.narrow, i, held);
    }
    inline __m512 operator()(__m512 found) const { return _mm512_permutexvar_ps(lanes, found); }
};

// Readers know how W lies. `add` brings runs from i to `stop` of R rows of W, from r on, times M rows of x to their sums, SUMS
// of each, which are added up at the end; `rows` says that other rows come next, not more of these. `arranged` is x as a reader
// takes it, null where it may stay. span: runs of M rows of x that the first cache holds. TOGETHER: rows of W finished at once.

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

// Codes of 4 bits, 128 columns at a time: word i of 32 holds columns 4i to 4i + 3, and looking a word up in a table that is
// there twice leaves out what lies above its lowest 4 bits
struct Nibbles {
    static constexpr int SUMS = 1, TOGETHER = 16;
    template <int M> static constexpr int AT_ONCE = M < 4 ? 1 : 2;
    const Weight w;
    const int64_t row, runs, groups, each;  // bytes of a row; of a row, groups of a run
    const Scales scales;
    __m512i table;
    explicit Nibbles(const Weight& weight) : w(weight), row(w.k / 2), runs((w.k + 127) / 128), groups(w.k / w.group), each(w.group < 128 ? 128 / w.group : 1), scales(each) {
        alignas(64) uint16_t two[32];
        memcpy(two, w.table, 32), memcpy(two + 16, w.table, 32);
        table = _mm512_load_si512(two);
    }
    static int64_t span(int64_t rows) { return 128 / rows; }
    template <int M> static uint16_t* arranged(const uint16_t* x, int64_t k) { return by_words(x, M, k); }

    template <int M, int R>
    inline void add(int64_t r, int64_t i, int64_t stop, bool rows, const uint16_t* x, __m512 (*sums)[M]) const {
        const int64_t ahead = rows ? 2 * R * groups * (w.narrow ? 2 : 4) : AHEAD / 4;  // of scales
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
                const uint8_t* p = w.codes + (r + q) * row + 64 * i;
                _mm_prefetch((const char*)p + 2 * R * row, _MM_HINT_T0);  // the same of rows to come
                const __m512i codes = _mm512_maskz_loadu_epi16(words, p);
                for (int j = 0; j < 4; j++) v[q][j] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4 * j), table);
                s[q] = scales(Scales::fetched(w, (r + q) * groups + g, held, ahead));
            }
            for (int m = 0; m < M; m++) {
                __m512i at[4];
                for (int j = 0; j < 4; j++) {
                    at[j] = _mm512_load_si512(x + (i * M + m) * 128 + 32 * j);
                    if (R > 1) asm("" : "+v"(at[j]));  // or it is loaded again for each row
                }
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
};

// x: [rows, k] -> [runs, rows, 64]: rows that lie a power of two apart push one another out of a cache
static uint16_t* by_runs(const uint16_t* x, int64_t rows, int64_t k) {
    uint16_t* out = (uint16_t*)aligned_alloc(64, rows * k * 2);
    for (int64_t c = 0; c < k; c += 64)
        for (int64_t m = 0; m < rows; m++) memcpy(out + c * rows + m * 64, x + m * k + c, 128);
    return out;
}

// What reads runs of 64 columns, a row at a time
static const int64_t RUN = 64;
struct ByRuns {
    static constexpr int TOGETHER = 1;
    template <int M> static constexpr int AT_ONCE = 1;
    template <int M> static uint16_t* arranged(const uint16_t* x, int64_t k) { return M > 1 ? by_runs(x, M, k) : nullptr; }
};

// A run of W, columns 0 to 31 and 32 to 63, and M of x
template <int M>
static inline void meet(__m512i a, __m512i b, const uint16_t* x, __m512* even, __m512* odd) {
    for (int m = 0; m < M; m++) {
        even[m] = _mm512_dpbf16_ps(even[m], (__m512bh)a, (__m512bh)_mm512_loadu_si512(x + m * RUN));
        odd[m] = _mm512_dpbf16_ps(odd[m], (__m512bh)b, (__m512bh)_mm512_loadu_si512(x + m * RUN + 32));
    }
}

// Sums of lanes are put away every 16 runs, so that a row is added up in one order whatever the number of rows of x
static inline int64_t stretch(int64_t i, int64_t stop) { return (i | 15) + 1 < stop ? (i | 15) + 1 : stop; }

// Codes in groups of up to 64 columns
template <int KIND> struct Grouped : ByRuns {
    static constexpr int SUMS = 2;
    const Weight w;
    const Decode<KIND> decode;
    const int64_t runs, bytes, row, step;  // of a row; of a run, of a row; groups of a run
    const Scales left, right;              // of its halves
    explicit Grouped(const Weight& weight) : w(weight), decode(w), runs(w.k / RUN), bytes(8 * w.bits), row(runs * bytes), step(64 / w.group),
          left((step + 1) / 2), right((step + 1) / 2, step / 2) {}
    static int64_t span(int64_t rows) { return 256 / rows; }

    template <int M, int>
    inline void add(int64_t r, int64_t i, int64_t stop, bool rows, const uint16_t* x, __m512 (*sums)[M * SUMS]) const {
        __m512* total = sums[0];
        const int64_t ahead = rows ? 2 * row : AHEAD, scales = rows ? 2 * runs * step * (w.narrow ? 2 : 4) : AHEAD / 4;
        const uint8_t* p = w.codes + r * row + i * bytes;
        const __m512 zero = _mm512_setzero_ps();
        __m512 even[M], odd[M];
        for (int m = 0; m < M; m++) even[m] = total[m], odd[m] = total[M + m];
        for (int64_t g = (r * runs + i) * step; i < stop; i++, g += step, p += bytes) {
            __m512i a, b;
            _mm_prefetch((const char*)p + ahead, _MM_HINT_T0);
            decode.two(p, a, b);
            const __m512 found = Scales::fetched(w, g, first_of(step), scales), s = left(found), t = right(found);
            for (int m = 0; m < M; m++) {
                const __m512i* at = (const __m512i*)(x + (i * M + m) * RUN);
                const __m512 u = _mm512_dpbf16_ps(zero, (__m512bh)a, (__m512bh)_mm512_loadu_si512(at));
                const __m512 v = _mm512_dpbf16_ps(zero, (__m512bh)b, (__m512bh)_mm512_loadu_si512(at + 1));
                even[m] = _mm512_fmadd_ps(u, s, even[m]), odd[m] = _mm512_fmadd_ps(v, t, odd[m]);
            }
        }
        for (int m = 0; m < M; m++) total[m] = even[m], total[M + m] = odd[m];
    }
};

// Codes in groups of whole runs
template <int KIND> struct Runs : ByRuns {
    static constexpr int SUMS = 1;
    const Weight w;
    const Decode<KIND> decode;
    const int64_t runs, bytes, row, groups, each;  // of a row; of a run, of a row; of a row, runs of a group
    explicit Runs(const Weight& weight) : w(weight), decode(w), runs(w.k / RUN), bytes(8 * w.bits), row(runs * bytes), groups(w.k / w.group), each(w.group / RUN) {}
    static int64_t span(int64_t rows) { return 256 / rows; }

    template <int M, int>
    inline void add(int64_t r, int64_t i, int64_t stop, bool rows, const uint16_t* x, __m512 (*sums)[M * SUMS]) const {
        __m512* total = sums[0];
        const int64_t ahead = rows ? 2 * row : AHEAD;
        const uint8_t* p = w.codes + r * row + i * bytes;
        __m512 sum[M], even[M], odd[M];
        for (int m = 0; m < M; m++) sum[m] = total[m], even[m] = odd[m] = _mm512_setzero_ps();
        for (int64_t g = i / each; i < stop; g++) {
            const int64_t last = (g + 1) * each < stop ? (g + 1) * each : stop;
            const __m512 s = _mm512_set1_ps(at(w.scale, w.narrow, r * groups + g));
            while (i < last) {
                for (const int64_t end = stretch(i, last); i < end; i++, p += bytes) {
                    __m512i a, b;
                    _mm_prefetch((const char*)p + ahead, _MM_HINT_T0);
                    decode.two(p, a, b);
                    meet<M>(a, b, x + i * M * RUN, even, odd);
                }
                for (int m = 0; m < M; m++) sum[m] = _mm512_fmadd_ps(_mm512_add_ps(even[m], odd[m]), s, sum[m]), even[m] = odd[m] = _mm512_setzero_ps();
            }
        }
        for (int m = 0; m < M; m++) total[m] = sum[m];
    }
};

// bfloat16
struct Plain : ByRuns {
    static constexpr int SUMS = 1;
    const uint16_t* w;
    const int64_t runs, row;
    Plain(const uint16_t* weight, int64_t k) : w(weight), runs(k / RUN), row(2 * k) {}
    static int64_t span(int64_t rows) { return rows < 8 ? 256 / rows : 16; }

    template <int M, int>
    inline void add(int64_t r, int64_t i, int64_t stop, bool rows, const uint16_t* x, __m512 (*sums)[M * SUMS]) const {
        __m512* total = sums[0];
        const int64_t ahead = rows ? 2 * row : AHEAD;
        const uint8_t* p = (const uint8_t*)w + r * row + i * 2 * RUN;
        __m512 even[M], odd[M];
        for (int m = 0; m < M; m++) even[m] = odd[m] = _mm512_setzero_ps();
        while (i < stop) {
            for (const int64_t end = stretch(i, stop); i < end; i++, p += 2 * RUN) {
                _mm_prefetch((const char*)p + ahead, _MM_HINT_T0);
                _mm_prefetch((const char*)p + ahead + 64, _MM_HINT_T0);
                meet<M>(_mm512_loadu_si512(p), _mm512_loadu_si512(p + 64), x + i * M * RUN, even, odd);
            }
            for (int m = 0; m < M; m++) total[m] = _mm512_add_ps(total[m], _mm512_add_ps(even[m], odd[m])), even[m] = odd[m] = _mm512_setzero_ps();
        }
    }
};

// M rows of x against n of W; where the first cache does not hold x, several rows meet as much as it holds. finish: what is
// done with the sums of a row
template <int M, class Reader, class Finish>
static void in_spans(const Reader& reader, int64_t n, int64_t k, const uint16_t* x, const Finish& finish) {
    constexpr int R = Reader::template AT_ONCE<M>, SUMS = Reader::SUMS * M;
    constexpr int64_t ROWS = 16;
    const int64_t span = reader.span(M), many = reader.runs > span ? ROWS : Reader::TOGETHER;
    uint16_t* own = Reader::template arranged<M>(x, k);
    const uint16_t* held = own ? own : x;
#pragma omp parallel for schedule(static)
    for (int64_t first = 0; first < n; first += many) {
        const Reader w = reader;  // of this thread's own, so that what it knows can stay in registers
        const int64_t count = n - first < many ? n - first : many;
        __m512 total[ROWS][SUMS];
        for (int64_t r = 0; r < count; r++)
            for (int m = 0; m < SUMS; m++) total[r][m] = _mm512_setzero_ps();
        for (int64_t i = 0; i < w.runs; i += span) {
            const int64_t stop = i + span < w.runs ? i + span : w.runs;
            int64_t r = 0;
            for (; r + R <= count; r += R) w.template add<M, R>(first + r, i, stop, w.runs > span, held, total + r);
            for (; r < count; r++) w.template add<M, 1>(first + r, i, stop, w.runs > span, held, total + r);
        }
        for (int64_t r = 0; r < count; r++) {
            for (int m = M; m < SUMS; m++) total[r][m - M] = _mm512_add_ps(total[r][m - M], total[r][m]);
            finish(first + r, total[r]);
        }
    }
    free(own);
}
#else
template <int KIND> struct Decode { explicit Decode(const Weight&) {} };
#endif

template <int KIND, int M>
static void rows_times(const Weight& w, const uint16_t* x, const float* sums, uint16_t* y) {
#ifdef WIDE
    const auto finish = [&](int64_t r, __m512* total) {
        if (w.zeros) take_zeros<M>(w, r * (w.k / w.group), sums, total);
        for (int m = 0; m < M; m++) y[m * w.n + r] = to_bf16(_mm512_reduce_add_ps(total[m]) * w.outer[r]);
    };
    if (KIND == TABLE32 && w.bits == 4 && (w.group < 128 || w.group % 128 == 0)) in_spans<M>(Nibbles(w), w.n, w.k, x, finish);
    else if (w.group > 64) in_spans<M>(Runs<KIND>(w), w.n, w.k, x, finish);
    else in_spans<M>(Grouped<KIND>(w), w.n, w.k, x, finish);
#else
    const int64_t groups = w.k / w.group;
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < w.n; r++) {
        const uint8_t* row = w.codes + r * (w.k / 8) * w.bits;
        float total[M] = {};
        for (int64_t g = 0; g < groups; g++) {
            const float s = at(w.scale, w.narrow, r * groups + g), z = w.zeros ? at(w.zero, w.narrow, r * groups + g) : 0;
            for (int64_t c = g * w.group; c < (g + 1) * w.group; c++) {
                const float v = code_value(w, row, c), value = w.zeros == 1 ? (v - z) * s : v * s - z;
                for (int m = 0; m < M; m++) total[m] += value * of_bf16(x[m * w.k + c]);
            }
        }
        for (int m = 0; m < M; m++) y[m * w.n + r] = to_bf16(total[m] * w.outer[r]);
    }
#endif
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

// M rows of x against W in bfloat16
template <int M>
static void dense_rows(const uint16_t* w, int64_t n, int64_t k, const uint16_t* x, uint16_t* y) {
#ifdef WIDE
    in_spans<M>(Plain(w, k), n, k, x, [&](int64_t r, __m512* total) {
        for (int m = 0; m < M; m++) y[m * n + r] = to_bf16(_mm512_reduce_add_ps(total[m]));
    });
#else
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < n; r++)
        for (int m = 0; m < M; m++) {
            float found = 0;
            for (int64_t c = 0; c < k; c++) found += of_bf16(w[r * k + c]) * of_bf16(x[m * k + c]);
            y[m * n + r] = to_bf16(found);
        }
#endif
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
