// Attention of prompts: many queries of one text, in bfloat16, that read keys and values 64 at a time.
//
// A task is some queries of heads that share a key head: their rows meet a block of keys together. Blocks begin where the
// text does, and a row's sums do not know of the rows beside it, so neither company nor where a prompt is cut moves a bit.
// Softmax goes along: highest so far, sum so far, and what has been added up is made smaller where the highest grows.

#pragma once
#ifdef DOTS

static const int64_t KEYS = 64, HELD = 96, HIGH = 6;  // keys of a block, rows of a task, rows that registers hold

static inline int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// c [ROWS, 16 COLUMNS] = c * before [ROWS], or 0 without, + sum of a [ROWS, pairs] . b [pairs, 16 COLUMNS]: pairs of bfloat16
template <int ROWS, int COLUMNS>
static inline void sums(const uint32_t* a, int64_t a_step, const uint32_t* b, int64_t b_step, float* c, int64_t c_step, int64_t pairs, const float* before) {
    __m512 total[ROWS][COLUMNS];
    for (int r = 0; r < ROWS; r++)
        for (int j = 0; j < COLUMNS; j++)
            total[r][j] = before ? _mm512_mul_ps(_mm512_loadu_ps(c + r * c_step + 16 * j), _mm512_set1_ps(before[r])) : _mm512_setzero_ps();
    for (int64_t p = 0; p < pairs; p++) {
        __m512i w[COLUMNS];
        for (int j = 0; j < COLUMNS; j++) w[j] = _mm512_loadu_si512(b + p * b_step + 16 * j);
        for (int r = 0; r < ROWS; r++) {
            const __m512i x = _mm512_set1_epi32(a[r * a_step + p]);
            for (int j = 0; j < COLUMNS; j++) total[r][j] = _mm512_dpbf16_ps(total[r][j], (__m512bh)x, (__m512bh)w[j]);
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int j = 0; j < COLUMNS; j++) _mm512_storeu_ps(c + r * c_step + 16 * j, total[r][j]);
}

// The same of `rows`, a multiple of HIGH, and n columns, a multiple of 16
static void product(const uint32_t* a, int64_t a_step, const uint32_t* b, float* c, int64_t rows, int64_t n, int64_t pairs, const float* before) {
    for (int64_t r = 0; r < rows; r += HIGH)
        for (int64_t i = 0; i < n; i += 64) {
            const auto run = n - i >= 64 ? sums<HIGH, 4> : n - i >= 48 ? sums<HIGH, 3> : n - i >= 32 ? sums<HIGH, 2> : sums<HIGH, 1>;
            run(a + r * a_step, a_step, b + i, n, c + r * n + i, n, pairs, before ? before + r : nullptr);
        }
}

static inline void row_of(uint16_t* to, const uint16_t* from, int64_t n) { memcpy(to, from, n * 2); }
static inline void row_of(uint16_t* to, Coded from, int64_t n) {  // what a code means is exact in bfloat16
    for (int64_t i = 0; i < n; i++) to[i] = bits_of(load(from + i)) >> 16;
}

// 64 rows of `wide` numbers, a multiple of 32 -> [wide / 2, 64] pairs
static void pair_columns(const uint16_t* rows, int64_t wide, uint32_t* to) {
    for (int64_t k = 0; k < KEYS; k += 16)
        for (int64_t d = 0; d < wide; d += 32) {
            __m512i r[16];
            for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(rows + (k + i) * wide + d);
            turn(r);
            for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + (d / 2 + i) * KEYS + k, r[i]);
        }
}

// 64 rows of `wide` numbers, a multiple of 16 -> [32, wide] pairs
static void pair_rows(const uint16_t* rows, int64_t wide, uint32_t* to) {
    for (int64_t k = 0; k < KEYS; k += 2)
        for (int64_t d = 0; d < wide; d += 16) {
            const auto wider = [&](int64_t row) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(rows + row * wide + d))); };
            _mm512_storeu_si512(to + k / 2 * wide + d, _mm512_or_si512(wider(k), _mm512_slli_epi32(wider(k + 1), 16)));
        }
}

struct Desk {  // what a thread works on
    std::vector<uint16_t> query, keys, values, weights;
    std::vector<uint32_t> turned, paired;
    std::vector<float> scores, out, top, total, before;
};

