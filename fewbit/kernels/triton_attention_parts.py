"""What the attention kernels share: walking along a text through its pages, and a softmax that grows as it goes.

Logits are kept in powers of two. `top` starts at a finite lowest, so that rows that have seen nothing yet need no care.
A sink is where `top` and `total` start: a logit that takes weight and brings no value.

Scales of each token join scores and weights on the way. Those measured for a whole head cost nothing: that of keys
joins the scaling of scores before the walk, that of values what was gathered after it.

SHARED: a value is the first numbers of its key, so that one tile is both. The rest of a key is a tile of its own, and a
product of its own that joins the scores: 512 + 64 numbers of a latent are not padded to 1024.

PAIRS: codes of a byte are read two at a time, since matrix units are fed 16 bits at a time, and become float16, which
holds them all and which GPUs make of two at once. Queries and weights follow, brought to its range by powers of two and
by the largest scale. A product then has two halves: the even and the odd numbers of a head. "ptx": by the instructions
of NVIDIA's GPUs, a third of what Triton makes of the same, which is "triton".
"""

from functools import cache as once

import torch
import triton
import triton.language as tl

from fewbit.kernels.cache import E4M3_SINCE, Cache
from fewbit.kernels.triton_attention import split
from fewbit.kernels.triton_runtime import power

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e30)
LEAST = tl.constexpr(2.0**-6)  # below it e4m3 has one step
SMALL = tl.constexpr(1.5 * 2.0**14)  # what is added to it and taken away again is rounded to multiples of 2^-9

# Four codes of $2, bytes 0 and 2 to $0 and 1 and 3 to $1, as pairs of float16.
E4M3_PTX = tl.constexpr("""{
    .reg .b32 four; .reg .b16 lower, upper;
    prmt.b32 four, $2, 0, 0x3120;
    mov.b32 {lower, upper}, four;
    cvt.rn.f16x2.e4m3x2 $0, lower;
    cvt.rn.f16x2.e4m3x2 $1, upper;
}""")
E5M2_PTX = tl.constexpr("""
    prmt.b32 $0, $2, 0, 0x2404;
    and.b32 $1, $2, 0xFF00FF00;
""")
INT8_PTX = tl.constexpr("""{
    .reg .b32 four, lower, upper, bias;
    mov.b32 bias, 0x64806480;
    xor.b32 four, $2, 0x80808080;
    prmt.b32 lower, four, 0x64646464, 0x4240;
    prmt.b32 upper, four, 0x64646464, 0x4341;
    sub.f16x2 $0, lower, bias;
    sub.f16x2 $1, upper, bias;
}""")


