// x in int8 against codes that are whole numbers, by dot products of four bytes (VNNI): of 4 bits as they lie, of others once
// each has a byte (BITS 8). 16 rows of W are turned so that each is a lane; codes are multiplied unsigned, and what they are
// too large by comes off as a multiple of x's sum. Sums of a group are whole numbers, and groups follow one another with one
// multiplication and addition each: the bits of tiles. Few rows of x meet W as it is turned; for many what has been turned
// is held, and M rows at a time meet it.

#pragma once
#include <omp.h>
#include "whole.h"

#ifdef DOTS
static const int64_t DOTTED = 8;  // rows of x, at most, where they are few
static const int MANY = 8, SIDE = 2;  // where they are not: so many meet so many blocks of W at a time

struct Dotted {            // M rows of x
    const Weight w;
    const int32_t* x;      // [chunks of 64 bytes of W][M] words of four columns; of 4 bits even columns, then odd ones
    const int32_t* begin;  // [groups][M]: what sums begin with
    const float* sums;     // the same, where they multiply what a group takes off; or null
    const float* factors;  // [M]
    int64_t words;         // of x

    template <int M> Dotted from(int64_t m) const {
        const int64_t groups = w.k / w.group;
        return {w, x + m / M * words, begin + m * groups, sums ? sums + m * groups : nullptr, factors + m, words};
    }
};

template <int BITS> static const int64_t CHUNK = 512 / BITS;  // columns

// What a code is flipped by to be above 0: the bit that says it is negative
static inline int flipped(const Weight& w) { return w.kind != UINT8 && w.table[1 << (w.bits - 1)] & 0x8000 ? 1 << (w.bits - 1) : 0; }

// CHUNK codes of a row; a row of 4 bits may end within
template <int BITS> struct Chunk {
    const int64_t bytes, row;  // of a chunk, of a row
    const Unpack unpack;
    explicit Chunk(const Weight& w) : bytes(BITS == 4 ? 64 : 8 * w.bits), row(w.k * w.bits / 8), unpack(w.bits) {}
    __m512i operator()(const uint8_t* p, int64_t c) const {
        if (BITS == 8) return unpack(p + c * bytes);
        return _mm512_maskz_loadu_epi8(row - 64 * c >= 64 ? ~0ull : (1ull << (row - 64 * c)) - 1, p + 64 * c);
    }
};

// Codes of a chunk of 16 rows of W from p, turned as they are met
template <int BITS> struct Turned {
    static const int BLOCKS = 1;
    const Chunk<BITS> chunk;
    const uint8_t* p;
    const int64_t last;
    const __m512i flip;

    Turned(const Weight& w, int64_t n) : chunk(w), p(w.codes + n * chunk.row), last(w.n - 1 - n), flip(_mm512_set1_epi8(char(flipped(w)))) {}
    const uint8_t* line(int64_t i) const { return p + (i < last ? i : last) * chunk.row; }
    // What a word holds above 0: all of it, or of 4 bits the even columns and the odd ones
    __m512i codes(__m512i word) const {
        return BITS == 8 ? _mm512_xor_si512(word, flip) : _mm512_ternarylogic_epi64(word, flip, _mm512_set1_epi8(15), 0x28);  // (a ^ b) & c
    }
    __m512i odd_codes(__m512i word) const { return codes(_mm512_srli_epi16(word, 4)); }
    const __m512i* load(int64_t c, __m512i* room) const {
        for (int64_t i = 0; i < 16; i++) room[i] = chunk(line(i), c);
        turn(room);
        return room;
    }
    // PER of 16 words of chunk c from `part` onto sums of M rows of x; lines of the rows after these are fetched meanwhile
    template <int M, int PER> void dot(const __m512i* words, int64_t c, int part, const int32_t* x, __m512i (*all)[M]) const {
        __m512i* sums = all[0];
        constexpr int CHAINS = M < 4 ? 4 : 8 / M;  // sums under way, so that none waits for itself
        const char* next = (const char*)p + 16 * (chunk.row + c * chunk.bytes) + part * PER * chunk.bytes;
        __m512i a[CHAINS * M];
        for (int i = 0; i < CHAINS * M; i++) a[i] = i < M ? sums[i] : _mm512_setzero_si512();
#pragma GCC unroll 16
        for (int j = 0; j < PER; j++) {
            const __m512i word = words[part * PER + j], even = codes(word);
            _mm_prefetch(next + 64 * j, _MM_HINT_T2);
            if (BITS == 8) {
#pragma GCC unroll 8
                for (int m = 0; m < M; m++) {
                    __m512i& sum = a[j % CHAINS * M + m];
                    sum = _mm512_dpbusd_epi32(sum, even, _mm512_set1_epi32(x[16 * m + j]));
                }
                continue;
            }
            const __m512i odd = odd_codes(word);
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
                __m512i &one = a[2 * j % CHAINS * M + m], &two = a[(2 * j + 1) % CHAINS * M + m];
                one = _mm512_dpbusd_epi32(one, even, _mm512_set1_epi32(x[32 * m + j]));
                two = _mm512_dpbusd_epi32(two, odd, _mm512_set1_epi32(x[32 * m + 16 + j]));
            }
        }
        for (int m = 0; m < M; m++) {
            for (int c = 1; c < CHAINS; c++) a[m] = _mm512_add_epi32(a[m], a[c * M + m]);
            sums[m] = a[m];
        }
    }
};

