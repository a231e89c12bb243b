// What stands for a GPU's instructions in few.cu, so that its kernels run on a CPU as they are. The threads of a block are
// contexts that take turns, and give way where a GPU's wait for one another. A copy is there at once, so that waiting for
// it too late does not show.

static int now;  // the thread whose turn it is
static ucontext_t turns[WARPS * 32], others;

struct Barrier {
    int here = 0, round = 0;

    void wait(int size) {
        const int mine = round;
        if (++here == size) here = 0, round++;
        while (round == mine) swapcontext(&turns[now], &others);
    }
};

static Barrier warps[WARPS], block_of;

inline void __syncwarp() { warps[now / 32].wait(32); }
inline void __syncthreads() { block_of.wait(WARPS * 32); }

inline void copy(void *to, const void *from) { memcpy(to, from, 16); }
inline void copy_shared(void *to, const void *from) { memcpy(to, from, 16); }
inline void close_group() {}
template <int later> void await_group() {}
inline void let_next() {}
inline void await_last() {}
inline void meet() {}
inline void leave() {}
inline float other(const float *at, int) { return *at; }

template <typename T> const T *further(const T *at, u32 many, u32 bytes) {
    return (const T *)((const char *)at + (u64)many * bytes);
}

inline Four four(const void *at) { return *(const Four *)at; }
inline Two two(const void *at) { return *(const Two *)at; }
inline u32 word(const void *at) { return *(const u32 *)at; }

inline float __uint_as_float(u32 v) {
    float out;
    memcpy(&out, &v, 4);
    return out;
}

inline u32 __byte_perm(u32 x, u32 y, u32 which) {
    const u64 both = (u64)y << 32 | x;
    u32 out = 0;
    for (int i = 0; i < 4; i++) out |= (u32)(both >> (which >> 4 * i & 7) * 8 & 255) << 8 * i;
    return out;
}

inline u16 narrowed(float v, bool brain) {
    if (brain) {
        u32 bits;
        memcpy(&bits, &v, 4);
        return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    }
    const _Float16 half = (_Float16)v;
    u16 out;
    memcpy(&out, &half, 2);
    return out;
}

inline float wide(u16 v, bool brain) {
    if (brain) return __uint_as_float((u32)v << 16);
    _Float16 half;
    memcpy(&half, &v, 2);
    return (float)half;
}

inline u16 rounded(float v) { return narrowed(v, OUT == 0); }
inline float widened(u16 v) { return wide(v, OUT == 0); }

template <u32 mask> u32 masked(u32 x, u32 y) { return (x & mask) | y; }

inline u32 less(u32 x, u32 y) {
    const auto one = [&](int at) { return narrowed(wide(x >> at, TYPE == 0) - wide(y >> at, TYPE == 0), TYPE == 0); };
    return one(0) | (u32)one(16) << 16;
}

inline u32 product(u32 x, u32 y) {
    const auto one = [&](int at) { return narrowed(wide(x >> at, true) * wide(y >> at, true), true); };
    return one(0) | (u32)one(16) << 16;
}

// Number `at` of 32 bits.
inline double number(u32 v, int at) {
#if TYPE == 2
    const int code = v >> 8 * at & 255, exponent = code >> 3 & 15, rest = code & 7;
    const double size = exponent ? ldexp(8 + rest, exponent - 10) : ldexp(rest, -9);
    return code & 128 ? -size : size;
#else
    return wide(v >> 16 * at, TYPE == 0);
#endif
}

// A thread 4 g + t has of A rows g and g + 8 and of B row g: of every WIDE numbers those from WIDE / 4 t on.
inline void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    constexpr int EACH = TYPE < 2 ? 2 : 4, HALF = 4 * EACH;
    static u32 held[WARPS][32][6];
    const u32 mine[6] = {a0, a1, a2, a3, b0, b1};
    auto &all = held[now / 32];
    memcpy(all[now % 32], mine, sizeof mine);
    __syncwarp();
    float sums[4];
    for (int i = 0; i < 4; i++) {
        const int row = now % 32 / 4, column = now % 4 * 2 + i % 2;
        double sum = 0;
        for (int k = 0; k < 2 * HALF; k++) {
            const int thread = k % HALF / EACH, late = k / HALF;
            sum += number(all[4 * row + thread][2 * late + i / 2], k % EACH) * number(all[4 * column + thread][4 + late], k % EACH);
        }
        sums[i] = c[i] + (float)sum;
    }
    __syncwarp();
    memcpy(c, sums, sizeof sums);
}

inline void rows_of(u32 (&b)[4], const char *at) {
    static const char *given[WARPS][32];
    given[now / 32][now % 32] = at;
    __syncwarp();
    for (int i = 0; i < 4; i++) memcpy(&b[i], given[now / 32][8 * i + now % 32 / 4] + now % 4 * 4, 4);
    __syncwarp();
}
