// The processor's tiles (AMX): 16 rows of 64 bytes. A tile A holds 16 rows of W as they lie, a tile B 16 rows of x on their
// side, a tile C the 16 x 16 products, [n][m]. A number of C is one chain of sums along K whatever stands beside it, and C
// goes to memory and back unchanged: so a row of x gives the same bits alone and in company.
//
// x and W lie as tiles, a step of 64 bytes of K after the other: W [n / 16][steps][16][64], x [m / 16][steps][16][cols x 4].

#pragma once
#include <cstdint>
#include <cstring>
#include <sys/syscall.h>
#include <unistd.h>
#include "vectors.h"

#if defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(DOTS)
#define TILES 1

static const int64_t TILE = 1024;  // bytes
static const int64_t C = 256;      // numbers of a tile C

// Some compilers do not know what the instructions of tiles read: 8 of the configuration's 64 bytes, nothing of a tile.
static inline void barrier() { asm volatile("" ::: "memory"); }

// The kernel of the system gives tiles to those who ask.
static inline bool allowed() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

struct Config {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
};

// Tiles for `cols` rows of x at a time, of `bytes` of K; what another library had set comes back afterwards.
class Tiles {
    alignas(64) Config before;

  public:
    explicit Tiles(int64_t cols, int64_t bytes = 64) {
        alignas(64) Config mine;
        memset(&before, 0, sizeof before), memset(&mine, 0, sizeof mine);
        mine.palette = 1;
        for (int i = 0; i < 8; i++) {
            mine.rows[i] = uint8_t(i < 6 ? 16 : bytes / 4);
            mine.bytes[i] = uint16_t(i == 4 || i == 5 ? bytes : 4 * cols);
        }
        _tile_storeconfig(&before);
        barrier();
        _tile_loadconfig(&mine);
        barrier();
    }
    ~Tiles() {
        barrier();
        if (before.palette) _tile_loadconfig(&before);
        else _tile_release();
        barrier();
    }
};

// C (2 tiles of W x 1 or 2 of x) += over `count` steps. next_w, next_x: bytes to the second tile of each.
template <bool INTS, bool TWO>
static inline void steps(const uint8_t* w, int64_t next_w, const uint8_t* x, int64_t next_x, int64_t cols, int64_t count) {
#define TIMES(c, a, b)            \
    if (INTS) {                   \
        _tile_dpbssd(c, a, b);    \
    } else {                      \
        _tile_dpbf16ps(c, a, b);  \
    }
    barrier();
    for (int64_t i = 0; i < count; i++, w += TILE, x += 64 * cols) {
        _tile_loadd(4, w, 64);
        _tile_loadd(6, x, 4 * cols);
        TIMES(0, 4, 6);
        _tile_loadd(5, w + next_w, 64);
        TIMES(2, 5, 6);
        if (TWO) {
            _tile_loadd(7, x + next_x, 4 * cols);
            TIMES(1, 4, 7);
            TIMES(3, 5, 7);
        }
    }
#undef TIMES
}

template <bool TWO>
static inline void load_c(const void* c) {
    const int32_t* p = (const int32_t*)c;
    barrier();
    _tile_loadd(0, p, 64);
    _tile_loadd(2, p + 2 * C, 64);
    if (TWO) {
        _tile_loadd(1, p + C, 64);
        _tile_loadd(3, p + 3 * C, 64);
    }
}
template <bool TWO>
static inline void zero_c() {
    _tile_zero(0);
    _tile_zero(2);
    if (TWO) {
        _tile_zero(1);
        _tile_zero(3);
    }
}
template <bool TWO>
static inline void store_c(void* c) {
    int32_t* p = (int32_t*)c;
    _tile_stored(0, p, 64);
    _tile_stored(2, p + 2 * C, 64);
    if (TWO) {
        _tile_stored(1, p + C, 64);
        _tile_stored(3, p + 3 * C, 64);
    }
    barrier();
}

// x: rows of `bytes` (whole steps) -> tiles B of up to 16 rows; rows that are not there are 0
static void lay(const uint8_t* x, int64_t rows, int64_t bytes, uint8_t* out) {
    const int64_t cols = rows < 16 ? rows : 16;
    if (cols < 16) {
        for (int64_t m = 0; m < rows; m++)
            for (int64_t i = 0; i < bytes / 4; i++) memcpy(out + 4 * (i * cols + m), x + m * bytes + 4 * i, 4);
        return;
    }
#pragma omp parallel for schedule(static)
    for (int64_t b = 0; b < (rows + 15) / 16; b++)
        for (int64_t i = 0; i < bytes / 64; i++) {
            __m512i r[16];
            for (int64_t m = 0; m < 16; m++)
                r[m] = 16 * b + m < rows ? _mm512_loadu_si512(x + (16 * b + m) * bytes + 64 * i) : _mm512_setzero_si512();
            turn(r);
            for (int64_t m = 0; m < 16; m++) _mm512_store_si512(out + b * 16 * bytes + i * TILE + 64 * m, r[m]);
        }
}
#endif
