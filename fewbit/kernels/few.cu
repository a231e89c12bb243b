// y = x W^T for up to 16 rows of x: a step of decoding is the reading of W, so every warp streams rows of W past its
// matrix units by itself, K dealt out to warps, and nobody waits for anybody before the sums meet at the end.
//
// mma takes 16 rows of W (its A) and 8 rows of x (its B). Which columns lie in which place of a fragment does not
// matter as long as A and B agree, so lane 4g + t takes what lies 16 bytes wide in memory: of rows g and g + 8 of W, and
// of row g of x. `few_rows` reads W [N, K] as stored; `few_laid` reads codes in humming's layout, where those of 64 rows
// and 16 columns lie together, a word of each lane for every bit. Loads go to shared memory, so that those under way need
// no registers. A lane copies what it reads back itself, and nothing need be synchronised, unless eight lanes would then
// not copy 128 bytes in a row, which takes twice the time.
//
// Compiled for: TYPE of x (0 bfloat16, 1 float16, 2 e4m3), OUT of y (0, 1), TILES of 8 rows of x, WARPS of a block, SPLIT
// blocks to a sum; rows (SPLIT 0): DEPTH copies under way, HIGH tiles of W to a warp; laid: CODES 0 integers of BITS under
// scales of x's type, 1 e2m1 under e4m3, 2 e2m1 under e8m0, GROUP columns to a scale, 0 none, ZEROS 1 where each has a
// zero of 4 bits, 2 one of x's type, SPREAD (1, 2) columns of a tile of x to a row.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct __align__(8) Two { u32 x, y; };
struct __align__(16) Four { u32 x, y, z, w; };
struct __align__(16) Numbers { float v[4]; };

#ifdef INSTRUCTIONS  // a file of what stands for those below, where all of this runs on a CPU (tests/kernels/few_cpu.h)
#include INSTRUCTIONS
#else
// Into shared memory, past the L1: weights are read once. Groups of copies are waited for in their order.
__device__ __forceinline__ void copy(void *to, const void *from) {
    const u32 at = (u32)__cvta_generic_to_shared(to);
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" :: "r"(at), "l"(from));
}

// The same where other blocks of this processor read it too.
__device__ __forceinline__ void copy_shared(void *to, const void *from) {
    const u32 at = (u32)__cvta_generic_to_shared(to);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" :: "r"(at), "l"(from));
}

__device__ __forceinline__ void close_group() { asm volatile("cp.async.commit_group;"); }
template <int later> __device__ __forceinline__ void await_group() {
    asm volatile("cp.async.wait_group %0;" :: "n"(later) : "memory");
}

// at + many * bytes, by the unit that multiplies: the other one is what these loops wait for.
template <typename T> __device__ __forceinline__ const T *further(const T *at, u32 many, u32 bytes) {
    u64 found;
    asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(found) : "r"(many), "r"(bytes), "l"(at));
    return (const T *)found;
}

__device__ __forceinline__ Four four(const void *at) {
    Four v;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at));
    return v;
}

__device__ __forceinline__ Two two(const void *at) {
    Two v;
    asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(at));
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

__device__ __forceinline__ void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if TYPE == 0
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};" : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#elif TYPE == 1
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};" : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
    asm("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};" : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#endif
}

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

// x & mask | y: left to the compiler that is two instructions.
template <u32 mask> __device__ __forceinline__ u32 masked(u32 x, u32 y) {
    u32 v;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(v) : "r"(x), "n"(mask), "r"(y));
    return v;
}

// Pairs of 16 bits; the product is of bfloat16.
__device__ __forceinline__ u32 less(u32 x, u32 y) {
#if TYPE == 0
    asm("sub.rn.bf16x2 %0, %0, %1;" : "+r"(x) : "r"(y));
#else
    asm("sub.rn.f16x2 %0, %0, %1;" : "+r"(x) : "r"(y));
#endif
    return x;
}

__device__ __forceinline__ u32 product(u32 x, u32 y) {
    asm("mul.rn.bf16x2 %0, %0, %1;" : "+r"(x) : "r"(y));
    return x;
}