// The same of SIDE blocks, turned before and a byte each: [SIDE][chunks][WORDS]
template <int BITS> struct Held {
    static const int BLOCKS = SIDE, WORDS = BITS == 4 ? 32 : 16;
    const __m512i* all;
    const int64_t apart;  // from block to block

    Held(const __m512i* all, int64_t apart) : all(all), apart(apart) {}
    static void fill(const Weight& w, int64_t n, __m512i* out) {
        const Turned<BITS> source(w, n);
        __m512i turned[16];
        for (int64_t c = 0; c * CHUNK<BITS> < w.k; c++, out += WORDS) {
            source.load(c, turned);
            for (int j = 0; j < 16; j++) {
                out[j] = source.codes(turned[j]);
                if (BITS == 4) out[16 + j] = source.odd_codes(turned[j]);
            }
        }
    }
    const __m512i* load(int64_t c, __m512i*) const { return all + c * WORDS; }
    template <int M, int PER> void dot(const __m512i* words, int64_t, int part, const int32_t* x, __m512i (*sums)[M]) const {
        const __m512i* from = words + part * PER;
        __m512i a[SIDE][M];
#pragma GCC unroll 2
        for (int b = 0; b < SIDE; b++)
#pragma GCC unroll 16
            for (int m = 0; m < M; m++) a[b][m] = sums[b][m];
#pragma GCC unroll 32
        for (int j = 0; j < WORDS; j++) {
            if (j % 16 >= PER) continue;
            __m512i codes[SIDE];
#pragma GCC unroll 2
            for (int b = 0; b < SIDE; b++) codes[b] = _mm512_load_si512(from + b * apart + j);
#pragma GCC unroll 16
            for (int m = 0; m < M; m++) {
                const __m512i given = _mm512_set1_epi32(x[WORDS * m + j]);
#pragma GCC unroll 2
                for (int b = 0; b < SIDE; b++) a[b][m] = _mm512_dpbusd_epi32(a[b][m], codes[b], given);
            }
        }
#pragma GCC unroll 2
        for (int b = 0; b < SIDE; b++)
#pragma GCC unroll 16
            for (int m = 0; m < M; m++) sums[b][m] = a[b][m];
    }
};

