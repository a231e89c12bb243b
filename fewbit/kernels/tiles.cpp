// y = x W^T through tiles, for few rows of x and for many: runs of rows of W become tiles in cache and meet every row of x.
// x is bfloat16 as it is, or rounded to int8 with a scale for each row, whose sums with whole codes are exact. Where there are
// no tiles, int8 takes the vector units for any number of rows.

#include <omp.h>
#include "dots.h"
#include "fill.h"

#ifdef TILES
static const int64_t ROWS = 512;  // of x that meet a run of W; of more, the run is made again
static const int64_t RUN = 256;   // rows of W: its tiles, and the sums, stay in the cache of a core
static const int64_t FEW = 32;    // rows of x up to which nothing of W is met twice, and runs are as short as can be
static const int64_t STEPS = 8;   // at a time: 256 columns of bfloat16, 512 of int8

struct Input {  // x as tiles B
    const uint8_t* tiles;
    int64_t rows, cols, steps;
    const uint8_t* at(int64_t m, int64_t step) const { return tiles + (m * steps + step * cols) * 64; }
};

struct Place {  // of 32 rows of W, from r of a run that begins at n, and 16 or 32 rows of x from m
    int64_t n, r, m, step, count, all;
    const uint8_t* w;
};

// bfloat16: sums are what they are, or a scale of the row times that
struct Plain {
    const Weight* w;  // or null
    struct Local {};
    int64_t bytes() const { return 64; }
    void prepare(Local&, int64_t, int64_t, int64_t, int64_t) const {}
    template <bool TWO> void add(const Local&, float* c, const Place& p, const Input& x) const {
        if (p.step) load_c<TWO>(c);
        else zero_c<TWO>();
        steps<false, TWO>(p.w, STEPS * 16 * 64, x.at(p.m, p.step), 16 * 64 * x.steps, x.cols, p.count);
        store_c<TWO>(c);
    }
    __m512 value(const float* c, int64_t n, int64_t) const {
        const __m512 v = _mm512_loadu_ps(c);
        return w ? _mm512_mul_ps(v, _mm512_set1_ps(at(w->scale, w->narrow, n) * w->outer[n])) : v;
    }
    float factor(int64_t) const { return 1; }
};

// int8: sums of a group are whole numbers, multiplied by its scale, less its zero times the sum of x there
struct Whole {
    const Weight w;
    const float* factors;  // of rows of x
    const float* sums;     // [groups, rows of x], whole numbers
    int64_t rows;          // as sums has them
    struct Local { float scale[RUN * STEPS], less[RUN * STEPS]; };

