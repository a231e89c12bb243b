// y = x W^T for up to WIDE rows of x (16, 32 or 64), on the matrix units of warpgroups (wgmma, sm_90a). x is not small
// beside what a warp reads of W here, so a block makes 256 columns of y and fetches x once for as many: two warpgroups
// of 128 rows of W each, two times 64. All of a block waits for its copies together, DEPTH stages of 128 bytes of each row
// under way (of codes, twice as many of x). few.cuh says what else it is compiled for.

#include "few.cuh"

constexpr int TALL = 256, SIDE = WIDE * 128, PITCH = TALL + 4, SUMS = WIDE / 2;  // SUMS: of a lane
#ifdef CODES
constexpr int CODED = 128 * TALL / 2, STAGE = CODED + 2 * SIDE;
constexpr int TIMES = GROUP < 128 ? 128 / GROUP : 1, EACH = 8 / TIMES;  // scales of 128 columns; steps of 16 to each
#else
constexpr int CODED = 128 * TALL, STAGE = CODED + SIDE;
#endif

// 128 bytes of each row of x, zeros for rows that are not there; 16 bytes lie where the units read without conflicts.
__device__ __forceinline__ void fetch_rows(u32 to, const char *from, int bytes, int m) {
#pragma unroll
    for (int u = 0; u < (WIDE + 31) / 32; u++) {
        const int row = u * 32 + threadIdx.x / 8, piece = threadIdx.x % 8;
        const bool there = row < m;
        if (WIDE >= 32 || row < WIDE)
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                         :: "r"(to + row * 128 + (piece ^ row % 8) * 16),
                            "l"(from + (there ? (u64)row * bytes + piece * 16 : 0)), "r"(there ? 16 : 0));
    }
}

// What was copied is the matrix units' to read, and all have done with the stage before.
__device__ __forceinline__ void hand_over() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
}

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void close_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int most> __device__ __forceinline__ void await_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(most) : "memory");
}

// Rows of 128 bytes, as fetch_rows lays them.
__device__ __forceinline__ u64 descriptor(u32 at) {
    return (u64)(at >> 4 & 0x3fff) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

#if TYPE == 0
#define KIND "k16.f32.bf16.bf16"
#elif TYPE == 1
#define KIND "k16.f32.f16.f16"
#elif TYPE == 2
#define KIND "k32.f32.e4m3.e4m3"
#else
#define KIND "k32.s32.s8.s8"
#endif
#if TYPE == 3
#define IO "+r"
#else
#define IO "+f"
#endif
#define D4(i) IO(d[i]), IO(d[i + 1]), IO(d[i + 2]), IO(d[i + 3])
#define D8(i) D4(i), D4(i + 4)
#if WIDE == 16
#define SHAPE "m64n16"
#define PLACES "{%0, %1, %2, %3, %4, %5, %6, %7}"
#define OUTS D8(0)
#define FOUR "{%8, %9, %10, %11}, %12"
#define FOUR_ADD "%13"
#define TWO "%8, %9"
#define TWO_ADD "%10"
#elif WIDE == 32
#define SHAPE "m64n32"
#define PLACES "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}"
#define OUTS D8(0), D8(8)
#define FOUR "{%16, %17, %18, %19}, %20"
#define FOUR_ADD "%21"
#define TWO "%16, %17"
#define TWO_ADD "%18"
#else
#define SHAPE "m64n64"
#define PLACES "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
               "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define OUTS D8(0), D8(8), D8(16), D8(24)
#define FOUR "{%32, %33, %34, %35}, %36"
#define FOUR_ADD "%37"
#define TWO "%32, %33"
#define TWO_ADD "%34"
#endif

// d = [d +] a b^T, b: WIDE rows at a descriptor; a: 64 rows in registers, or at a descriptor.
#ifdef CODES
__device__ __forceinline__ void product(float (&d)[SUMS], const u32 (&a)[4], u64 b, int add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " FOUR_ADD ", 0;\nwgmma.mma_async.sync.aligned." SHAPE KIND " " PLACES
                 ", " FOUR ", p, 1, 1, 0;\n}" : OUTS : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}
#else
#if TYPE < 2
#define MORE ", 1, 1, 0, 0"
#elif TYPE == 2
#define MORE ", 1, 1"
#else
#define MORE
#endif
__device__ __forceinline__ void product(Sum (&d)[SUMS], u64 a, u64 b, int add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " TWO_ADD ", 0;\nwgmma.mma_async.sync.aligned." SHAPE KIND " " PLACES
                 ", " TWO ", p" MORE ";\n}" : OUTS : "l"(a), "l"(b), "r"(add));
}
#endif

