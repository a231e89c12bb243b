// What few.cu and some.cu share. Compiled for: TYPE of x (0 bfloat16, 1 float16, 2 e4m3, 3 int8), OUT of y (0, 1),
// SPLIT blocks to a sum. In humming's layout the codes of 64 rows and 16 columns are 512 bytes, a word of each lane for
// every 16 rows, so that they are fragments already: CODES 0 integers under scales of x's type, 1 e2m1 under e4m3, 2
// e2m1 under e8m0; GROUP columns to a scale, ZEROS 1 where each has a zero.

#pragma once

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct __align__(16) Four { u32 x, y, z, w; };

#if TYPE == 3
typedef int Sum;
#else
typedef float Sum;
#endif

// Into shared memory, past the L1: weights are read once. Groups of copies are waited for in their order.
__device__ __forceinline__ void copy(void *to, const void *from) {
    const u32 at = (u32)__cvta_generic_to_shared(to);
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" :: "r"(at), "l"(from));
}

__device__ __forceinline__ void close_group() { asm volatile("cp.async.commit_group;"); }
template <int most> __device__ __forceinline__ void await_groups() {
    asm volatile("cp.async.wait_group %0;" :: "n"(most) : "memory");
}

__device__ __forceinline__ Four four(const void *at) {
    Four v;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at));
    return v;
}

__device__ __forceinline__ u32 word(const void *at) {
    u32 v;
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(v) : "l"(at));
    return v;
}

// The kernel after this one may start, and reads its weights; this one waits for what the one before it has made.
__device__ __forceinline__ void let_next() { asm volatile("griddepcontrol.launch_dependents;"); }
__device__ __forceinline__ void await_last() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

__device__ __forceinline__ u16 rounded(float v) {
    u16 out;
#if OUT == 0
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out) : "f"(v));
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out) : "f"(v));
#endif
    return out;
}

__device__ __forceinline__ float widened(u16 v) {
#if OUT == 0
    return __uint_as_float((u32)v << 16);
#else
    float out;
    asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(v));
    return out;
#endif
}

// What the sum of a row of x (m) and one of W (n) becomes. rows, columns, bias: scales and more, or null.
struct Finish {
    u16 *y;
    const float *rows, *columns;
    const u16 *bias;
    int m, n, row_step, column_step;

    __device__ __forceinline__ void operator()(float v, int row, int column) const {
        if (row >= m) return;
        if (columns) v *= columns[column * column_step];
        if (rows) v *= rows[row * row_step];
        if (bias) v += widened(bias[column]);
        y[(u64)row * n + column] = rounded(v);
    }
};

extern __shared__ __align__(1024) char memory[];

// Blocks of a cluster meet, and see what each has written; and wait until all have read it.
__device__ __forceinline__ void meet() {
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}
__device__ __forceinline__ void leave() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

// A sum's parts of all blocks of a cluster, each at the same place in its shared memory.
__device__ __forceinline__ float gathered(const void *place) {
    const u32 here = (u32)__cvta_generic_to_shared(place);
    float total = 0;
#pragma unroll
    for (int q = 0; q < SPLIT; q++) {
        u32 at;
        float v;
        asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(here), "r"(q));
        asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(at));
        total += v;
    }
    return total;
}

#ifdef CODES
#if TYPE == 0
#define MAGIC 0x43004300u  // 128 in bfloat16, whose last bit is worth 1
#define MIDDLE 0x43084308u
#define LESS "sub.rn.bf16x2"
#define TIMES_TWO "mul.rn.bf16x2"
#else
#define MAGIC 0x64006400u  // 1024 in float16
#define MIDDLE 0x64086408u
#define LESS "sub.rn.f16x2"
#define TIMES_TWO "mul.rn.f16x2"
#endif

// Codes p and p + 4 of 8 as two numbers; integers less their zero.
template <int p> __device__ __forceinline__ u32 pair(u32 codes, u32 zero) {
    u32 v;
#if CODES == 0
    asm("lop3.b32 %0, %1, 0x000f000f, %2, 0xEA;" : "=r"(v) : "r"(codes >> 4 * p), "r"(MAGIC));
    asm(LESS " %0, %0, %1;" : "+r"(v) : "r"(zero));
#else  // sign, and two bits of exponent with one of mantissa: too small by 2^126 (2^14)
    constexpr int far = TYPE == 0 ? 6 - 4 * p : 9 - 4 * p;
    const u32 size = far < 0 ? codes >> -far : codes << (far < 0 ? 0 : far), sign = codes << (12 - 4 * p) & 0x80008000u;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(v) : "r"(size), "r"(TYPE == 0 ? 0x01c001c0u : 0x0e000e00u), "r"(sign));
    asm(TIMES_TWO " %0, %0, %1;" : "+r"(v) : "r"(TYPE == 0 ? 0x7e807e80u : 0x74007400u));
#endif
    return v;
}

// Scales of 8 rows.
#if CODES == 0
typedef Four Scales;
#else
struct __align__(8) Scales { u32 x, y; };
#endif

__device__ __forceinline__ Scales scales_at(const void *at) {
    Scales v;
#if CODES == 0
    v = four(at);
#else
    asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(at));
#endif
    return v;
}

// Two neighbours.
__device__ __forceinline__ void scales_of(u32 both, float &above, float &below) {
#if CODES == 0
    above = widened(both & 0xffff), below = widened(both >> 16);
#else
#if CODES == 1
    u32 halves;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"((u16)both));
    asm("cvt.f32.f16 %0, %1;" : "=f"(above) : "h"((u16)halves));
    asm("cvt.f32.f16 %0, %1;" : "=f"(below) : "h"((u16)(halves >> 16)));
#else
    const u32 one = both & 255, two = both >> 8 & 255;  // 2^-127 is subnormal, 255 no number
    above = __uint_as_float(one == 0 ? 1u << 22 : one == 255 ? 0x7fc00000u : one << 23);
    below = __uint_as_float(two == 0 ? 1u << 22 : two == 255 ? 0x7fc00000u : two << 23);
#endif
#endif
}
#endif
