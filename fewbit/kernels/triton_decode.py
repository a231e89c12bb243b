"""Device functions in Triton that turn stored planes into a tile of values.

A row of codes is one little-endian stream of bits. Where rows are whole words of 32 bits, a tile reads words and takes
them apart in registers: 32 columns of b bits are b words, and what those columns share of scales is read once.
"""

import triton
import triton.language as tl

from fewbit.kernels import coded

INT, FLOAT, EXPONENT, HALF, TABLE, DENSE = (
    tl.constexpr(kind) for kind in (coded.INT, coded.FLOAT, coded.EXPONENT, coded.HALF, coded.TABLE, coded.DENSE)
)
MUL, DIV = tl.constexpr(coded.OPS["mul"]), tl.constexpr(coded.OPS["div"])
# A plane comes in two parts: coded.Data, its pointers and strides, and coded.How, which is compiled in


@triton.jit
def value_of(code, table, HOW: tl.constexpr):
    """code: int32 -> float32, exact."""
    KIND: tl.constexpr = HOW.kind
    MAGNITUDE: tl.constexpr = (1 << (HOW.bits - 1)) - 1
    FIELD: tl.constexpr = HOW.field
    if KIND == INT:  # field: half the range of signed integers, else 0
        value = ((code ^ FIELD) - FIELD).to(tl.float32)
    elif KIND == FLOAT:  # field: bits of mantissa
        FACTOR: tl.constexpr = HOW.factor
        FINITE: tl.constexpr = HOW.finite
        magnitude = code & MAGNITUDE
        bits = (magnitude << (23 - FIELD)) | ((code >> (HOW.bits - 1)) << 31)
        value = bits.to(tl.float32, bitcast=True) * FACTOR
        if FINITE < MAGNITUDE:
            value = tl.where(magnitude > FINITE, float("nan"), value)
    elif KIND == EXPONENT:  # 2**-127 is subnormal
        bits = tl.where(code == 0, 1 << 22, tl.where(code == 255, 0x7FC00000, code << 23))
        value = bits.to(tl.float32, bitcast=True)
    elif KIND == HALF:
        value = (code << 8).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        value = tl.load(table + code)
    return value


@triton.jit
def streamed(data, place, mask, BITS: tl.constexpr):
    """data: pointers to rows; place: index of a code in its row -> int32 codes, a byte or two at a time."""
    bit = place * BITS
    byte = bit >> 3
    code = tl.load(data + byte, mask=mask, other=0).to(tl.int32)
    if 8 % BITS:
        straddles = (bit & 7) + BITS > 8
        code |= tl.load(data + byte + 1, mask=mask & straddles, other=0).to(tl.int32) << 8
    if BITS < 8:
        code = (code >> (bit & 7)) & ((1 << BITS) - 1)
    return code


@triton.jit
def field(words, AT: tl.constexpr, BITS: tl.constexpr):
    """Code AT of 32 in `words`."""
    FIRST: tl.constexpr = AT * BITS // 32
    SHIFT: tl.constexpr = AT * BITS % 32
    code = words[FIRST] >> SHIFT
    if SHIFT + BITS > 32:
        code |= words[FIRST + 1] << (32 - SHIFT)
    return (code & ((1 << BITS) - 1)).to(tl.int32)


@triton.jit
def grid_value(plane, n, k, K, expert, mask, HOW: tl.constexpr):
    """The value of the block that holds (n, k): n [ROWS, 1], k [1, SPANS] -> [ROWS, SPANS] float32."""
    BLOCK_ROWS: tl.constexpr = HOW.rows
    BLOCK_COLS: tl.constexpr = HOW.cols
    if BLOCK_ROWS < 0:  # runs of the flattened matrix
        row, place = n * 0, (n.to(tl.int64) * K + k) // BLOCK_COLS
    else:
        row = n // BLOCK_ROWS if BLOCK_ROWS > 0 else n * 0
        place = k // BLOCK_COLS if BLOCK_COLS > 0 else k * 0
    at = plane[0] + (expert * plane[2] + row.to(tl.int64) * plane[3])
    if HOW.kind == DENSE:
        value = tl.load(at + place, mask=mask, other=0).to(tl.float32)
    else:
        value = value_of(streamed(at, place, mask, HOW.bits), plane[1], HOW)
    return value


@triton.jit
def chained(planes, n, k, K, expert, mask, HOW: tl.constexpr):
    """A chain of one or two planes, applied from the inner to the outer."""
    OUTER: tl.constexpr = HOW.outer
    total = grid_value(planes[0], n, k, K, expert, mask, HOW)
    if HOW.op == DIV:
        total = 1 / tl.where(mask, total, 1.0)
    if OUTER is not None:
        outer = grid_value(planes[1], n, k, K, expert, mask, OUTER)
        if OUTER.op == MUL:
            total *= outer
        elif OUTER.op == DIV:
            total /= tl.where(mask, outer, 1.0)
        else:
            total += outer
    return total