// Rows of x as the second operand of two products: four times 8 rows by 8 columns; lane 8 i + j says where row j of i is.
__device__ __forceinline__ void rows_of(u32 (&b)[4], const char *at) {
    const u32 from = (u32)__cvta_generic_to_shared(at);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3]) : "r"(from));
}

// All blocks of a cluster have come here; or all read no other's memory any more.
__device__ __forceinline__ void meet() {
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}
__device__ __forceinline__ void leave() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

// What another block has in that place of its memory.
__device__ __forceinline__ float other(const float *at, int block) {
    u32 there;
    float v;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"((u32)__cvta_generic_to_shared(at)), "r"(block));
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(there));
    return v;
}
#endif

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

extern __shared__ __align__(16) char memory[];

#if SPLIT == 0
// w: [n, bytes], x: [m, bytes]; a block makes 16 HIGH columns of y.
extern "C" __global__ void __launch_bounds__(WARPS * 32)
few_rows(const char *w, const char *x, Finish finish, int bytes) {
    constexpr int STEP = WARPS * 64, STAGE = (2 * HIGH + TILES) * 512;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const u64 eight = 8ull * bytes;
    const char *from = w + blockIdx.x * 2 * HIGH * eight + (u64)g * bytes + warp * 64 + t * 16;
    char *ring = memory + warp * (DEPTH * STAGE) + lane * 16;
    int left = bytes - warp * 64;
    let_next();
#pragma unroll
    for (int s = 0; s < DEPTH; s++) {
        if (left > s * STEP)
#pragma unroll
            for (int h = 0; h < 2 * HIGH; h++) copy(ring + s * STAGE + h * 512, from + h * eight + s * STEP);
        close_group();
    }
    const char *own = x + (u64)g * bytes + warp * 64 + t * 16;
    bool there[TILES];
    await_last();
#pragma unroll
    for (int j = 0; j < TILES; j++) {
        there[j] = j * 8 + g < finish.m;
#pragma unroll
        for (int s = 0; s < DEPTH; s++) {
            Four v = {0, 0, 0, 0};
            if (there[j] && left > s * STEP) v = four(own + j * eight + s * STEP);
            *(Four *)(ring + s * STAGE + (2 * HIGH + j) * 512) = v;
        }
    }
    float sum[HIGH][TILES][4] = {};
    from += DEPTH * STEP, own += DEPTH * STEP;
    for (char *here = ring; left > 0; left -= STEP, from += STEP, own += STEP) {
        await_group<DEPTH - 1>();
        Four b[TILES];
#pragma unroll
        for (int j = 0; j < TILES; j++) b[j] = *(const Four *)(here + (2 * HIGH + j) * 512);
#pragma unroll
        for (int h = 0; h < HIGH; h++) {
            const Four up = *(const Four *)(here + h * 1024), low = *(const Four *)(here + h * 1024 + 512);
#pragma unroll
            for (int j = 0; j < TILES; j++) {
                float part[4] = {};  // units add e4m3 with few bits: 64 columns at a time
                mma(part, up.x, low.x, up.y, low.y, b[j].x, b[j].y);
                mma(part, up.z, low.z, up.w, low.w, b[j].z, b[j].w);
#pragma unroll
                for (int i = 0; i < 4; i++) sum[h][j][i] += part[i];
            }
        }
        if (left > DEPTH * STEP) {
#pragma unroll
            for (int h = 0; h < 2 * HIGH; h++) copy(here + h * 512, from + h * eight);
#pragma unroll
            for (int j = 0; j < TILES; j++)
                if (there[j]) copy_shared(here + (2 * HIGH + j) * 512, own + j * eight);
        }
        close_group();
        here = here + STAGE < ring + DEPTH * STAGE ? here + STAGE : ring;
    }
    __syncthreads();  // of the ring, which gives way to the sums
    constexpr int WIDE = 16 * HIGH, APART = WIDE + 1;
    float *parts = (float *)memory;  // [WARPS][TILES * 8][APART]
#pragma unroll
    for (int h = 0; h < HIGH; h++)
#pragma unroll
        for (int j = 0; j < TILES; j++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                parts[(warp * TILES * 8 + j * 8 + 2 * t + i % 2) * APART + h * 16 + g + i / 2 * 8] = sum[h][j][i];
    __syncthreads();
    for (int i = threadIdx.x; i < TILES * 8 * WIDE; i += WARPS * 32) {
        float total = 0;
#pragma unroll
        for (int k = 0; k < WARPS; k++) total += parts[(k * TILES * 8 + i / WIDE) * APART + i % WIDE];
        finish(total, i / WIDE, blockIdx.x * WIDE + i % WIDE);
    }
}
#else
#if TYPE == 0
#define MAGIC 0x43004300u  // 128 in bfloat16, whose last bit is worth 1
#define ONES 0x3f803f80u
#else
#define MAGIC 0x64006400u  // 1024 in float16
#define ONES 0x3c003c00u
#endif

// e2m1 has its bits put where bfloat16 (float16) has such, which is too small by 2^126 (2^14) and costs no arithmetic:
// subnormals are numbers to the matrix units. So that bfloat16's products stay in float32's range, x comes with 2^64; of
// a sum what is below 2^-87 is lost. Scales of such codes are numbers above 0.
#if CODES == 0
#define UNIT 1.0f
#elif TYPE == 0
#define UNIT 0x1p62f
#else
#define UNIT 0x1p14f
#endif

// A lane's 32 codes of a piece come in BITS words. Codes of 3, 5, 6 and 7 bits have no places of their own there: of
// every SLOT bits of a word and the next ones, what comes first are one's high bits and then its low ones. Spread out
// each has SLOT bits, and with the one 16 bits above is a pair: numbers 2 q and 2 q + 1.
constexpr int SLOT = BITS > 4 ? 8 : BITS > 2 ? 4 : 2, MIDDLE = 1 << (BITS - 1);
constexpr u32 TOP = (1u << BITS) - 1, PAIR = TOP * 0x10001u, SLOTS = 0xffffffffu / ((1u << SLOT) - 1);

__device__ __forceinline__ u32 spread_out(const u32 (&words)[BITS], int i) {
    const int at = i * BITS / SLOT, off = i * BITS % SLOT, low = off + BITS - SLOT;
    if (low <= 0) return words[at] >> off;
    return words[at] >> (SLOT - BITS) & (TOP >> low << low) * SLOTS | words[at + 1] & ((1u << low) - 1) * SLOTS;
}

// Pair q as two numbers; integers less their zero.
__device__ __forceinline__ u32 pair(const u32 (&spread)[SLOT], int q, u32 zero) {
    const u32 codes = spread[q * SLOT / 16];
    const int p = q % (16 / SLOT);
    u32 v;
#if CODES == 0 && BITS == 8 && TYPE == 0  // the sign, and how far from -1/2 it is: of 127 + 1/2 there are eight bits
    const u32 sign = (p ? codes : codes << 8) & 0x80008000u;
    v = masked<0x007f007f>(p ? codes >> 8 : codes, MAGIC) | sign;
    v = less(less(v, 0x42ff42ffu | sign), 0x3f003f00u);
#elif CODES == 0
    v = less(masked<PAIR>(codes >> SLOT * p, MAGIC), zero);
#elif TYPE == 0  // one product puts the sign and the rest in their places, and more beside them
    const int at = p % 2 * 4;
    v = (p < 2 ? codes : codes >> 8) & 0x000f000fu << at;
    v = v * ((1 << (12 - at)) + (1 << (6 - at))) & 0x81c081c0u;
#else
    const int far = 9 - 4 * p;
    const u32 size = far < 0 ? codes >> -far : codes << (far < 0 ? 0 : far), sign = codes << (12 - 4 * p) & 0x80008000u;
    v = size & 0x0e000e00u | sign;
#endif
    return v;
}

// Two numbers of x as the product wants them.
__device__ __forceinline__ u32 raised(u32 x) {
#if CODES != 0 && TYPE == 0
    return product(x, 0x5f805f80u);
#else
    return x;
#endif
}

// Scales of 8 rows.
#if CODES == 0
typedef Four Scales;
__device__ __forceinline__ Scales scales_at(const void *at) { return four(at); }
#else
typedef Two Scales;
__device__ __forceinline__ Scales scales_at(const void *at) { return two(at); }
#endif

// Those of rows g + 16 r and g + 16 r + 8.
__device__ __forceinline__ void two_of(const Scales &v, int r, float &above, float &below) {
#if CODES == 0
    const u32 both = r == 0 ? v.x : r == 1 ? v.y : r == 2 ? v.z : v.w;
    above = widened(both & 0xffff), below = widened(both >> 16);
#else
    const u32 word = r < 2 ? v.x : v.y;
#if CODES == 1  // as bfloat16 too small by 2^120
    const u32 both = product(__byte_perm(word, 0, r % 2 ? 0x4342 : 0x4140) << 4, 0x7b807b80u);
    above = __uint_as_float(both << 16), below = __uint_as_float(both & 0xffff0000u);
#else
    const u32 both = word >> r % 2 * 16;
    above = __uint_as_float(both << 23 & 0x7f800000u), below = __uint_as_float(both << 15 & 0x7f800000u);
#endif
#endif
}

// What a lane reads at once.
#if BITS % 4 == 0
typedef Four Part;
#elif BITS % 2 == 0
typedef Two Part;
#else
typedef u32 Part;
#endif
__device__ __forceinline__ void put_words(u32 *to, const Four &v) { to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w; }
__device__ __forceinline__ void put_words(u32 *to, const Two &v) { to[0] = v.x, to[1] = v.y; }
__device__ __forceinline__ void put_words(u32 *to, u32 v) { *to = v; }

// Four of them, of rows g + 8 j and g + 8 j + 32.
__device__ __forceinline__ void all_of(const Scales &v, Numbers &low, Numbers &high) {
    two_of(v, 0, low.v[0], low.v[1]), two_of(v, 1, low.v[2], low.v[3]);
    two_of(v, 2, high.v[0], high.v[1]), two_of(v, 3, high.v[2], high.v[3]);
}

// w: [k / 16, n / 64, 32 lanes, BITS words]; scales: [k / GROUP, n / 64, 8, 8], of row g + 8 j at [g, j], and so zeros.
// Those of x's type are between codes: what they take away is the sum of x times them, for which units multiply x by ones
// too. A block makes 64 columns of y over its share of K; the SPLIT blocks of a cluster add up in one another's memory.
//
// Up to 4 rows of x leave half of a tile idle. With SPREAD each has two columns of it, one with the x of every other
// group and nothing of the rest, so that sums of two groups meet their scales at once, in the order of one column.
extern "C" __global__ void __launch_bounds__(WARPS * 32)
few_laid(const char *w, const char *x, Finish finish, const Scales *scales, const void *zeros, int k) {
    constexpr int RUN = BITS * 1024, PARTS = BITS * 4 / sizeof(Part);  // bytes of codes of 128 columns; of 16, a lane's
    constexpr int COPIES = (BITS + 1) / 2, LAST = BITS % 2 ? 16 : 32;  // of two pieces, 16 bytes a lane, of LAST at the end
    constexpr bool OWN = BITS == 4;  // lanes copy what they read
    constexpr int WIDE = GROUP ? GROUP : 128;
    constexpr int TIMES = WIDE < 128 ? 128 / WIDE : 1, EACH = 8 / TIMES;  // scales of a run of 128 columns; pieces to each
    constexpr int STRIDE = SPLIT * WARPS, ROW = 256 + 16, HALF = TILES * 8 * ROW;  // rows of x lie in banks of their own
    constexpr bool SHARED = TIMES > 1;  // lanes make numbers of scales for one another
    constexpr int OUTS = TILES * 8 / SPREAD;  // rows of x that there is room for
    constexpr int MADE = SHARED ? TIMES * (ZEROS == 2 ? 512 : 256) : 0, MINE = (TIMES + 3) / 4;
    static_assert(ZEROS < 2 || SHARED, "");
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int tile = blockIdx.x / SPLIT, rank = blockIdx.x % SPLIT, tiles = finish.n / 64, runs = k / 128;
    int run = rank * WARPS + warp;
    const u32 apart = tiles * BITS * 128;  // bytes from 16 columns to the next
    const Four *from[OWN ? 1 : COPIES];
#pragma unroll
    for (int j = 0; j < (OWN ? 1 : COPIES); j++) {
        const u32 at = j * 32 + lane, piece = at / (BITS * 8);
        from[j] = (const Four *)w + (((u64)run * 8 + piece) * tiles + tile) * (BITS * 8) + at % (BITS * 8);
    }
    char *own = memory + warp * (RUN + 2 * HALF + MADE);  // codes of a run, rows of x of two runs, scales of a run
    Numbers *numbers = (Numbers *)(own + RUN + 2 * HALF);  // [TIMES, 2, 8], of rows g + 8 j, j 0 to 3 and 4 to 7
#if ZEROS == 2
    Numbers *fewer = numbers + TIMES * 16;  // so what sums of x are times, for zeros
#endif
    auto copy_two = [&](int i) {  // pieces
#pragma unroll
        for (int j = 0; j < COPIES; j++)
            if (j < COPIES - 1 || lane < LAST)
                copy((Four *)own + i * (BITS * 8) + j * 32 + lane, further(from[OWN ? 0 : j], OWN ? i + j : i, apart));
    };
    let_next();
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
        if (run < runs) copy_two(i);
        close_group();
    }
    const int first = SHARED ? lane / 8 : 0, row = SHARED ? lane % 8 : g;  // of the scales that this lane looks up
    const Scales *of = scales + ((u64)first * tiles + tile) * 8 + row;
    Scales scale[MINE];
#if ZEROS == 1
    u32 zero[TIMES];
#elif ZEROS
    Scales zero[MINE];
#endif
    auto look_up = [&](int r) {
        const u32 group = WIDE < 128 ? r * TIMES : r * 128 / WIDE;
#pragma unroll
        for (int s = 0; s < MINE && GROUP; s++)
            if (first + 4 * s < TIMES) scale[s] = scales_at(further(of, group + 4 * s, tiles * 8 * sizeof(Scales)));
#if ZEROS == 1
#pragma unroll
        for (int s = 0; s < TIMES; s++)
            zero[s] = word(further((const u32 *)zeros + tile * 8 + g, group + s, tiles * 32));
#elif ZEROS
#pragma unroll
        for (int s = 0; s < MINE; s++)
            if (first + 4 * s < TIMES)
                zero[s] = scales_at(further((const Scales *)zeros + (of - scales), group + 4 * s, tiles * 8 * sizeof(Scales)));
#endif
    };
    if (run < runs) look_up(run);
    char *rows = own + RUN;
    for (int i = lane; i < TILES * 128; i += 32)  // 16 bytes of a row each
        *(Four *)(rows + i / 16 * ROW + i % 16 * 16) = *(Four *)(rows + HALF + i / 16 * ROW + i % 16 * 16) = Four{0, 0, 0, 0};
    __syncwarp();
    await_last();
    const char *given_x = x + ((u64)(lane / 16) * k + run * 128) * 2 + lane % 16 * 16;  // 16 bytes of every other row
    char *put = rows + (lane / 16 * SPREAD + lane % 16 * 8 / WIDE % SPREAD) * ROW + lane % 16 * 16;
#pragma unroll
    for (int i = 0; i < OUTS / 2; i++)
        if (lane / 16 + 2 * i < finish.m && run < runs)
            *(Four *)(put + i * 2 * SPREAD * ROW) = four(further(given_x, i, k * 4));
    __syncwarp();
    const char *look = rows + lane % 8 * ROW + lane / 8 * 16;
    float sum[TILES][4][4] = {};
    for (int half = 0; run < runs; run += STRIDE, half ^= HALF) {
        const bool more = run + STRIDE < runs;
        const Scales given = scale[0];
#pragma unroll
        for (int s = 0; s < MINE && SHARED; s++) {
            Numbers low, high;
            all_of(scale[s], low, high);
            if (first + 4 * s < TIMES) {
                numbers[(first + 4 * s) * 16 + row] = low;
                numbers[(first + 4 * s) * 16 + 8 + row] = high;
            }
#if ZEROS == 2
            Numbers less, least;
            all_of(zero[s], less, least);
#pragma unroll
            for (int j = 0; j < 4; j++) less.v[j] = (MIDDLE - less.v[j]) * low.v[j];
#pragma unroll
            for (int j = 0; j < 4; j++) least.v[j] = (MIDDLE - least.v[j]) * high.v[j];
            if (first + 4 * s < TIMES) {
                fewer[(first + 4 * s) * 16 + row] = less;
                fewer[(first + 4 * s) * 16 + 8 + row] = least;
            }
#endif
        }
#if ZEROS == 1
        u32 nil[TIMES];
#pragma unroll
        for (int s = 0; s < TIMES; s++) nil[s] = zero[s];
#endif
#pragma unroll
        for (int j = 0; j < (OWN ? 1 : COPIES); j++) from[j] = further(from[j], STRIDE * 8, apart);
        if (more) {
            look_up(run + STRIDE);
            given_x += STRIDE * 256;
#pragma unroll
            for (int i = 0; i < OUTS / 2; i++)
                if (lane / 16 + 2 * i < finish.m)
                    copy_shared(put + (half ^ HALF) + i * 2 * SPREAD * ROW, further(given_x, i, k * 4));
        }
        float part[TILES][4][4];
        u32 b[TILES][4];  // of two pieces
#if ZEROS == 2
        float whole[TILES][4];  // sums of x
#endif
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int s = i / EACH;
            if (i % 2 == 0) await_group<3>();  // of four to a run; its rows of x came with the first
            if (i == 0 || (i % 2 == 0 && !OWN)) __syncwarp();  // rows of x that other lanes have copied, scales, codes
            u32 words[BITS], codes[SLOT];
#pragma unroll
            for (int h = 0; h < PARTS; h++)
                put_words(words + h * (sizeof(Part) / 4), ((const Part *)own)[(i * 32 + lane) * PARTS + h]);
#pragma unroll
            for (int h = 0; h < SLOT; h++) codes[h] = spread_out(words, h);
#pragma unroll
            for (int j = 0; j < TILES && i % 2 == 0; j++) {
                rows_of(b[j], look + half + j * 8 * ROW + i * 32);
#pragma unroll
                for (int h = 0; h < 4; h++) b[j][h] = raised(b[j][h]);
            }
#pragma unroll
            for (int r = 0; r < 4; r++) {
#if ZEROS == 1
                const u32 z0 = MAGIC | ((nil[s] >> 8 * r) & 15) * 0x10001u;
                const u32 z1 = MAGIC | ((nil[s] >> (8 * r + 4)) & 15) * 0x10001u;
#else
                const u32 z0 = MAGIC | MIDDLE * 0x10001u, z1 = z0;
#endif
                const u32 a0 = pair(codes, 4 * r, z0), a2 = pair(codes, 4 * r + 1, z0);
                const u32 a1 = pair(codes, 4 * r + 2, z1), a3 = pair(codes, 4 * r + 3, z1);
#pragma unroll
                for (int j = 0; j < TILES; j++) {
#pragma unroll
                    for (int v = 0; v < 4; v++) part[j][r][v] = i % (EACH * SPREAD) ? part[j][r][v] : 0;
                    mma(part[j][r], a0, a1, a2, a3, b[j][i % 2 * 2], b[j][i % 2 * 2 + 1]);
                }
            }
#if ZEROS == 2
#pragma unroll
            for (int j = 0; j < TILES; j++) {
#pragma unroll
                for (int v = 0; v < 4; v++) whole[j][v] = i % (EACH * SPREAD) ? whole[j][v] : 0;
                mma(whole[j], ONES, ONES, ONES, ONES, b[j][i % 2 * 2], b[j][i % 2 * 2 + 1]);
            }
#endif
#pragma unroll
            for (int r = 0; r < 4 && (i + 1) % (EACH * SPREAD) == 0; r++) {
#if SPREAD > 1
                const Numbers one = numbers[(s - 1) * 16 + r / 2 * 8 + g], two = numbers[s * 16 + r / 2 * 8 + g];
#if ZEROS == 2
                const Numbers less = fewer[(s - 1) * 16 + r / 2 * 8 + g], least = fewer[s * 16 + r / 2 * 8 + g];
#endif
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    float v = __fmaf_rn(part[0][r][2 * h], one.v[r % 2 * 2 + h], sum[0][r][h]);
#if ZEROS == 2
                    v = __fmaf_rn(whole[0][0], less.v[r % 2 * 2 + h], v);
#endif
                    v = __fmaf_rn(part[0][r][2 * h + 1], two.v[r % 2 * 2 + h], v);
#if ZEROS == 2
                    v = __fmaf_rn(whole[0][1], least.v[r % 2 * 2 + h], v);
#endif
                    sum[0][r][h] = v;
                }
#else
                float above = 1, below = 1;
                if (SHARED) {
                    const Numbers made = numbers[s * 16 + r / 2 * 8 + g];
                    above = made.v[r % 2 * 2], below = made.v[r % 2 * 2 + 1];
                } else if (GROUP) {
                    two_of(given, r, above, below);
                }
#if ZEROS == 2
                const Numbers less = fewer[s * 16 + r / 2 * 8 + g];
#endif
#pragma unroll
                for (int j = 0; j < TILES; j++)
#pragma unroll
                    for (int v = 0; v < 4; v++) {
                        sum[j][r][v] = __fmaf_rn(part[j][r][v], v < 2 ? above : below, sum[j][r][v]);
#if ZEROS == 2
                        sum[j][r][v] = __fmaf_rn(whole[j][v % 2], less.v[r % 2 * 2 + v / 2], sum[j][r][v]);
#endif
                    }
#endif
            }
            if (i % 2) {
                if (!OWN) __syncwarp();
                if (more) copy_two(i - 1);
                close_group();
            }
        }
        __syncwarp();  // of scales, which the next run overwrites, and of rows of x: the one after it
    }
    __syncthreads();  // of the ring, which gives way to the sums
    float *parts = (float *)memory;  // [WARPS][rows of x][65]
