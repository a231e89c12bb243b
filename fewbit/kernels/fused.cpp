// What stands between the linears of a layer, each in one pass over memory: norm, gated activation, rotary embedding.
// Results are rounded where models round them. Rows are shared among threads where there are many.

#include <cfloat>
#include <cmath>
#include <initializer_list>
#include <omp.h>
#include "floats.h"

static const int64_t ALONE = 1 << 15;  // numbers that one thread does by itself

// Rows of a tensor of up to four axes: sizes of the second and third, and three strides
struct Rows {
    int64_t n1, n2, s0, s1, s2;
    int64_t at(int64_t row) const { return row / n2 / n1 * s0 + row / n2 % n1 * s1 + row % n2 * s2; }
};

struct Norm {
    const void *x, *weight, *bias;  // [rows, d], [d] or null
    void* y;
    Rows from, to;
    int64_t rows, d;
    float eps, offset;              // of the weight
    int32_t type, late, centred;    // type 0: float32, 1: bfloat16
};

template <class T> static inline float as(float v) { T held; store(&held, v); return load(&held); }

// Never inlined: wherever it is called from, it adds up in one order
template <class T, bool LATE> __attribute__((noinline)) static void norm_row(const Norm& f, const T* x, T* y) {
    const T *w = (const T*)f.weight, *b = (const T*)f.bias;
    float mean = 0, square = 0;
    if (f.centred) {
#pragma omp simd reduction(+ : mean)
        for (int64_t i = 0; i < f.d; i++) mean += load(x + i);
        mean /= float(f.d);
    }
#pragma omp simd reduction(+ : square)
    for (int64_t i = 0; i < f.d; i++) square += (load(x + i) - mean) * (load(x + i) - mean);
    const float by = 1.0f / sqrtf(square / float(f.d) + f.eps), offset = f.offset;
    if (w && !b) {
#pragma omp simd
        for (int64_t i = 0; i < f.d; i++) {
            const float h = (load(x + i) - mean) * by;
            store(y + i, (LATE ? as<T>(h) : h) * (load(w + i) + offset));
        }
        return;
    }
    for (int64_t i = 0; i < f.d; i++) {
        float h = (load(x + i) - mean) * by;
        if (LATE) h = as<T>(h);
        if (w) h *= load(w + i) + offset;
        if (b) h = (LATE && w ? as<T>(h) : h) + load(b + i);
        store(y + i, h);
    }
}

template <class T> static inline void by_kind(const Norm& f, const T* x, T* y) {
    f.late ? norm_row<T, true>(f, x, y) : norm_row<T, false>(f, x, y);
}

template <class T> static void norms(const Norm& f) {
#pragma omp parallel for schedule(static) if (f.rows * f.d > ALONE)
    for (int64_t row = 0; row < f.rows; row++) {
        const T* x = (const T*)f.x + f.from.at(row);
        T* y = (T*)f.y + f.to.at(row);
        by_kind(f, x, y);
    }
}

struct Sum {
    const void *x, *residual;  // [rows, d]
    void* sum;
    int64_t rows, d;
    int32_t type;
};

// sum = residual + x, or residual + before(x); y = after(sum). before and after may be null
template <class T> static void add_norms(const Sum& f, const Norm* before, const Norm* after) {
#pragma omp parallel for schedule(static) if (f.rows * f.d > ALONE)
    for (int64_t row = 0; row < f.rows; row++) {
        const T *x = (const T*)f.x + row * f.d, *residual = (const T*)f.residual + row * f.d;
        T* sum = (T*)f.sum + row * f.d;
        if (before) by_kind(*before, x, sum), x = sum;
#pragma omp simd
        for (int64_t i = 0; i < f.d; i++) store(sum + i, load(residual + i) + load(x + i));
        if (after) by_kind(*after, sum, (T*)after->y + row * f.d);
    }
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + exp_of(-x)); }

enum { SILU, GELU_TANH, QUICK_GELU, RELU, RELU2, SIGMOID };

template <int ACT> static inline float act(float x, float alpha) {
    switch (ACT) {
    case SILU: return x / (1.0f + exp_of(-x));
    case GELU_TANH: return x * sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x));
    case QUICK_GELU: return x * sigmoid(alpha * x);
    case RELU: return x < 0 ? 0.0f : x;
    case RELU2: return x < 0 ? 0.0f : x * x;
    default: return sigmoid(x);
    }
}

struct Gate {
    const void *gate, *up;  // [rows, n]
    void* y;
    int64_t rows, n, gate_row, up_row, step;  // step: 1, or 2 where gate and up are interleaved
    float alpha, limit, plus;
    int32_t type, act;
};

// HELD: within a limit, and up with a number added to it; what has neither takes a fifth less time without
template <class T, int ACT, int STEP, bool HELD> static void gates(const Gate& f) {
    const float alpha = f.alpha, limit = f.limit, plus = f.plus;
#pragma omp parallel for schedule(static) if (f.rows * f.n > ALONE)
    for (int64_t row = 0; row < f.rows; row++) {
        const T *gate = (const T*)f.gate + row * f.gate_row, *up = (const T*)f.up + row * f.up_row;
        T* y = (T*)f.y + row * f.n;
#pragma omp simd
        for (int64_t i = 0; i < f.n; i++) {
            float g = load(gate + STEP * i), u = load(up + STEP * i);
            if (HELD) {  // NaN stays
                g = g > limit ? limit : g;
                u = as<T>((u > limit ? limit : u < -limit ? -limit : u) + plus);
            }
            store(y + i, as<T>(act<ACT>(g, alpha)) * u);
        }
    }
}
template <class T, int STEP, bool HELD> static void gates_by_act(const Gate& f) {
    switch (f.act) {
    case SILU: return gates<T, SILU, STEP, HELD>(f);
    case GELU_TANH: return gates<T, GELU_TANH, STEP, HELD>(f);
    case QUICK_GELU: return gates<T, QUICK_GELU, STEP, HELD>(f);
    case RELU: return gates<T, RELU, STEP, HELD>(f);
    case RELU2: return gates<T, RELU2, STEP, HELD>(f);
    default: return gates<T, SIGMOID, STEP, HELD>(f);
    }
}
template <class T> static void gates_by_kind(const Gate& f) {
    if (f.step == 2) gates_by_act<T, 2, true>(f);
    else if (f.plus == 0 && f.limit > FLT_MAX) gates_by_act<T, 1, false>(f);
    else gates_by_act<T, 1, true>(f);
}