@triton.jit
def scaled(value, scale, zero, FORM: tl.constexpr):
    """value = (code - zero) * scale, or code * scale - zero."""
    if FORM.zeros is not None and FORM.zeros_first:
        value -= zero
    if FORM.scales is not None:
        value *= scale
    if FORM.zeros is not None and not FORM.zeros_first:
        value -= zero
    return value


@triton.jit
def offsets(scales, zeros, n, k, K, expert, mask, FORM: tl.constexpr):
    """-> scale and zero at (n, k)."""
    SCALES: tl.constexpr = FORM.scales
    ZEROS: tl.constexpr = FORM.zeros
    scale, zero = 1.0, 0.0
    if SCALES is not None:
        scale = chained(scales, n, k, K, expert, mask, SCALES)
    if ZEROS is not None:
        zero = chained(zeros, n, k, K, expert, mask, ZEROS)
    return scale, zero


@triton.jit
def one(words, spans, table, AT: tl.constexpr, FORM: tl.constexpr, TYPE: tl.constexpr):
    """Value AT of 32."""
    SPAN: tl.constexpr = AT // FORM.span
    CODES: tl.constexpr = FORM.codes
    code = field(words, AT, CODES.bits)
    return scaled(value_of(code, table, CODES), spans[SPAN][0], spans[SPAN][1], FORM).to(TYPE)


@triton.jit
def four(words, spans, table, AT: tl.constexpr, STEP: tl.constexpr, FORM: tl.constexpr, TYPE: tl.constexpr):
    """Values AT, AT + STEP ...: [..., 2, 2]; a join puts its axis last, so the first join is of what lies far apart."""
    even = tl.join(one(words, spans, table, AT, FORM, TYPE), one(words, spans, table, AT + 2 * STEP, FORM, TYPE))
    odd = tl.join(one(words, spans, table, AT + STEP, FORM, TYPE), one(words, spans, table, AT + 3 * STEP, FORM, TYPE))
    return tl.join(even, odd)


@triton.jit
def sixteen(words, spans, table, AT: tl.constexpr, FORM: tl.constexpr, TYPE: tl.constexpr):
    """Values AT, AT + 2 ...: [..., 2, 2, 2, 2]."""
    even = tl.join(four(words, spans, table, AT, 8, FORM, TYPE), four(words, spans, table, AT + 4, 8, FORM, TYPE))
    odd = tl.join(four(words, spans, table, AT + 2, 8, FORM, TYPE), four(words, spans, table, AT + 6, 8, FORM, TYPE))
    return tl.join(even, odd)


@triton.jit
def by_words(codes, scales, zeros, n, k0, K, expert, FORM: tl.constexpr, EVEN: tl.constexpr, TYPE: tl.constexpr,
             ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    """`tile` where every row is whole words: a thread holds runs of 32 columns, and what they share once."""
    BITS: tl.constexpr = FORM.codes.bits
    SPAN: tl.constexpr = FORM.span
    k = k0 + tl.arange(0, COLS // 32)[None, :] * 32
    inside = (k < K) & (n >= 0)
    at = codes[0] + (expert * codes[2] + n.to(tl.int64) * codes[3]) + k // 32 * BITS
    words, spans = (), ()
    for i in tl.static_range(BITS):
        word = tl.load(at + i) if EVEN else tl.load(at + i, mask=inside, other=0)
        words = words + (word.to(tl.uint32, bitcast=True),)  # noqa: RUF005
    for i in tl.static_range(0, 32, SPAN):
        spans = spans + (offsets(scales, zeros, n, k + i, K, expert, inside, FORM),)  # noqa: RUF005
    table = codes[1]
    values = tl.join(sixteen(words, spans, table, 0, FORM, TYPE), sixteen(words, spans, table, 1, FORM, TYPE))
    return values.reshape(ROWS, COLS)


@triton.jit
def by_codes(codes, scales, zeros, n, k0, K, expert, FORM: tl.constexpr, TYPE: tl.constexpr, COLS: tl.constexpr):
    """`tile` for any row, code by code: right, and slow."""
    k = k0 + tl.arange(0, COLS)[None, :]
    inside = (k < K) & (n >= 0)
    row = codes[0] + (expert * codes[2] + n.to(tl.int64) * codes[3])
    CODES: tl.constexpr = FORM.codes
    code = streamed(row, k, inside, CODES.bits)
    scale, zero = offsets(scales, zeros, n, k, K, expert, inside, FORM)
    return scaled(value_of(code, codes[1], CODES), scale, zero, FORM).to(TYPE)


@triton.jit
def tile(codes, scales, zeros, n, k0, K, expert, FORM: tl.constexpr, EVEN: tl.constexpr, TYPE: tl.constexpr,
         ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    """n: [ROWS] rows of the weight -> [ROWS, COLS] values of the columns from k0 on; finite beyond K."""
    if FORM.words:
        values = by_words(codes, scales, zeros, n[:, None], k0, K, expert, FORM, EVEN, TYPE, ROWS, COLS)
    else:
        values = by_codes(codes, scales, zeros, n[:, None], k0, K, expert, FORM, TYPE, COLS)
    return values