// One row of W, all of it a group, as it lies: found[m][0]
template <int BITS, int M>
static inline void dot_line(const uint8_t* p, const Chunk<BITS>& chunk, const int32_t* x, __m512i flip, int32_t (*found)[16]) {
    const __m512i low = _mm512_set1_epi8(15);
    __m512i a[2 * M];
    for (int i = 0; i < 2 * M; i++) a[i] = _mm512_setzero_si512();
    for (int64_t c = 0; c * chunk.bytes < chunk.row; c++, x += M * CHUNK<BITS> / 4) {
        _mm_prefetch((const char*)p + c * chunk.bytes + AHEAD, _MM_HINT_T0);
        const __m512i codes = chunk(p, c);
        const __m512i first = BITS == 8 ? _mm512_xor_si512(codes, flip) : _mm512_ternarylogic_epi64(codes, flip, low, 0x28);
        const __m512i odd = _mm512_ternarylogic_epi64(_mm512_srli_epi16(codes, 4), flip, low, 0x28);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            a[m] = _mm512_dpbusd_epi32(a[m], first, _mm512_loadu_si512(x + m * CHUNK<BITS> / 4));
            if (BITS == 4) a[M + m] = _mm512_dpbusd_epi32(a[M + m], odd, _mm512_loadu_si512(x + m * CHUNK<BITS> / 4 + 16));
        }
    }
    for (int m = 0; m < M; m++) found[m][0] = _mm512_reduce_add_epi32(_mm512_add_epi32(a[m], a[M + m]));
}

// Scales of 16 rows of W from n, and what they take off: [groups, to whole 16s][16] each
static void turned_units(const Weight& w, int64_t n, float* scale, float* less) {
    const int64_t groups = w.k / w.group;
    if (w.turned || groups == 1) {
        const __mmask16 held = first_of(w.n - n);
        const __m512 outer = _mm512_maskz_loadu_ps(held, w.outer + n);
        for (int64_t g = 0; g < groups; g++) {
            __m512 s, l;
            units(w, n * groups + 16 * g, outer, held, s, l);
            _mm512_store_ps(scale + 16 * g, s);
            if (less) _mm512_store_ps(less + 16 * g, l);
        }
        return;
    }
    for (int64_t g = 0; g < groups; g += 16) {
        const __mmask16 held = first_of(groups - g);
        __m512 s[16], l[16];
        for (int64_t i = 0; i < 16; i++) units(w, n + i < w.n ? n + i : w.n - 1, g, held, s[i], l[i]);
        turn((__m512i*)s);
        if (less) turn((__m512i*)l);
        for (int64_t i = 0; i < 16; i++) {
            _mm512_store_ps(scale + 16 * (g + i), s[i]);
            if (less) _mm512_store_ps(less + 16 * (g + i), l[i]);
        }
    }
}

