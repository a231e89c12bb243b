// Rows of a weight as tiles A: a step is 64 bytes of a row, and steps lie one TILE apart. A Fill writes columns [start,
// start + count) of row r to `line`; what is the same for all rows it has worked out as a Block.

#pragma once
#include "tiles.h"

#ifdef TILES
// bfloat16 as it is
struct Dense {
    static const int64_t COLUMNS = 32;  // of a step
    struct Block {};
    const uint16_t* w;
    int64_t n, k;
    Block block(int64_t) const { return {}; }
    const uint8_t* row(int64_t r, int64_t start) const { return (const uint8_t*)(w + r * k + start); }
    void operator()(const Block&, int64_t r, int64_t start, int64_t count, uint8_t* line) const {
        const uint16_t* p = w + r * k + start;
        for (int64_t c = 0; c < count; c += 32, line += TILE) _mm512_store_si512(line, _mm512_loadu_si512(p + c));
    }
};

// Of a block of up to 256 columns: which group each 16 of them belong to, from the first
struct Lanes {
    __m512i index;
    __mmask16 held;
    int64_t first, groups;
    int32_t run[2];  // the same of each 128
    Lanes(const Weight& w, int64_t start) : first(start / w.group), groups(w.k / w.group) {
        alignas(64) int32_t each[16];
        for (int64_t i = 0; i < 16; i++) each[i] = int32_t((start + 16 * i) / w.group - first);
        run[0] = each[0], run[1] = each[8];
        const int64_t left = groups - first;
        index = _mm512_load_si512(each);
        held = left >= 16 ? 0xffff : __mmask16((1u << left) - 1);
    }
};

// What a row's 16 times 16 columns multiply by, and what they take off
struct Scaling {
    alignas(64) float scale[16], less[16];
    // One of them in all lanes
    static __m512 each(const void* p, int32_t narrow, int64_t i) {
        if (narrow == 0) return _mm512_set1_ps(((const float*)p)[i]);
        const __m256i half = _mm256_set1_epi16(((const int16_t*)p)[i]);
        return narrow == 1 ? _mm512_cvtph_ps(half) : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }
    Scaling(const Weight& w, const Lanes& lanes, int64_t r) {
        const int64_t first = r * lanes.groups + lanes.first;
        const __m512 outer = _mm512_set1_ps(w.outer[r]);
        const __m512 s = _mm512_permutexvar_ps(lanes.index, loaded(w.scale, w.narrow, first, lanes.held));
        __m512 z = _mm512_setzero_ps();
        if (w.zeros) z = _mm512_permutexvar_ps(lanes.index, loaded(w.zero, w.narrow, first, lanes.held));
        _mm512_store_ps(less, _mm512_mul_ps(w.zeros == 1 ? _mm512_mul_ps(z, s) : z, outer));
        _mm512_store_ps(scale, _mm512_mul_ps(s, outer));
    }
};

static inline __m512 low_bf16(__m512i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(v)), 16)); }
static inline __m512 high_bf16(__m512i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(v, 1)), 16)); }

// Codes -> (element[code] - zero) * scale in bfloat16
template <int KIND> struct Values {
    static const int64_t COLUMNS = 32;
    using Block = Lanes;
    const Weight w;
    const int64_t n, k;
    const Decode<KIND> decode;
    explicit Values(const Weight& weight) : w(weight), n(w.n), k(w.k), decode(w) {}
    Lanes block(int64_t start) const { return Lanes(w, start); }
    const uint8_t* row(int64_t r, int64_t start) const { return w.codes + (r * w.k + start) / 8 * w.bits; }
    static __m512i scaled(__m512i v, const Scaling& s, int64_t i) {
        const __m512 a = _mm512_fmsub_ps(low_bf16(v), _mm512_set1_ps(s.scale[i]), _mm512_set1_ps(s.less[i]));
        const __m512 b = _mm512_fmsub_ps(high_bf16(v), _mm512_set1_ps(s.scale[i + 1]), _mm512_set1_ps(s.less[i + 1]));
        return (__m512i)_mm512_cvtne2ps_pbh(b, a);
    }
    void operator()(const Block& lanes, int64_t r, int64_t start, int64_t count, uint8_t* line) const {
        const Scaling s(w, lanes, r);
        const uint8_t* p = row(r, start);
        const int64_t bytes = 8 * w.bits;
        if (KIND == INT8 || KIND == UINT8) {
            for (int64_t i = 0; 16 * i < count; i += 2, p += 32, line += TILE)
                _mm512_store_si512(line, (__m512i)_mm512_cvtne2ps_pbh(byte(p + 16, s, i + 1), byte(p, s, i)));
            return;
        }
        for (int64_t i = 0; 16 * i < count; i += 4, p += bytes, line += 2 * TILE) {
            __m512i a, b;
            decode.two(p, a, b);
            _mm512_store_si512(line, scaled(a, s, i));
            _mm512_store_si512(line + TILE, scaled(b, s, i + 2));
        }
    }
    // 16 codes that are whole numbers
    static __m512 byte(const uint8_t* p, const Scaling& s, int64_t i) {
        const __m128i codes = _mm_loadu_si128((const __m128i*)p);
        const __m512 v = _mm512_cvtepi32_ps(KIND == INT8 ? _mm512_cvtepi8_epi32(codes) : _mm512_cvtepu8_epi32(codes));
        return _mm512_fmsub_ps(v, _mm512_set1_ps(s.scale[i]), _mm512_set1_ps(s.less[i]));
    }
};