// Sums of 64 rows of W, by four warps, from each of two places on: of a cluster's blocks, and out.
__device__ __forceinline__ void finish_block(const Sum (&sum)[2][SUMS], const int (&places)[2], const Finish &finish,
                                             int first, int rank) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, high = min(TALL, finish.n - first);
    float *parts = (float *)memory;  // [WIDE][PITCH]
    __syncthreads();  // of the ring, which gives way to the sums
#pragma unroll
    for (int q = 0; q < 2; q++)
#pragma unroll
        for (int j = 0; j < SUMS; j++)
            parts[(j / 4 * 8 + 2 * t + j % 2) * PITCH + places[q] + g + j % 4 / 2 * 8] = (float)sum[q][j];
#if SPLIT == 1
    __syncthreads();
#else
    meet();
#endif
    for (int i = rank * 256 + threadIdx.x; i < finish.m * TALL; i += SPLIT * 256) {
        const float *at = parts + i / TALL * PITCH + i % TALL;
#if SPLIT == 1
        const float total = *at;
#else
        const float total = gathered(at);
#endif
        if (i % TALL < high) finish(total, i / TALL, first + i % TALL);
    }
#if SPLIT > 1
    leave();
#endif
}

#ifndef CODES
// w: [n, bytes], x: [m, bytes], in stages of 128 bytes of a row.
extern "C" __global__ void __launch_bounds__(256, 1)
some_rows(const char *w, const char *x, Finish finish, int bytes) {
    const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4;
    const int first = blockIdx.x / SPLIT * TALL, rank = blockIdx.x % SPLIT;
    const int count = (bytes / 128 - rank + SPLIT - 1) / SPLIT;
    const u32 base = (u32)__cvta_generic_to_shared(memory);
    const int row = threadIdx.x / 8, piece = threadIdx.x % 8;
    const char *from = w + (u64)(first + row) * bytes + rank * 128 + piece * 16;
    const int own = row * 128 + (piece ^ row % 8) * 16;
    auto fetch_w = [&](int i) {
#pragma unroll
        for (int u = 0; u < TALL / 32; u++)
            if (first + u * 32 + row < finish.n)
                copy(memory + i % DEPTH * STAGE + u * 4096 + own, from + (u64)u * 32 * bytes + i * (SPLIT * 128));
    };
    auto fetch_x = [&](int i) {
        fetch_rows(base + i % DEPTH * STAGE + CODED, x + (rank + i * SPLIT) * 128, bytes, finish.m);
    };
    let_next();
    for (int i = 0; i < DEPTH - 1 && i < count; i++) fetch_w(i);
    await_last();
    for (int i = 0; i < DEPTH - 1; i++) {
        if (i < count) fetch_x(i);
        close_group();
    }
    Sum sum[2][SUMS] = {};
    for (int i = 0; i < count; i++) {
        await_groups<DEPTH - 2>();
        hand_over();
        if (i + DEPTH - 1 < count) fetch_w(i + DEPTH - 1), fetch_x(i + DEPTH - 1);
        close_group();
        const u32 stage = base + i % DEPTH * STAGE;
        const u64 rows = descriptor(stage + CODED), own = descriptor(stage + group * 16384);
#if TYPE == 2
        float part[2][SUMS];  // units add e4m3 with few bits: 128 columns at a time
#else
        Sum (&part)[2][SUMS] = sum;
#endif
        begin_products();
#pragma unroll
        for (int s = 0; s < 4; s++)
#pragma unroll
            for (int q = 0; q < 2; q++) product(part[q], own + q * 512 + s * 2, rows + s * 2, TYPE != 2 || s);
        close_products();
        await_products<0>();
#if TYPE == 2
#pragma unroll
        for (int q = 0; q < 2; q++)
#pragma unroll
            for (int j = 0; j < SUMS; j++) sum[q][j] += part[q][j];
#endif
    }
    const int places[2] = {group * 128 + warp * 16, group * 128 + 64 + warp * 16};
    finish_block(sum, places, finish, first, rank);
}
#else
// w, scales, zeros: as few_laid has them. W goes from registers into the units. Of a warpgroup's rows a warp has neighbours
// 16 rows apart, whose codes lie side by side.
extern "C" __global__ void __launch_bounds__(256, 1)
some_laid(const Four *w, const char *x, Finish finish, const char *scales, const u32 *zeros, int k) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4;
    const int tiles = finish.n / 64, first = blockIdx.x / SPLIT * 4, rank = blockIdx.x % SPLIT, runs = k / 128;
    const int inside = warp / 2, block = min(first + inside, tiles - 1), word = warp % 2 * 2;  // and the word after it
    const u32 base = (u32)__cvta_generic_to_shared(memory);
    const int count = (runs - rank + SPLIT - 1) / SPLIT;
    auto fetch_codes = [&](int i) {
        char *to = memory + i % DEPTH * STAGE;
        const u64 step = (u64)(rank + i * SPLIT) * 8;
#pragma unroll
        for (int u = 0; u < CODED / 4096; u++) {
            const int c = u * 256 + threadIdx.x, of = c / 32 % 4;
            if (first + of < tiles)
                copy(to + c * 16, w + ((step + c / 128) * tiles + first + of) * 32 + c % 32);
        }
    };
    auto fetch_x = [&](int i) {
        const u32 to = base + i % DEPTH * STAGE + CODED;
        const char *from = x + (rank + i * SPLIT) * 256;
        fetch_rows(to, from, k * 2, finish.m), fetch_rows(to + SIDE, from + 128, k * 2, finish.m);
    };
    u32 scale[TIMES][2];