// Blocks of 16 rows of W from n, their scales `units` apart. PER: words after which a group may end. A block beyond W's
// last row is what stood there before, and is not written.
template <int BITS, int M, int PER, class Source>
static void dot_block(const Dotted& d, const Source& source, int64_t n, int64_t count, const float* scale, const float* less, int64_t units, uint16_t* y) {
    constexpr int BLOCKS = Source::BLOCKS;
    const Weight& w = d.w;
    const int64_t per = PER * CHUNK<BITS> / 16, pieces = w.group / per, all = w.k / per;
    __m512i sums[BLOCKS][M], room[16];
    __m512 total[BLOCKS][M];
    for (int b = 0; b < BLOCKS; b++)
        for (int m = 0; m < M; m++) total[b][m] = _mm512_set1_ps(pieces == all ? -0.0f : 0.0f);
    const auto join = [&](int64_t g) {
        for (int b = 0; b < BLOCKS; b++) {
            const __m512 s = _mm512_load_ps(scale + b * units + 16 * g);
            for (int m = 0; m < M; m++) total[b][m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[b][m]), s, total[b][m]);
            if (!less) continue;
            const __m512 l = _mm512_load_ps(less + b * units + 16 * g);
            for (int m = 0; m < M; m++) total[b][m] = _mm512_fnmadd_ps(_mm512_set1_ps(d.sums[g * M + m]), l, total[b][m]);
        }
    };
    int64_t g = 0, piece = 0, done = 0;
    if constexpr (BLOCKS == 1)
        if (pieces == all) {
            alignas(64) int32_t found[M][16] = {};
            for (int64_t i = 0; i < 16 && i < w.n - n; i++) dot_line<BITS, M>(source.line(i), source.chunk, d.x, source.flip, (int32_t(*)[16])&found[0][i]);
            for (int m = 0; m < M; m++) sums[0][m] = _mm512_add_epi32(_mm512_load_si512(found[m]), _mm512_set1_epi32(d.begin[m]));
            join(0);
            done = all;
        }
    for (int64_t c = 0; done < all; c++) {
        const __m512i* words = source.load(c, room);
        const int32_t* x = d.x + c * M * CHUNK<BITS> / 4;
#pragma GCC unroll 4
        for (int part = 0; part < 16 / PER; part++) {
            if (done == all) break;
            if (piece == 0)
                for (int b = 0; b < BLOCKS; b++)
                    for (int m = 0; m < M; m++) sums[b][m] = _mm512_set1_epi32(d.begin[g * M + m]);
            source.template dot<M, PER>(words, c, part, x + part * PER, sums);
            done++;
            if (++piece < pieces) continue;
            join(g++);
            piece = 0;
        }
    }
    for (int b = 0; b < BLOCKS && n + 16 * b < w.n; b++) {
        const int64_t left = w.n - n - 16 * b;
        const __mmask16 rows = left >= 16 ? 0xffff : __mmask16((1u << left) - 1);
        for (int m = 0; m < count; m++) {
            const __m512 v = _mm512_mul_ps(total[b][m], _mm512_set1_ps(d.factors[m]));
            _mm256_mask_storeu_epi16(y + m * w.n + n + 16 * b, rows, (__m256i)_mm512_cvtneps_pbh(v));
        }
    }
}

// How many of n things of `bytes` a thread holds at a time: all threads have some to do, and they leave room for x in its cache
static int64_t blocks_of(int64_t n, int64_t bytes) {
    const int64_t each = n / omp_get_max_threads(), most = (512 << 10) / bytes;
    const int64_t found = each < most ? each : most;
    return found < 1 ? 1 : found;
}

template <int BITS, int M, int PER, bool HELD>
static void dot_rows(const Dotted& d, int64_t rows, uint16_t* y) {
    const Weight& w = d.w;
    const int64_t groups = w.k / w.group, units = (groups + 15) / 16 * 256, size = groups * (w.narrow ? 2 : 4);
    const int64_t words = (w.k + CHUNK<BITS> - 1) / CHUNK<BITS> * Held<BITS>::WORDS, step = HELD ? 16 * SIDE : 16;
    const int64_t run = HELD ? step * blocks_of((w.n + step - 1) / step, SIDE * words * 64) : step;
#pragma omp parallel
    {
        static thread_local Memory memory[2];
        float* scale = (float*)memory[0].of(run / 16 * units * 8);
        float* less = d.sums ? scale + run / 16 * units : nullptr;
        __m512i* held = HELD ? (__m512i*)memory[1].of(run / 16 * words * 64) : nullptr;
#pragma omp for schedule(static)
        for (int64_t first = 0; first < w.n; first += run) {
            const int64_t stop = first + run < w.n ? first + run : w.n;
            for (int64_t n = first, i = 0; n < stop; n += 16, i++) {
                fetch((const uint8_t*)w.scale + (n + 16) * size, 16 * size);
                if (w.zeros) fetch((const uint8_t*)w.zero + (n + 16) * size, 16 * size);
                turned_units(w, n, scale + i * units, less ? less + i * units : nullptr);
                if constexpr (HELD) Held<BITS>::fill(w, n, held + i * words);
            }
            for (int64_t m = 0; m < rows; m += M)
                for (int64_t n = first; n < stop; n += step) {
                    const int64_t i = (n - first) / 16, count = rows - m < M ? rows - m : M;
                    const float *s = scale + i * units, *l = less ? less + i * units : nullptr;
                    if constexpr (HELD) {
                        dot_block<BITS, M, PER>(d.from<M>(m), Held<BITS>(held + i * words, words), n, count, s, l, units, y + m * w.n);
                    } else {
                        dot_block<BITS, M, PER>(d, Turned<BITS>(w, n), n, count, s, l, units, y);
                    }
                }
        }
    }
}