// Codes -> element[code], where a whole row has one scale: sums are multiplied by it
template <int KIND> struct Elements {
    static const int64_t COLUMNS = 32;
    struct Block {};
    const Weight w;
    const int64_t n, k;
    const Decode<KIND> decode;
    explicit Elements(const Weight& weight) : w(weight), n(w.n), k(w.k), decode(w) {}
    Block block(int64_t) const { return {}; }
    const uint8_t* row(int64_t r, int64_t start) const { return w.codes + (r * w.k + start) / 8 * w.bits; }
    void operator()(const Block&, int64_t r, int64_t start, int64_t count, uint8_t* line) const {
        const uint8_t* p = row(r, start);
        const int64_t bytes = 8 * w.bits;
        for (int64_t c = 0; c < count; c += 64, p += bytes, line += 2 * TILE) {
            __m512i a, b;
            decode.two(p, a, b);
            _mm512_store_si512(line, a);
            _mm512_store_si512(line + TILE, b);
        }
    }
};

// Codes of 4 bits: their 16 values are scaled, and looked up. SHARE: columns of one scale, 64 for more
template <int SHARE> struct Nibbles {
    static const int64_t COLUMNS = 32;
    using Block = Lanes;
    const Weight w;
    const int64_t n, k;
    const __m512 table;
    explicit Nibbles(const Weight& weight) : w(weight), n(w.n), k(w.k), table(low_bf16(_mm512_loadu_si512(w.table))) {}
    Lanes block(int64_t start) const { return Lanes(w, start); }
    const uint8_t* row(int64_t r, int64_t start) const { return w.codes + (r * w.k + start) / 2; }
    __m512 values(const Scaling& s, int64_t i) const { return _mm512_fmsub_ps(table, _mm512_set1_ps(s.scale[i]), _mm512_set1_ps(s.less[i])); }
    // What 32 columns look up; where 16 share a scale, there is a second table for those behind
    __m512i both(const Scaling& s, int64_t i) const {
        if (SHARE > 16) return _mm512_castsi256_si512((__m256i)_mm512_cvtneps_pbh(values(s, i)));
        return (__m512i)_mm512_cvtne2ps_pbh(values(s, i + 1), values(s, i));
    }
    // Columns 2j and 2j + 1 of 32 to words 2j and 2j + 1
    static __m512i words(const uint8_t* p) {
        const __m512i two = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
        const __m512i codes = _mm512_and_si512(_mm512_or_si512(two, _mm512_slli_epi32(two, 12)), _mm512_set1_epi16(15));
        return SHARE > 16 ? codes : _mm512_or_si512(codes, behind());
    }
    static __m512i behind() { return _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1); }
    void operator()(const Block& lanes, int64_t r, int64_t start, int64_t count, uint8_t* line) const {
        const Scaling s(w, lanes, r);
        const uint8_t* p = row(r, start);
        for (int64_t i = 0; 16 * i < count; i += 4, p += 32, line += 2 * TILE) {
            const __m512i a = both(s, i), b = SHARE == 64 ? a : both(s, i + 2);
            _mm512_store_si512(line, _mm512_permutexvar_epi16(words(p), a));
            _mm512_store_si512(line + TILE, _mm512_permutexvar_epi16(words(p + 16), b));
        }
    }
};