    bool one() const { return w.group == w.k; }
    int64_t bytes() const { return w.group < 64 ? w.group : 64; }  // of K at a time: less than a step where groups are
    void prepare(Local& l, int64_t n, int64_t count, int64_t step, int64_t steps) const {
        if (one()) return;
        const int64_t first = step * 64 / w.group;
        const __mmask16 held = __mmask16((1u << ((steps * 64 + w.group - 1) / w.group)) - 1);
        for (int64_t r = 0; r < count; r++) {
            __m512 scale, less;
            units(w, n + r < w.n ? n + r : w.n - 1, first, held, scale, less);
            _mm256_storeu_ps(l.scale + r * STEPS, _mm512_castps512_ps256(scale));
            _mm256_storeu_ps(l.less + r * STEPS, _mm512_castps512_ps256(less));
        }
    }
    template <bool TWO> void add(const Local& l, float* c, const Place& p, const Input& x) const {
        if (one()) {
            if (p.step) load_c<TWO>(c);
            else zero_c<TWO>();
            steps<true, TWO>(p.w, STEPS * 16 * 64, x.at(p.m, p.step), 16 * 64 * x.steps, x.cols, p.count);
            return store_c<TWO>(c);
        }
        alignas(64) int32_t found[STEPS * 4 * C];
        const int64_t each = w.group / bytes(), count = p.count * 64 / w.group, first = p.step * 64 / w.group;
        for (int64_t g = 0; g < count; g++) {
            const int64_t step = g * w.group / 64, from = g * w.group % 64;
            zero_c<TWO>();
            steps<true, TWO>(p.w + step * TILE + from, STEPS * 16 * 64, x.at(p.m, p.step + step) + from * x.cols, 16 * 64 * x.steps, x.cols, each);
            store_c<TWO>(found + g * 4 * C);
        }
        for (int64_t i = 0; i < 4; i++) {
            if (!TWO && i % 2) continue;
            const int64_t r = p.r + i / 2 * 16;
            const float* taken = sums ? sums + first * rows + p.m + i % 2 * 16 : nullptr;
            join(c + i * C, found + i * C, count, l.scale + r * STEPS, l.less + r * STEPS, taken, p.step == 0);
        }
    }
    // The sums of some groups, each times its scale, onto a tile C
    void join(float* c, const int32_t* found, int64_t count, const float* scale, const float* less, const float* taken, bool first) const {
        __m512 v[16];
        for (int64_t r = 0; r < 16; r++) v[r] = first ? _mm512_setzero_ps() : _mm512_load_ps(c + 16 * r);
        for (int64_t g = 0; g < count; g++) {
            for (int64_t r = 0; r < 16; r++)
                v[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(found + g * 4 * C + 16 * r)), _mm512_set1_ps(scale[r * STEPS + g]), v[r]);
            if (!taken) continue;
            const __m512 t = _mm512_loadu_ps(taken + g * rows);
            for (int64_t r = 0; r < 16; r++) v[r] = _mm512_fnmadd_ps(t, _mm512_set1_ps(less[r * STEPS + g]), v[r]);
        }
        for (int64_t r = 0; r < 16; r++) _mm512_store_ps(c + 16 * r, v[r]);
    }
    __m512 value(const float* c, int64_t n, int64_t m) const {
        if (!one()) return _mm512_loadu_ps(c);
        __m512 scale, less;
        units(w, n, 0, 1, scale, less);
        const __m512 v = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(c)), _mm512_broadcastss_ps(_mm512_castps512_ps128(scale)));
        return sums ? _mm512_fnmadd_ps(_mm512_loadu_ps(sums + m), _mm512_broadcastss_ps(_mm512_castps512_ps128(less)), v) : v;
    }
    float factor(int64_t m) const { return factors[m]; }
};

// A tile C, [n][m], -> 16 columns of y
template <class Op>
static void finish(const Op& op, const float* c, int64_t n, int64_t m, int64_t all, int64_t rows, uint16_t* y) {
    __m512i r[16];
    for (int64_t i = 0; i < 16; i++) r[i] = _mm512_castps_si512(op.value(c + 16 * i, n + i < all ? n + i : all - 1, m));
    turn(r);
    const __mmask16 held = all - n >= 16 ? 0xffff : __mmask16((1u << (all - n)) - 1);
    for (int64_t i = 0; i < 16 && m + i < rows; i++) {
        const __m512 v = _mm512_mul_ps(_mm512_castsi512_ps(r[i]), _mm512_set1_ps(op.factor(m + i)));
        _mm256_mask_storeu_epi16(y + (m + i) * all + n, held, (__m256i)_mm512_cvtneps_pbh(v));
    }
}

// Rows of a run, so that all threads have the same to do
static int64_t run_of(int64_t n, int64_t rows) {
    if (rows <= FEW) return 32;
    const int64_t threads = omp_get_max_threads(), runs = ((n + RUN - 1) / RUN + threads - 1) / threads * threads;
    return ((n + runs - 1) / runs + 31) / 32 * 32;
}