// x: [rows, k] codes -> Dotted's x of m_all rows; those that are not there are 0
template <int BITS>
static void dot_words(const int8_t* x, int64_t rows, int64_t k, int64_t m_all, uint8_t* out) {
    constexpr int64_t columns = CHUNK<BITS>;
    alignas(64) uint8_t index[64];
    for (int i = 0; i < 64; i++) index[i] = uint8_t(2 * i);
    const __m512i even = _mm512_load_si512(index), odd = _mm512_add_epi8(even, _mm512_set1_epi8(1));
    for (int64_t c = 0; c < k; c += columns)
        for (int64_t m = 0; m < m_all; m++, out += columns) {
            const int64_t left = m < rows ? k - c : 0;
            __m512i part[2];
            for (int64_t i = 0; i < columns / 64; i++)
                part[i] = left > 64 * i ? _mm512_loadu_si512(x + m * k + c + 64 * i) : _mm512_setzero_si512();
            if (BITS == 8) _mm512_storeu_si512(out, part[0]);
            else {
                _mm512_storeu_si512(out, _mm512_permutex2var_epi8(part[0], even, part[1]));
                _mm512_storeu_si512(out + 64, _mm512_permutex2var_epi8(part[0], odd, part[1]));
            }
        }
}

template <int BITS, int M, bool HELD>
static void dots_of(const Weight& w, const Rounded& r, int64_t rows, uint16_t* y) {
    static thread_local Memory memory;
    const int64_t groups = w.k / w.group, padded = int64_t(r.factors.size()), all = (rows + M - 1) / M * M;
    const int64_t bytes = (w.k + CHUNK<BITS> - 1) / CHUNK<BITS> * CHUNK<BITS> * M;
    uint8_t* x = memory.of(all / M * bytes + groups * all * 8);
    int32_t* begin = (int32_t*)(x + all / M * bytes);
    float* sums = (float*)(begin + groups * all);
    const bool taken = w.zeros || w.kind == UINT8;
    const int32_t over = w.kind == UINT8 ? 128 : flipped(w);
#pragma omp parallel for schedule(static) if (HELD)
    for (int64_t first = 0; first < all; first += M) {
        dot_words<BITS>(r.codes.data() + first * w.k, rows - first, w.k, M, x + first / M * bytes);
        for (int64_t g = 0; g < groups; g++)
            for (int64_t m = 0; m < M; m++) {
                const int64_t at = first * groups + g * M + m;
                sums[at] = r.sums[g * padded + first + m];
                begin[at] = -over * int32_t(sums[at]);
            }
    }
    const Dotted d{w, (const int32_t*)x, begin, taken ? sums : nullptr, r.factors.data(), bytes / 4};
    if (w.group % CHUNK<BITS> == 0) dot_rows<BITS, M, 16, HELD>(d, rows, y);
    else if (w.group % (CHUNK<BITS> / 2) == 0) dot_rows<BITS, M, 8, HELD>(d, rows, y);
    else dot_rows<BITS, M, 4, HELD>(d, rows, y);
}

template <int BITS>
static void dots(const Weight& w, const Rounded& r, int64_t rows, uint16_t* y) {
    if (rows == 1) return dots_of<BITS, 1, false>(w, r, rows, y);
    if (rows == 2) return dots_of<BITS, 2, false>(w, r, rows, y);
    if (rows <= 4) return dots_of<BITS, 4, false>(w, r, rows, y);
    if (rows <= DOTTED) return dots_of<BITS, 8, false>(w, r, rows, y);
    dots_of<BITS, MANY, true>(w, r, rows, y);
}
#endif