#pragma unroll
    for (int j = 0; j < TILES; j++)
#pragma unroll
        for (int r = 0; r < 4; r++)
#pragma unroll
            for (int i = 0; i < 4; i += SPREAD)
                parts[(warp * OUTS + j * 8 + (2 * t + i % 2) / SPREAD) * 65 + r * 16 + g + i / 2 * 8] = sum[j][r][i / SPREAD];
    __syncthreads();
    auto over_warps = [&](int i) {
        float total = 0;
#pragma unroll
        for (int q = 0; q < WARPS; q++) total += parts[(q * OUTS + i / 64) * 65 + i % 64];
        return total;
    };
#if SPLIT == 1
    for (int i = threadIdx.x; i < OUTS * 64; i += WARPS * 32) finish(over_warps(i) * UNIT, i / 64, tile * 64 + i % 64);
#else
    __shared__ float block[OUTS * 64];
    for (int i = threadIdx.x; i < OUTS * 64; i += WARPS * 32) block[i] = over_warps(i);
    meet();
    for (int i = rank * WARPS * 32 + threadIdx.x; i < OUTS * 64; i += SPLIT * WARPS * 32) {
        float total = 0;
#pragma unroll
        for (int q = 0; q < SPLIT; q++) total += other(block + i, q);
        finish(total * UNIT, i / 64, tile * 64 + i % 64);
    }
    leave();  // its memory stays until then
#endif
}
#endif