template <class Fill>
static void fill(const Fill& f, int64_t n, int64_t rows, int64_t step, int64_t count, uint8_t* out) {
    const int64_t start = step * Fill::COLUMNS, columns = count * Fill::COLUMNS;
    const bool last = start + columns == f.k;
    const auto block = f.block(start);
    for (int64_t r = 0; r < rows; r++) {
        uint8_t* line = out + r / 16 * STEPS * TILE + r % 16 * 64;
        if (n + r < f.n) {
            const uint8_t* p = f.row(n + r, start);
            fetch(last ? f.row(n + r + rows, 0) : f.row(n + r, start + columns), f.row(n + r, start + columns) - p);
            f(block, n + r, start, columns, line);
        } else for (int64_t i = 0; i < count; i++) _mm512_store_si512(line + i * TILE, _mm512_setzero_si512());
    }
}

// The same for few rows of x, bit for bit: sums stay in their tiles along a whole run of 32 rows of W.
template <bool TWO, class Fill, class Op>
static void few(const Fill& f, const Op& op, const Input& x, uint16_t* y) {
#pragma omp parallel
    {
        static thread_local Memory memory;
        uint8_t* panel = memory.of(32 * STEPS * 64 + 4 * C * 4);
        float* sums = (float*)(panel + 32 * STEPS * 64);
        const Tiles tiles(x.cols);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < f.n; n += 32) {
            zero_c<TWO>();
            for (int64_t step = 0; step < x.steps; step += STEPS) {
                const int64_t count = x.steps - step < STEPS ? x.steps - step : STEPS;
                fill(f, n, 32, step, count, panel);
                steps<false, TWO>(panel, STEPS * 16 * 64, x.at(0, step), 16 * 64 * x.steps, x.cols, count);
            }
            store_c<TWO>(sums);
            for (int64_t m = 0; m < x.rows; m += 16)
                for (int64_t r = 0; r < 32 && n + r < f.n; r += 16)
                    finish(op, sums + r / 16 * 2 * C + m / 16 * C, n + r, m, f.n, x.rows, y);
        }
    }
}

template <class Fill, class Op>
static void product(const Fill& f, const Op& op, const Input& x, int64_t most, uint16_t* y) {
    const int64_t run = run_of(f.n, x.rows), held = x.rows < ROWS ? (x.rows + 31) / 32 * 32 : ROWS;
#pragma omp parallel
    {
        static thread_local Memory memory[3];
        uint8_t* panel = memory[0].of(run * STEPS * 64);
        float* sums = (float*)memory[1].of(run * held * 4);
        auto& local = *(typename Op::Local*)memory[2].of(sizeof(typename Op::Local));
        const Tiles tiles(x.cols, op.bytes());
#pragma omp for schedule(static)
        for (int64_t n = 0; n < f.n; n += run) {
            const int64_t here = f.n - n < run ? (f.n - n + 31) / 32 * 32 : run;
            for (int64_t first = 0; first < x.rows; first += ROWS) {
                const int64_t stop = first + ROWS < x.rows ? first + ROWS : x.rows;
                for (int64_t step = 0; step < x.steps; step += most) {
                    const int64_t count = x.steps - step < most ? x.steps - step : most;
                    fill(f, n, here, step, count, panel);
                    op.prepare(local, n, here, step, count);
                    for (int64_t m = first; m < stop; m += 32)
                        for (int64_t r = 0; r < here; r += 32) {
                            const Place p{n, r, m, step, count, x.steps, panel + r * STEPS * 64};
                            float* c = sums + (m - first) * run + r * 32;
                            if (m + 16 < x.rows) op.template add<true>(local, c, p, x);
                            else op.template add<false>(local, c, p, x);
                        }
                }
                for (int64_t m = first; m < stop; m += 16)
                    for (int64_t r = 0; r < here && n + r < f.n; r += 16) {
                        const float* c = sums + ((m - first) / 32 * 32) * run + r / 32 * 4 * C + r / 16 % 2 * 2 * C + m / 16 % 2 * C;
                        finish(op, c, n + r, m, f.n, x.rows, y);
                    }
            }
        }
    }
}

// Steps at a time: whole groups, up to STEPS of them
static int64_t most(const Weight& w) {
    if (w.group == w.k) return STEPS;
    return w.group < 64 ? STEPS * w.group / 64 : STEPS / (w.group / 64) * (w.group / 64);
}

