// Values rounded to multiples of a scale, a run of them at a time: quant.reference.fake_quant in one pass.
//
// Divisions are rounded once. A float is rounded to `fraction` bits by adding a constant whose last bit is worth as much
// as the float's own, and taking it away again, which the processor does to the nearest, ties to even.

#include <omp.h>
#include "floats.h"

enum { GIVEN, AMAX, FLOOR, ROUND, CEIL, TWO };
static const int INTEGER = 1 << 20;

struct Round {
    const void* x;       // [runs, columns]
    void* out;
    const float* given;  // GIVEN: the scale, or null: 1. TWO: the outer scale
    int64_t* cut;        // where values that are beyond it are counted, or null
    int64_t runs, columns;
    int32_t type;        // 0: float32, 1: bfloat16
    int32_t fraction, least, rule, power, divides;
    float low, high, reach, empty;
};

static inline float to_float(float v, int fraction, uint32_t least) {
    uint32_t bits = bits_of(v), power = bits & 0x7f800000;
    power = power > least ? power : least;
    float grid = of_bits((power + (uint32_t(23 - fraction) << 23)) | 0x400000);
    float near = (v + grid) - grid;
    return of_bits((bits_of(near) & 0x7fffffff) | (bits & 0x80000000));
}
static inline float to_whole(float v) { return (v + 12582912.0f) - 12582912.0f; }
static inline float clamped(float v, float low, float high) { v = v < low ? low : v; return v > high ? high : v; }

// The largest magnitude; NaN is larger than all
template <class T> static float largest(const T* x, int64_t columns) {
    uint32_t most = 0;
    for (int64_t i = 0; i < columns; i++) {
        uint32_t bits = bits_of(load(x + i)) & 0x7fffffff;
        most = bits > most ? bits : most;
    }
    return of_bits(most);
}

static inline float power_of_two(int32_t power) { return of_bits(power > 0 ? uint32_t(power) << 23 : 0x400000); }

static float scale_of(const Round& r, float amax) {
    uint32_t bits = bits_of(amax);
    switch (r.rule) {
    case AMAX: {
        float s = amax / r.reach;
        s = s > 3.4028234663852886e38f ? 3.4028234663852886e38f : s;
        return s == 0 ? r.empty : s;
    }
    case ROUND: bits += 1 << 21;  // half a unit at the bit that FP4 keeps
    // fall through
    case FLOOR: {
        int32_t power = amax > 0 ? int32_t(bits >> 23) - r.power : 0;
        return power_of_two(power > 254 ? 254 : power);
    }
    case CEIL: {
        bits = bits_of(amax / r.reach);
        int32_t power = int32_t(bits >> 23);
        power += (bits & 0x7fffff) > (power == 0 ? 0x400000u : 0u);
        return amax > 0 ? power_of_two(power > 254 ? 254 : power) : 1.0f;
    }
    default: {
        float outer = *r.given, ideal = r.divides ? outer * (amax / r.reach) : amax / (r.reach * outer);
        float inner = to_float(clamped(ideal, r.divides ? 0.0f : 0.001953125f, 448.0f), 3, 121u << 23);
        if (r.divides) return (inner == 0 ? 0.125f : inner) / outer;
        return (amax > 0 ? inner : 1.0f) * outer;
    }
    }
}

template <class T, bool WHOLE> static int64_t run(const Round& r, int64_t at) {
    const T* x = (const T*)r.x + at * r.columns;
    T* out = (T*)r.out + at * r.columns;
    const float s = r.rule == GIVEN ? (r.given ? *r.given : 1.0f) : scale_of(r, largest(x, r.columns));
    const float low = r.low, high = r.high, bottom = low * s, top = high * s;
    const uint32_t least = uint32_t(r.least + 127) << 23;
    const int fraction = r.fraction;
    for (int64_t i = 0; i < r.columns; i++) {
        float v = clamped(load(x + i) / s, low, high);
        store(out + i, (WHOLE ? to_whole(v) : to_float(v, fraction, least)) * s);
    }
    int64_t cut = 0;
    if (r.cut)
        for (int64_t i = 0; i < r.columns; i++) cut += (load(x + i) < bottom) | (load(x + i) > top);
    return cut;
}

template <class T, bool WHOLE> static void all(const Round& r) {
    int64_t cut = 0;
#pragma omp parallel for schedule(static) reduction(+ : cut) if (r.runs * r.columns > 16384)
    for (int64_t at = 0; at < r.runs; at++) cut += run<T, WHOLE>(r, at);
    if (r.cut) *r.cut += cut;
}

extern "C" void round_values(const Round* r) {
    const bool whole = r->fraction == INTEGER;
    if (r->type == 0) whole ? all<float, true>(*r) : all<float, false>(*r);
    else whole ? all<uint16_t, true>(*r) : all<uint16_t, false>(*r);
}