// `shared` heads from `first`, of key head g, of `count` queries from the span's `from`
template <typename P>
static void prompt(const Attend& a, P keys, P values, int64_t span, int64_t g, int64_t first, int64_t shared, int64_t from, int64_t count, Desk& d) {
    const int64_t rows = count * shared, high = up(rows, HIGH), size = up(a.size, 32), wide = up(a.value_size, 16);
    const int64_t* slots = a.slots[span];
    const int64_t place = a.lengths[span] - a.counts[span] + from, stop = place + count;  // of the first query in the text
    d.query.assign(high * size, 0), d.keys.assign(KEYS * size, 0), d.values.assign(KEYS * wide, 0), d.weights.assign(high * KEYS, 0);
    d.turned.resize(size / 2 * KEYS), d.paired.resize(KEYS / 2 * wide), d.scores.resize(high * KEYS), d.out.assign(high * wide, 0.0f);
    d.top.assign(high, -INFINITY), d.total.assign(high, 0.0f), d.before.assign(high, 1.0f);
    for (int64_t r = 0; r < rows; r++) {
        const int64_t token = a.rows[span] + from + r / shared, head = first + r % shared;
        row_of(d.query.data() + r * size, (const uint16_t*)a.query + (token * a.heads + head) * a.size, a.size);
        if (a.sinks) d.top[r] = a.sinks[head], d.total[r] = 1.0f;
    }
    const int64_t seen = a.window && place + 1 > a.window ? place + 1 - a.window : 0;  // the first that any query sees
    for (int64_t block = seen / KEYS * KEYS; block < stop; block += KEYS) {
        const int64_t here = std::min(KEYS, stop - block);
        float scale[KEYS] = {}, value_scale[KEYS] = {};
        for (int64_t t = 0; t < KEYS; t++) {  // of what is not there, zeros
            if (t >= here) {
                std::fill_n(d.keys.data() + t * size, size, 0), std::fill_n(d.values.data() + t * wide, wide, 0);
                continue;
            }
            const int64_t slot = slots[block + t], at = slot * a.key_heads + g;
            row_of(d.keys.data() + t * size, keys + at * a.size, a.size);
            row_of(d.values.data() + t * wide, values + at * a.value_step, a.value_size);
            scale[t] = a.scaling * (a.codes ? a.key_scale[slot * a.scale_step + g] : 1.0f);
            value_scale[t] = a.codes ? a.value_scale[slot * a.scale_step + g] : 1.0f;
        }
        pair_columns(d.keys.data(), size, d.turned.data());
        product((const uint32_t*)d.query.data(), size / 2, d.turned.data(), d.scores.data(), high, KEYS, size / 2, nullptr);
        for (int64_t r = 0; r < rows; r++) {
            const int64_t at = place + r / shared - block;  // of this query
            const int64_t low = a.window ? std::max<int64_t>(0, at + 1 - a.window) : 0, end = std::min(KEYS, at + 1);
            float* s = d.scores.data() + r * KEYS;
            uint16_t* w = d.weights.data() + r * KEYS;
            d.before[r] = 1.0f;
            if (low >= end) {
                std::fill_n(w, KEYS, 0);
                continue;
            }
            for (int64_t t = 0; t < KEYS; t++) s[t] *= scale[t];
            if (a.softcap) for (int64_t t = 0; t < KEYS; t++) s[t] = capped(s[t], a.softcap);
            std::fill(s, s + low, -INFINITY), std::fill(s + end, s + KEYS, -INFINITY);
            const float top = largest(s, KEYS, d.top[r]);
            for (int64_t t = 0; t < KEYS; t++) s[t] = exp_of(s[t] - top);
            std::fill(s, s + low, 0.0f), std::fill(s + end, s + KEYS, 0.0f);
            d.before[r] = d.top[r] == -INFINITY ? 0.0f : exp_of(d.top[r] - top);
            d.total[r] = d.total[r] * d.before[r] + sum(s, KEYS), d.top[r] = top;
            if (a.codes) for (int64_t t = 0; t < KEYS; t++) s[t] *= value_scale[t];
            for (int64_t t = 0; t < KEYS; t += 16) _mm256_storeu_si256((__m256i*)(w + t), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(s + t)));
        }
        pair_rows(d.values.data(), wide, d.paired.data());
        product((const uint32_t*)d.weights.data(), KEYS / 2, d.paired.data(), d.out.data(), high, wide, up(here, 2) / 2, d.before.data());
    }
    for (int64_t r = 0; r < rows; r++) {
        const int64_t token = a.rows[span] + from + r / shared, head = first + r % shared;
        uint16_t* out = (uint16_t*)a.out + (token * a.heads + head) * a.value_size;
        for (int64_t i = 0; i < a.value_size; i++) out[i] = to_bf16(d.out[r * wide + i] / d.total[r]);
    }
}

template <typename P>
static void prompts(const Attend& a, P keys, P values) {
    const int64_t shared = a.heads / a.key_heads, each = std::min(shared, HELD), pieces = (shared + each - 1) / each;
    const int64_t queries = HELD / each;
    std::vector<int64_t> begun(a.count + 1, 0);  // tasks before each span
    for (int64_t i = 0; i < a.count; i++) begun[i + 1] = begun[i] + (a.counts[i] + queries - 1) / queries * pieces * a.key_heads;
#pragma omp parallel
    {
        Desk desk;
#pragma omp for schedule(dynamic)
        for (int64_t n = begun[a.count] - 1; n >= 0; n--) {  // those that see most first
            const int64_t span = std::upper_bound(begun.begin(), begun.end(), n) - begun.begin() - 1, i = n - begun[span];
            const int64_t g = i % a.key_heads, first = i / a.key_heads % pieces * each, from = i / a.key_heads / pieces * queries;
            prompt(a, keys, values, span, g, g * shared + first, std::min(each, shared - first), from, std::min(queries, a.counts[span] - from), desk);
        }
    }
}
#endif