static const uint8_t* laid(Memory& memory, const void* x, int64_t rows, int64_t bytes) {
    uint8_t* out = memory.of(rows < 16 ? rows * bytes : (rows + 15) / 16 * 16 * bytes);
    lay((const uint8_t*)x, rows, bytes, out);
    return out;
}

template <class Fill>
static void plain(const Fill& f, const Weight* scale, const uint16_t* x, int64_t rows, uint16_t* y) {
    static thread_local Memory memory;
    const Input in{laid(memory, x, rows, f.k * 2), rows, rows < 16 ? rows : 16, f.k / 32};
    if (rows <= 16) return few<false>(f, Plain{scale}, in, y);
    if (rows <= 32) return few<true>(f, Plain{scale}, in, y);
    product(f, Plain{scale}, in, STEPS, y);
}

template <int KIND>
static void by_kind(const Weight& w, const uint16_t* x, int64_t rows, uint16_t* y) {
    if (w.group == w.k && !w.zeros) return plain(Elements<KIND>(w), &w, x, rows, y);
    plain(Values<KIND>(w), nullptr, x, rows, y);
}
#endif

extern "C" {

// 2 where the processor has tiles and we may use them, 1 where it has vectors for whole numbers, 0 where it has neither
int32_t tiles_ready() {
#ifdef TILES
    if (allowed()) return 2;
#endif
#ifdef DOTS
    return 1;
#else
    return 0;
#endif
}

#ifdef TILES
// x: [rows, k], w: [n, k] -> y: [rows, n], all bfloat16; k in whole steps
void tiles_dense(const uint16_t* w, int64_t n, int64_t k, const uint16_t* x, int64_t rows, uint16_t* y) {
    plain(Dense{w, n, k}, nullptr, x, rows, y);
}

// x: [rows, k] bfloat16 -> y: [rows, n], weights rounded to bfloat16
void tiles_values(const Weight* w, const uint16_t* x, int64_t rows, uint16_t* y) {
    if (w->bits == 4) {
        if (w->group == 16) return plain(Nibbles<16>(*w), nullptr, x, rows, y);
        if (w->group == 32) return plain(Nibbles<32>(*w), nullptr, x, rows, y);
        if (w->k % 128) return plain(Nibbles<64>(*w), nullptr, x, rows, y);
        static thread_local Memory memory;
        uint16_t* words = (uint16_t*)memory.of(rows * w->k * 2);
        by_words(x, rows, w->k, words);
        return plain(Words(*w), nullptr, words, rows, y);
    }
    switch (w->kind) {
        case TABLE32: return by_kind<TABLE32>(*w, x, rows, y);
        case TABLE64: return by_kind<TABLE64>(*w, x, rows, y);
        case TABLE128: return by_kind<TABLE128>(*w, x, rows, y);
        case INT8: return by_kind<INT8>(*w, x, rows, y);
        default: return by_kind<UINT8>(*w, x, rows, y);
    }
}
#endif

#ifdef DOTS
// x: [rows, k] bfloat16, each row rounded to int8, its largest value at `reach`; `least`: the scale of a row of zeros
void tiles_whole(const Weight* w, const uint16_t* x, int64_t rows, float reach, float least, uint16_t* y) {
    static const bool by_tiles = tiles_ready() == 2;
    const bool dotted = rows <= DOTTED || !by_tiles, summed = w->zeros || w->kind == UINT8 || dotted;
    const Rounded r = rounded(x, rows, w->k, w->group, reach, least, summed);
    if (dotted) return w->bits == 4 ? dots<4>(*w, r, rows, y) : dots<8>(*w, r, rows, y);
#ifdef TILES
    static thread_local Memory memory;
    const Input in{laid(memory, r.codes.data(), rows, w->k), rows, rows < 16 ? rows : 16, w->k / 64};
    const Whole op{*w, r.factors.data(), summed ? r.sums.data() : nullptr, int64_t(r.factors.size())};
    product(Ints(*w), op, in, most(*w), y);
#endif
}
#endif

}
