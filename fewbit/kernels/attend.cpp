// Attention over cached keys and values that lie anywhere: a list of slots for each query, or for all of a prompt
// (prompts.h).
//
// A task is heads of one query that share a key head: every key and value is read once for all of them. Where there are few
// tasks they are cut, so that no thread stands idle. Scores are kept for a whole text, so that softmax is the plain one:
// highest first, then the sum. A cache may hold codes of a byte each: they are looked up, and their scales join the scores
// and the weights.

#include <algorithm>
#include <cmath>
#include <omp.h>
#include <vector>
#include "vectors.h"
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
#include <immintrin.h>
#define WIDE 1
#endif

struct Attend {
    const void* query;            // [tokens, heads, size]
    const void* key;              // [slots, key_heads, size]
    const void* value;            // [slots, key_heads, value_size], value_step from one head to the next
    void* out;                    // [tokens, heads, value_size]
    const int64_t* rows;          // [count] tokens that are queries
    const int64_t* const* slots;  // [count] where the text of each lies
    const int64_t* lengths;       // [count] how much of it is seen, by the last query
    const int64_t* counts;        // [count] queries of each, one after the other, or null: one
    const float* sinks;           // [heads] or null
    const float* codes;           // [256] what a code of the cache means, or null: it holds values
    const float* key_scale;       // of codes: [slots, key_heads], or [key_heads] for all slots
    const float* value_scale;     // the same
    int64_t count, heads, key_heads, size, value_size, window;  // window 0: none
    int64_t scale_step;           // from one slot's scales to the next one's: key_heads or 0
    int64_t value_step;
    float scaling, softcap;       // softcap 0: none
    int32_t narrow;               // 0: float32, 1: bfloat16: queries, results, and a cache of values
};

// What a cache holds, as it is read: a pointer, or one to codes with what they mean
struct Coded {
    const uint8_t* at;
    const float* codes;
    inline Coded operator+(int64_t i) const { return {at + i, codes}; }
};
static inline float load(Coded p) { return p.codes[*p.at]; }

#ifdef WIDE
static inline __m512 sixteen(const float* p) { return _mm512_loadu_ps(p); }
static inline __m512 sixteen(const uint16_t* p) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16)); }
static inline __m512 sixteen(Coded p) { return _mm512_i32gather_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p.at)), p.codes, 4); }
static inline __m512 part(const float* p, int64_t left) { return _mm512_maskz_loadu_ps(left >= 16 ? 0xffff : (1u << left) - 1, p); }
static inline __m512 part(const uint16_t* p, int64_t left) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(left >= 16 ? 0xffff : (1u << left) - 1, p)), 16));
}
static inline __m512 part(Coded p, int64_t left) {
    const __mmask16 there = left >= 16 ? 0xffff : (1u << left) - 1;
    return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), there, _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(there, p.at)), p.codes, 4);
}
#endif

template <typename P>
static inline float dot(P a, const float* b, int64_t n) {
#ifdef WIDE
    __m512 total = _mm512_setzero_ps();
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) total = _mm512_fmadd_ps(sixteen(a + i), _mm512_loadu_ps(b + i), total);
    if (i < n) total = _mm512_fmadd_ps(part(a + i, n - i), part(b + i, n - i), total);
    return _mm512_reduce_add_ps(total);
#else
    float total = 0;
    for (int64_t i = 0; i < n; i++) total += load(a + i) * b[i];
    return total;
#endif
}

// A score that cannot leave softcap: a tanh that compilers make vectors of, within 1e-7 of it
static inline float capped(float score, float softcap) { return softcap * (1.0f - 2.0f / (exp_of(2.0f * score / softcap) + 1.0f)); }

static inline float largest(const float* p, int64_t n, float top) {
    int64_t i = 0;
#ifdef WIDE
    __m512 most = _mm512_set1_ps(top);
    for (; i + 16 <= n; i += 16) most = _mm512_max_ps(_mm512_loadu_ps(p + i), most);  // what is no number is passed over
    top = _mm512_reduce_max_ps(most);
#endif
    for (; i < n; i++) top = p[i] > top ? p[i] : top;
    return top;
}

static inline float sum(const float* p, int64_t n) {
    float total = 0;
    int64_t i = 0;
#ifdef WIDE
    __m512 parts = _mm512_setzero_ps();
    for (; i + 16 <= n; i += 16) parts = _mm512_add_ps(parts, _mm512_loadu_ps(p + i));
    total = _mm512_reduce_add_ps(parts);
#endif
    for (; i < n; i++) total += p[i];
    return total;
}

// out: n sums of values at places, each times its weight
template <typename P, typename Place>
static inline void weighed(float* out, P values, Place place, const float* weights, int64_t length, int64_t n) {
    int64_t i = 0;
#ifdef WIDE
    for (; i + 64 <= n; i += 64) {  // sums stay in registers
        __m512 sums[4] = {};
        for (int64_t t = 0; t < length; t++) {
            const P v = values + (place(t) + i);
            const __m512 w = _mm512_set1_ps(weights[t]);
            for (int j = 0; j < 4; j++) sums[j] = _mm512_fmadd_ps(sixteen(v + 16 * j), w, sums[j]);
        }
        for (int j = 0; j < 4; j++) _mm512_storeu_ps(out + i + 16 * j, sums[j]);
    }
    for (; i + 16 <= n; i += 16) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t t = 0; t < length; t++) sum = _mm512_fmadd_ps(sixteen(values + (place(t) + i)), _mm512_set1_ps(weights[t]), sum);
        _mm512_storeu_ps(out + i, sum);
    }