#if ZEROS
    u32 zero[TIMES];
#endif
    auto look_up = [&](int i) {
#pragma unroll
        for (int s = 0; s < TIMES; s++) {
            const int run = rank + i * SPLIT;
            const u64 at = ((u64)(GROUP < 128 ? run * TIMES + s : run * 128 / GROUP) * tiles + block) * 8 + g;
#if CODES == 0
            scale[s][0] = ::word(scales + at * 16 + word * 4), scale[s][1] = ::word(scales + at * 16 + word * 4 + 4);
#else
            scale[s][0] = ::word(scales + at * 8 + word * 2), scale[s][1] = scale[s][0] >> 16;
#endif
#if ZEROS
            zero[s] = ::word(zeros + at) >> 8 * word;
#endif
        }
    };
    let_next();
    for (int i = 0; i < DEPTH - 1 && i < count; i++) fetch_codes(i);
    if (count) look_up(0);
    await_last();
    for (int i = 0; i < DEPTH - 1; i++) {
        if (i < count) fetch_x(i);
        close_group();
    }
    float sum[2][SUMS] = {};
    for (int i = 0; i < count; i++) {
        await_groups<DEPTH - 2>();
        hand_over();
        if (i + DEPTH - 1 < count) fetch_codes(i + DEPTH - 1), fetch_x(i + DEPTH - 1);
        close_group();
        u32 given[TIMES][2];
#if ZEROS
        u32 nil[TIMES];
#endif
#pragma unroll
        for (int s = 0; s < TIMES; s++) {
            given[s][0] = scale[s][0], given[s][1] = scale[s][1];
#if ZEROS
            nil[s] = zero[s];
#endif
        }
        if (i + 1 < count) look_up(i + 1);
        const char *codes = memory + i % DEPTH * STAGE + inside * 512 + lane * 16 + word * 4;
        const u64 rows = descriptor(base + i % DEPTH * STAGE + CODED);
        float part[2][SUMS];
        u32 a[2][2][4];
#pragma unroll
        for (int s = 0; s < 8; s++) {
            if (s % EACH > 1) await_products<1>();  // of the step whose registers are filled again
            const u64 both = *(const u64 *)(codes + s * 2048);
#pragma unroll
            for (int q = 0; q < 2; q++) {
                const u32 held = (u32)(both >> 32 * q);
#if ZEROS
                const u32 z0 = MAGIC | (nil[s / EACH] >> 8 * q & 15) * 0x10001u;
                const u32 z1 = MAGIC | (nil[s / EACH] >> (8 * q + 4) & 15) * 0x10001u;
#else
                const u32 z0 = MIDDLE, z1 = MIDDLE;
#endif
                a[s % 2][q][0] = pair<0>(held, z0), a[s % 2][q][2] = pair<1>(held, z0);
                a[s % 2][q][1] = pair<2>(held, z1), a[s % 2][q][3] = pair<3>(held, z1);
            }
            begin_products();
#pragma unroll
            for (int q = 0; q < 2; q++)
                product(part[q], a[s % 2][q], rows + s / 4 * (SIDE >> 4) + s % 4 * 2, s % EACH);
            close_products();
            if (s % EACH == EACH - 1) {
                await_products<0>();
#pragma unroll
                for (int q = 0; q < 2; q++) {
                    float above, below;
                    scales_of(given[s / EACH][q], above, below);
#pragma unroll
                    for (int j = 0; j < SUMS; j++) sum[q][j] += part[q][j] * (j % 4 < 2 ? above : below);
                }
            }
        }
    }
    const int places[2] = {inside * 64 + word * 16, inside * 64 + word * 16 + 16};
    finish_block(sum, places, finish, first * 64, rank);
}
#endif