@triton.jit
def opening(sinks, head, inside, ROWS: tl.constexpr):
    """-> top and total of rows before anything is seen; head: [ROWS], inside: of which rows the sink counts here."""
    if sinks is None:
        top = tl.full([ROWS], LOWEST, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
    else:
        sink = tl.load(sinks + head, mask=inside, other=float("-inf")).to(tl.float32) * LOG2E
        top = tl.maximum(sink, LOWEST)
        total = tl.where(sink > LOWEST, 1.0, 0.0)
    return top, total


@triton.jit
def scaled(x, measured, kin):
    """x times the measured scale of a head."""
    if measured is not None:
        x = x * tl.load(measured + kin)
    return x


@triton.jit
def as_e4m3(x):
    """x: float32 from 0 to 448 -> the nearest that e4m3 holds, ties to even; on devices that lack the type too."""
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    return tl.where(x < LEAST, x + SMALL - SMALL, normal)


@triton.jit
def halves(pairs, CODE: tl.constexpr, PAIRS: tl.constexpr):
    """int16 -> the lower and the upper code of each, as float16."""
    if PAIRS == "ptx":
        asm: tl.constexpr = INT8_PTX if CODE.is_int() else E5M2_PTX if CODE.is_fp8e5() else E4M3_PTX
        lower, upper = tl.inline_asm_elementwise(asm, "=r,=r,r", [pairs], dtype=(tl.float16, tl.float16), is_pure=True,
                                                 pack=2)  # fmt: skip
    elif CODE.is_int():  # 0x6400 is 1024 in float16, whose last bit is 1 there
        lower = ((pairs & 0xFF) ^ 0x6480).to(tl.float16, bitcast=True) - 1152.0
        upper = (((pairs >> 8) & 0xFF) ^ 0x6480).to(tl.float16, bitcast=True) - 1152.0
    else:
        lower = pairs.to(tl.int8).to(CODE, bitcast=True).to(tl.float16)
        upper = (pairs >> 8).to(tl.int8).to(CODE, bitcast=True).to(tl.float16)
    return lower, upper


@triton.jit
def floats(codes, like):
    """One by one. GPUs make no two bfloat16 of e4m3 at once, but two float16, and two bfloat16 of two float32."""
    if codes.dtype.is_fp8() and like.dtype == tl.bfloat16:
        codes = codes.to(tl.float16).to(tl.float32)
    return codes.to(like.dtype)


@triton.jit
def sides(x, SIZE: tl.constexpr):
    """[ROWS, SIZE] -> its even and its odd columns."""
    return tl.split(tl.reshape(x, [x.shape[0], SIZE // 2, 2]))


@triton.jit
def narrowed(query):
    """-> float16, and for each row the power of two that it was divided by: of its largest."""
    wide = query.to(tl.float32)
    power = (tl.max(tl.abs(wide), 1).to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    power = tl.where(power > 0.0, power, 1.0)
    return (wide / power[:, None]).to(tl.float16), power


@triton.jit
def paged(pages, start, last, SIZE: tl.constexpr, TOKENS: tl.constexpr):
    """-> [TOKENS]: the pages of the tokens from start on, a multiple of TOKENS. Each is read once where sizes fit."""
    n = tl.arange(0, TOKENS)
    if TOKENS % SIZE == 0:
        i = tl.arange(0, TOKENS // SIZE)
        page = tl.load(pages + start // SIZE + i, mask=start + i * SIZE < last, other=0)
        page = tl.reshape(tl.broadcast_to(page[:, None], [TOKENS // SIZE, SIZE]), [TOKENS])
    elif SIZE % TOKENS == 0:
        page = tl.load(pages + start // SIZE, mask=start < last, other=0) + n * 0
    else:
        page = tl.load(pages + (start + n) // SIZE, mask=start + n < last, other=0)
    return page


@triton.jit
def within(start, SIZE: tl.constexpr, TOKENS: tl.constexpr):
    """-> [TOKENS]: the places of these tokens in their pages."""
    n = tl.arange(0, TOKENS)
    if TOKENS % SIZE == 0:
        place = n % SIZE
    elif SIZE % TOKENS == 0:
        place = start % SIZE + n
    else:
        place = (start + n) % SIZE
    return place


@triton.jit
def walk(
    query, rest, acc, total, top, first, last, length, at, window, pages, page, key, value, key_scale, value_scale,
    k_slot: tl.constexpr, v_slot: tl.constexpr, s_slot, scaling, softcap, MASKED: tl.constexpr, SIZE: tl.constexpr,
    TOKENS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DR: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    DRP: tl.constexpr, SHARED: tl.constexpr, PRECISION: tl.constexpr, P: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Tokens first to last for rows that stand at places `at`; MASKED where a row may not see all of them.

    rest: what of queries follows their first D numbers, where DR is above 0. first: a multiple of TOKENS. The pages of
    a tile are read one tile ahead, `page` those of the first, so that copying keys and values is all that is pipelined.
    Strides are constants: a place in memory is one instruction away from a page.

    P above 0: weights, as far as the largest seen so far is 1, are rounded to e4m3 after this factor. Products of e4m3
    are what they are in 16 bits.
    """
    CODE: tl.constexpr = key.dtype.element_ty
    PAIRED: tl.constexpr = (PAIRS != "" and not SHARED and CODE.primitive_bitwidth == 8 and query.dtype != tl.float32
                            and D % 2 + DV % 2 == 0 and DP >= 32 and DVP >= 32)  # fmt: skip
    EACH: tl.constexpr = 2 if PAIRED else 1
    d = tl.arange(0, DP // EACH)
    e = tl.arange(0, DVP // EACH)
    factor = tl.zeros([query.shape[0]], tl.float32) + scaling * LOG2E
    if PAIRED:
        query, power = narrowed(query)
        factor *= power
        query, odd_query = sides(query, DP)
        acc, odd_acc = sides(acc, DVP)
        key = key.to(tl.pointer_type(tl.int16), bitcast=True)
        value = value.to(tl.pointer_type(tl.int16), bitcast=True)
    for start in range(first, last, TOKENS):
        n = start + tl.arange(0, TOKENS)
        inside = n < length
        far, place = page.to(tl.int64), within(start, SIZE, TOKENS)
        slot = far * SIZE + place
        page = paged(pages, start + TOKENS, last, SIZE, TOKENS)
        k_at = key + ((place * (k_slot // EACH))[None, :] + d[:, None]) + (far * (k_slot // EACH * SIZE))[None, :]
        if MASKED or D < DP:
            keys = tl.load(k_at, mask=inside[None, :] & (d < D // EACH)[:, None], other=0.0)
        else:
            keys = tl.load(k_at)
        if PAIRED:
            keys, odd_keys = halves(keys, CODE, PAIRS)
            scores = tl.dot(odd_query, odd_keys, tl.dot(query, keys))
        else:
            keys = floats(keys, query)
            scores = tl.dot(query, keys, input_precision=PRECISION)
        if DR > 0:
            r = tl.arange(0, DRP)
            r_at = key + ((place * k_slot)[None, :] + (D + r)[:, None]) + (far * (k_slot * SIZE))[None, :]
            if MASKED or DR < DRP:
                others = tl.load(r_at, mask=inside[None, :] & (r < DR)[:, None], other=0.0)
            else:
                others = tl.load(r_at)
            scores = tl.dot(rest, floats(others, query), scores, input_precision=PRECISION)
        if key_scale is not None:
            scores *= tl.load(key_scale + slot * s_slot, mask=inside, other=0.0)[None, :]
        if softcap is not None:  # tanh from an exponential that may overflow: 2 / inf is 0
            scores = softcap - 2.0 * softcap / (tl.exp2(scores * (factor * (2.0 / softcap))[:, None]) + 1.0)
            unit = tl.zeros_like(factor) + LOG2E
        else:
            unit = factor
        if MASKED:
            seen = inside[None, :] & (n[None, :] <= at[:, None])
            if window is not None:
                seen = seen & (n[None, :] > at[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
        peak = tl.maximum(top, tl.max(scores, 1) * unit)
        weights = tl.exp2(scores * unit[:, None] - peak[:, None])
        fade = tl.exp2(top - peak)
        total = total * fade + tl.sum(weights, 1)
        top = peak
        if P > 0.0:
            weights = as_e4m3(weights * P)
        if value_scale is not None:
            scale = tl.load(value_scale + slot * s_slot, mask=inside, other=0.0)
            if PAIRED:
                most = tl.max(scale, 0)
                most = tl.where(most > 0.0, most, 1.0)
                scale /= most
                fade /= most  # acc stands under this scale until the end of the turn
            weights *= scale[None, :]
        if SHARED:
            acc = tl.dot(weights.to(query.dtype), tl.trans(keys), acc * fade[:, None], input_precision=PRECISION)
        else:
            v_at = value + ((place * (v_slot // EACH))[:, None] + e[None, :]) + (far * (v_slot // EACH * SIZE))[:, None]
            if MASKED or DV < DVP:
                values = tl.load(v_at, mask=inside[:, None] & (e < DV // EACH)[None, :], other=0.0)
            else:
                values = tl.load(v_at)
            if PAIRED:
                values, odd_values = halves(values, CODE, PAIRS)
                acc = tl.dot(weights.to(tl.float16), values, acc * fade[:, None])
                odd_acc = tl.dot(weights.to(tl.float16), odd_values, odd_acc * fade[:, None])
                if value_scale is not None:
                    acc *= most
                    odd_acc *= most
            else:
                acc = tl.dot(weights.to(query.dtype), floats(values, query), acc * fade[:, None],
                             input_precision=PRECISION)  # fmt: skip
    if PAIRED:
        acc = tl.interleave(acc, odd_acc)
    return acc, total, top


def padded(size: int) -> int:
    """A size that tiles can have."""
    return max(16, power(size))


def sizes(cache: Cache) -> dict[str, int]:
    value_size, size, rest = split(cache)
    return {"D": size, "DV": value_size, "DR": rest, "DP": padded(size), "DVP": padded(value_size),
            "DRP": padded(rest) if rest else 0, "SHARED": cache.shared}  # fmt: skip


def tiled(cache: Cache) -> int:
    """Numbers of a token that tiles hold: of its key, and of a value that is not in it."""
    value_size, size, rest = split(cache)
    return padded(size) + (padded(rest) if rest else 0) + (0 if cache.shared else padded(value_size))


@once
def pairs(device: torch.device) -> str:
    """PAIRS there."""
    able = device.type == "cuda" and torch.version.cuda is not None
    return "ptx" if able and torch.cuda.get_device_capability(device) >= E4M3_SINCE else "triton"


def precision(dtype: torch.dtype) -> str:
    """float32 is for those who want all of it."""
    return "ieee" if dtype == torch.float32 else "tf32"


@once
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; the interpreter is as wide as a small one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


@once
def shared_bytes(device: torch.device) -> int:
    """Of shared memory that one program can have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin if device.type == "cuda" else 1 << 20