#endif
    for (; i < n; i++) {
        float sum = 0;
        for (int64_t t = 0; t < length; t++) sum += weights[t] * load(values + (place(t) + i));
        out[i] = sum;
    }
}

#include "prompts.h"

// T: of queries and results; P: how keys and values are read. `shared` heads from `first`, all of key head g
template <typename T, typename P>
static void task(const Attend& a, P keys, P values, int64_t row, int64_t g, int64_t first, int64_t shared, std::vector<float>& scratch) {
    const int64_t token = a.rows[row], stop = a.lengths[row];
    const int64_t start = a.window && stop > a.window ? stop - a.window : 0, length = stop - start;
    const int64_t* slots = a.slots[row] + start;
    scratch.assign(shared * (length + a.size + a.value_size), 0.0f);
    float *scores = scratch.data(), *query = scores + shared * length, *sums = query + shared * a.size;
    const T* asked = (const T*)a.query + (token * a.heads + first) * a.size;
    for (int64_t i = 0; i < shared * a.size; i++) query[i] = load(asked + i);
    for (int64_t t = 0; t < length; t++) {
        const P key = keys + (slots[t] * a.key_heads + g) * a.size;
        const float scaling = a.scaling * (a.codes ? a.key_scale[slots[t] * a.scale_step + g] : 1.0f);
        for (int64_t h = 0; h < shared; h++) scores[h * length + t] = dot(key, query + h * a.size, a.size) * scaling;
    }
    for (int64_t h = 0; h < shared; h++) {
        float* mine = scores + h * length;
        if (a.softcap) for (int64_t t = 0; t < length; t++) mine[t] = capped(mine[t], a.softcap);
        const float sink = a.sinks ? a.sinks[first + h] : -INFINITY, top = largest(mine, length, sink);
        for (int64_t t = 0; t < length; t++) mine[t] = exp_of(mine[t] - top);
        const float total = sum(mine, length) + (a.sinks ? expf(sink - top) : 0.0f);
        for (int64_t t = 0; t < length; t++) mine[t] /= total;
    }
    const auto place = [&](int64_t t) { return (slots[t] * a.key_heads + g) * a.value_step; };
    for (int64_t h = 0; h < shared; h++) {
        float* mine = scores + h * length;
        if (a.codes) for (int64_t t = 0; t < length; t++) mine[t] *= a.value_scale[slots[t] * a.scale_step + g];
        weighed(sums + h * a.value_size, values, place, mine, length, a.value_size);
    }
    T* out = (T*)a.out + (token * a.heads + first) * a.value_size;
    for (int64_t i = 0; i < shared * a.value_size; i++) store(out + i, sums[i]);
}

template <typename T, typename P>
static void tasks(const Attend& a, P keys, P values) {
    const int64_t shared = a.heads / a.key_heads, whole = a.count * a.key_heads, wanted = 4 * omp_get_max_threads();
    const int64_t cuts = whole >= wanted ? 1 : (wanted + whole - 1) / whole, each = (shared + cuts - 1) / cuts;
    const int64_t pieces = (shared + each - 1) / each;
#pragma omp parallel
    {
        std::vector<float> scratch;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < whole * pieces; i++) {
            const int64_t g = i / pieces % a.key_heads, from = i % pieces * each, held = from + each < shared ? each : shared - from;
            task<T>(a, keys, values, i / pieces / a.key_heads, g, g * shared + from, held, scratch);
        }
    }
}

template <typename T>
static void chosen(const Attend& a) {
#ifdef DOTS
    if (a.counts && a.codes) return prompts(a, Coded{(const uint8_t*)a.key, a.codes}, Coded{(const uint8_t*)a.value, a.codes});
    if (a.counts) return prompts(a, (const uint16_t*)a.key, (const uint16_t*)a.value);
#endif
    if (a.codes) tasks<T>(a, Coded{(const uint8_t*)a.key, a.codes}, Coded{(const uint8_t*)a.value, a.codes});
    else tasks<T>(a, (const T*)a.key, (const T*)a.value);
}

struct Keep {
    const uint8_t *key, *value;       // [tokens, heads, bytes], with strides
    uint8_t *key_plane, *value_plane; // [slots, heads, bytes]
    const int64_t* slots;             // [tokens]
    int64_t tokens, heads;
    int64_t key_bytes, key_token, key_head;
    int64_t value_bytes, value_token, value_head;
};

// Keys and values of tokens to their slots, as they are.
extern "C" void keep(const Keep* a) {
#pragma omp parallel for schedule(static) if (a->tokens > 64)
    for (int64_t t = 0; t < a->tokens; t++)
        for (int64_t h = 0; h < a->heads; h++) {
            const int64_t at = a->slots[t] * a->heads + h;
            memcpy(a->key_plane + at * a->key_bytes, a->key + t * a->key_token + h * a->key_head, a->key_bytes);
            memcpy(a->value_plane + at * a->value_bytes, a->value + t * a->value_token + h * a->value_head, a->value_bytes);
        }
}

extern "C" void attend(const Attend* a) {
    if (a->narrow) chosen<uint16_t>(*a);
    else chosen<float>(*a);
}

// Whether `attend` takes counts, in bfloat16: 0 no, 1 yes, 2 yes, where torch would multiply in tiles.
extern "C" int many() {
#if defined(DOTS) && defined(__AMX_BF16__)
    return 2;
#elif defined(DOTS)
    return 1;
#else
    return 0;
#endif
}