// The same in whole runs of 128 columns with scales of 64 or more: word i of a run holds columns 4i to 4i + 3, and step j
// gets columns 4i + j, as `by_words` has laid x. Only the lowest 5 bits of a word are looked at
struct Words : Nibbles<64> {
    using Nibbles<64>::Nibbles;
    // A run with one scale and no zeros, the most usual: without the detour by 16 scales at once
    void symmetric(const Lanes& lanes, int64_t r, int64_t count, const uint8_t* p, uint8_t* line) const {
        const int64_t first = r * lanes.groups + lanes.first;
        const __m512 values = table, outer = _mm512_set1_ps(w.outer[r]);  // here: what is stored could be any of a Weight
        const void* scale = w.scale;
        const int32_t narrow = w.narrow;
        for (int64_t i = 0; 128 * i < count; i++, p += 64, line += 4 * TILE) {
            const __m512i codes = _mm512_loadu_si512(p);
            const __m512 v = _mm512_mul_ps(values, _mm512_mul_ps(Scaling::each(scale, narrow, first + lanes.run[i]), outer));
            const __m512i found = (__m512i)_mm512_cvtne2ps_pbh(v, v);
            _mm512_store_si512(line, _mm512_permutexvar_epi16(codes, found));
            _mm512_store_si512(line + TILE, _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), found));
            _mm512_store_si512(line + 2 * TILE, _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 8), found));
            _mm512_store_si512(line + 3 * TILE, _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 12), found));
        }
    }
    void operator()(const Block& lanes, int64_t r, int64_t start, int64_t count, uint8_t* line) const {
        const bool one = w.group % 128 == 0;
        if (one && !w.zeros) return symmetric(lanes, r, count, row(r, start), line);
        const Scaling s(w, lanes, r);
        const uint8_t* p = row(r, start);
        const __m512i low = _mm512_set1_epi16(15), second = behind();
        for (int64_t i = 0; 16 * i < count; i += 8, p += 64, line += 4 * TILE) {
            const __m512i codes = _mm512_loadu_si512(p);
            const __m512 first = values(s, i);
            const __m512i found = (__m512i)_mm512_cvtne2ps_pbh(one ? first : values(s, i + 4), first);
            const __m512i each[4] = {codes, _mm512_srli_epi16(codes, 4), _mm512_srli_epi16(codes, 8), _mm512_srli_epi16(codes, 12)};
            for (int j = 0; j < 4; j++) {
                const __m512i at = one ? each[j] : _mm512_or_si512(_mm512_and_si512(each[j], low), second);
                _mm512_store_si512(line + j * TILE, _mm512_permutexvar_epi16(at, found));
            }
        }
    }
};

// x: [rows, k] bfloat16 -> the same with every run of 128 columns as [4, 32]
static void by_words(const uint16_t* x, int64_t rows, int64_t k, uint16_t* out) {
    alignas(64) uint16_t index[32];
    for (int i = 0; i < 32; i++) index[i] = uint16_t(4 * (i & 15));
    const __m512i at = _mm512_load_si512(index);
    for (int64_t c = 0; c < rows * k; c += 128)
        for (int j = 0; j < 4; j++) {
            const __m512i from = _mm512_add_epi16(at, _mm512_set1_epi16(int16_t(j)));
            const __m512i a = _mm512_permutex2var_epi16(_mm512_loadu_si512(x + c), from, _mm512_loadu_si512(x + c + 32));
            const __m512i b = _mm512_permutex2var_epi16(_mm512_loadu_si512(x + c + 64), from, _mm512_loadu_si512(x + c + 96));
            _mm512_storeu_si512(out + c + 32 * j, _mm512_mask_blend_epi64(0xf0, a, b));
        }
}

// Codes of whole numbers as int8; unsigned ones of 8 bits less 128
struct Ints {
    static const int64_t COLUMNS = 64;
    struct Block {};
    const Weight w;
    const int64_t n, k;
    const Unpack unpack;
    __m512i low, high, flip;
    explicit Ints(const Weight& weight) : w(weight), n(w.n), k(w.k), unpack(w.bits) {
        int8_t values[128];
        for (int i = 0; i < 128; i++) values[i] = int8_t(of_bf16(w.table[i]));
        low = _mm512_loadu_si512(values), high = _mm512_loadu_si512(values + 64);
        flip = _mm512_set1_epi8(w.kind == UINT8 ? char(-128) : 0);
    }
    Block block(int64_t) const { return {}; }
    const uint8_t* row(int64_t r, int64_t start) const { return w.codes + (r * w.k + start) / 8 * w.bits; }
    void operator()(const Block&, int64_t r, int64_t start, int64_t count, uint8_t* line) const {
        const uint8_t* p = row(r, start);
        const int64_t bytes = 8 * w.bits;
        const bool whole = bytes == 64, small = w.bits <= 6;
        for (int64_t c = 0; c < count; c += 64, p += bytes, line += TILE) {
            const __m512i codes = unpack(p);
            const __m512i found = small ? _mm512_permutexvar_epi8(codes, low) : _mm512_permutex2var_epi8(low, codes, high);
            _mm512_store_si512(line, whole ? _mm512_xor_si512(codes, flip) : found);
        }
    }
};
#endif