template <class T> static void adds(const T* a, const T* b, T* y, int64_t n) {
#pragma omp parallel for simd schedule(static) if (n > ALONE)
    for (int64_t i = 0; i < n; i++) store(y + i, load(a + i) + load(b + i));
}

struct Steps { int64_t batch, token, head; };  // strides

struct Turned {  // queries, or keys
    const void* x;
    void* y;
    Steps from, to;
    int64_t heads;
};

struct Rotary {
    const void *cos, *sin;  // [batch, token, entries]
    Turned q, k;
    Steps cos_at, sin_at;
    int64_t batches, tokens, d, width;
    int32_t type, table_type;            // 0: float32, 1: bfloat16
    int32_t reads, writes, own, wide;    // reads, writes: whether pairs are neighbours
};

// One head; its pairs (a, b) are read with a step of R from x and r, and written with a step of W to y and w
template <class T, class C, bool WIDE, int R, int W>
static void turn(const T* x, const T* r, T* y, T* w, const C* c0, const C* c1, const C* s0, const C* s1, int64_t step, int64_t half) {
#pragma omp simd
    for (int64_t j = 0; j < half; j++) {
        const float a = load(x + R * j), b = load(r + R * j);
        float ac = a * load(c0 + step * j), bs = b * load(s0 + step * j), bc = b * load(c1 + step * j), as_ = a * load(s1 + step * j);
        if (!WIDE) ac = as<T>(ac), bs = as<T>(bs), bc = as<T>(bc), as_ = as<T>(as_);  // models round each product
        store(y + W * j, ac - bs);
        store(w + W * j, bc + as_);
    }
}

template <class T, class C, bool WIDE>
static void heads(const Rotary& f, const Turned& t, int64_t batch, int64_t token) {
    const int64_t half = f.width / 2, entries = f.own && f.writes ? 2 : 1;
    const C* cos = (const C*)f.cos + batch * f.cos_at.batch + token * f.cos_at.token;
    const C* sin = (const C*)f.sin + batch * f.sin_at.batch + token * f.sin_at.token;
    const int64_t second = !f.own ? 0 : f.writes ? 1 : half;
    for (int64_t h = 0; h < t.heads; h++) {
        const T* x = (const T*)t.x + batch * t.from.batch + token * t.from.token + h * t.from.head;
        T* y = (T*)t.y + batch * t.to.batch + token * t.to.token + h * t.to.head;
        const T* r = x + (f.reads ? 1 : half);
        T* w = y + (f.writes ? 1 : half);
        const C *c1 = cos + second, *s1 = sin + second;
        if (!f.reads && !f.writes) turn<T, C, WIDE, 1, 1>(x, r, y, w, cos, c1, sin, s1, entries, half);
        else if (f.reads && f.writes) turn<T, C, WIDE, 2, 2>(x, r, y, w, cos, c1, sin, s1, entries, half);
        else if (f.reads) turn<T, C, WIDE, 2, 1>(x, r, y, w, cos, c1, sin, s1, entries, half);
        else turn<T, C, WIDE, 1, 2>(x, r, y, w, cos, c1, sin, s1, entries, half);
        for (int64_t i = f.width; i < f.d; i++) y[i] = x[i];
    }
}

template <class T, class C> static void rotaries(const Rotary& f) {
    const int64_t all = f.batches * f.tokens;
#pragma omp parallel for schedule(static) if (all * (f.q.heads + f.k.heads) * f.d > ALONE)
    for (int64_t at = 0; at < all; at++)
        for (const Turned* t : {&f.q, &f.k})
            if (f.wide) heads<T, C, true>(f, *t, at / f.tokens, at % f.tokens);
            else heads<T, C, false>(f, *t, at / f.tokens, at % f.tokens);
}

extern "C" {

void fused_norm(const Norm* f) { f->type == 0 ? norms<float>(*f) : norms<uint16_t>(*f); }
void fused_add_norm(const Sum* f, const Norm* before, const Norm* after) {
    f->type == 0 ? add_norms<float>(*f, before, after) : add_norms<uint16_t>(*f, before, after);
}
void fused_gate(const Gate* f) { f->type == 0 ? gates_by_kind<float>(*f) : gates_by_kind<uint16_t>(*f); }
void fused_add(const void* a, const void* b, void* y, int64_t n, int32_t type) {
    if (type == 0) adds((const float*)a, (const float*)b, (float*)y, n);
    else adds((const uint16_t*)a, (const uint16_t*)b, (uint16_t*)y, n);
}
void fused_rotary(const Rotary* f) {
    if (f->type == 0) rotaries<float, float>(*f);
    else if (f->table_type == 0) rotaries<uint16_t, float>(*f);
    else rotaries<uint16_t, uint16_t>(*f);
}
}
