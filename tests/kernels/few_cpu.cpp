// few.cu on a CPU, block by block; few_cpu.h has what stands for a GPU.

#include <cmath>
#include <cstring>
#include <ucontext.h>
#include <vector>

#define __align__(bytes) __attribute__((aligned(bytes)))
#define __device__
#define __forceinline__ inline
#define __global__
#define __launch_bounds__(threads)
#define __shared__
#define __fmaf_rn fmaf
#define threadIdx Place{now}
#define blockIdx Place{block_now}
#define INSTRUCTIONS "few_cpu.h"

struct Place {
    int x;
};

static int block_now;

#include "few.cu"

alignas(16) char memory[1 << 18];

static std::vector<const void *> given;
static Finish finish;
static int length;
static bool ended[WARPS * 32];

static void turn() {
#if SPLIT == 0
    few_rows((const char *)given[0], (const char *)given[1], finish, length);
#else
    few_laid((const char *)given[0], (const char *)given[1], finish, (const Scales *)given[2], (const u32 *)given[3], length);
#endif
    ended[now] = true;
}

// length: bytes of a row for few_rows, columns for few_laid.
extern "C" void run(const void *w, const void *x, void *y, const void *scales, const void *zeros, int m, int n, int long_,
                    int blocks) {
    given = {w, x, scales, zeros};
    finish = Finish{(u16 *)y, nullptr, nullptr, nullptr, m, n, 0, 0};
    length = long_;
    std::vector<std::vector<char>> stacks(WARPS * 32, std::vector<char>(1 << 16));
    for (block_now = 0; block_now < blocks; block_now++) {
        for (auto &warp : warps) warp = Barrier();
        block_of = Barrier();
        memset(memory, 0xff, sizeof memory);
        for (int i = 0; i < WARPS * 32; i++) {
            ended[i] = false;
            getcontext(&turns[i]);
            turns[i].uc_stack.ss_sp = stacks[i].data(), turns[i].uc_stack.ss_size = stacks[i].size();
            turns[i].uc_link = &others;
            makecontext(&turns[i], turn, 0);
        }
        for (bool more = true; more;) {
            more = false;
            for (now = 0; now < WARPS * 32; now++)
                if (!ended[now]) swapcontext(&others, &turns[now]), more |= !ended[now];
        }
    }
}
