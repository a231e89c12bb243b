"""Fuzz the readers: `python tests/fuzz/fuzz_files.py --seconds 60 [--seed N]`.

Sound files are damaged (bytes, integers, header text, cuts) and opened and read. Only CheckpointError may
escape, no tensor may be larger than the file, and the process may not grow by more than ROOM.
"""

import argparse
import random
import resource
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from fewbit.errors import CheckpointError
from fewbit.files.checkpoint import open_checkpoint
from fewbit.files.gguf import check_vocabulary
from tests.hostile.generators import FULL, aligned, vocabulary, with_kv, with_tensors
from tests.hostile.raw import array, entry, info, number, pair, safetensors, strings

ROOM = 64 << 20
ROUND = 500  # examples between two looks at the clock

NUMBERS = [0, 1, 2, 7, 8, 13, 31, 32, 63, 64, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32]
NUMBERS += [2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64 - 32]
WORDS = ["-1", "1e9", "1e999", "NaN", "null", "true", '""', "[]", "{}", '"F4"', '"F6_E2M3"', '"U8"', "9" * 30, "0.5"]
WORDS += [str(n) for n in NUMBERS] + [
    "[" * 80,
    '"\\ud800"',
    '"a":1,',
    '"w"',
    '"shape"',
    "}",
    "]",
    ",",
    '"__metadata__"',
]

TENSORS = {
    "w": entry("F32", [2, 2], 0, 16),
    "x": entry("F4", [2, 4], 16, 20),
    "": entry("BF16", [0, 3], 20, 20),
    "y": entry("BOOL", [4], 20, 24),
    "z": entry("C64", [], 24, 32),
}
ARRAYS = [array(f"a{kind}", kind, 2, bytes(2 * size)) for kind, size in enumerate((1, 1, 2, 2, 4, 4, 4, 1))]


def _content(make: Callable[[Path], Path]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return make(Path(folder) / "m").read_bytes()


SAFETENSORS = [
    safetensors({}),
    safetensors({"w": entry("U8", [8], 0, 8)}, bytes(8)),
    safetensors({"__metadata__": {"format": "pt"}} | {k or "e": v for k, v in TENSORS.items()}, bytes(32)),
]
GGUF = [
    FULL,
    _content(aligned(64)),
    _content(vocabulary(["<unk>", "<0x00>", "é", "abc"], [2, 6, 1, 1])),
    _content(with_kv(*ARRAYS, strings("s", ["", "b"]), number("u64", 1, 10, "Q"), pair("f64", 12, bytes(8)))),
    _content(with_tensors(info("a", [4, 1, 2]), info("b", []), data=64)),
]


@st.composite
def damaged(draw: st.DrawFn, sound: list[bytes]) -> bytes:
    data = bytearray(draw(st.sampled_from(sound)))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        length = draw(st.sampled_from([1, 4, 8, 16]))
        match draw(st.sampled_from(["byte", "u32", "u64", "cut", "drop", "copy", "insert"])):
            case "byte":
                data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
            case "u32":
                data[at : at + 4] = struct.pack("<I", draw(st.sampled_from(NUMBERS)) % 2**32)
            case "u64":
                data[at : at + 8] = struct.pack("<Q", draw(st.sampled_from(NUMBERS)) % 2**64)
            case "cut":
                del data[at:]
            case "drop":
                del data[at : at + length]
            case "copy":
                data[at:at] = data[at : at + length]
            case "insert":
                data[at:at] = draw(st.binary(max_size=16))
    return bytes(data)


@st.composite
def edited_header(draw: st.DrawFn) -> bytes:
    """Damage to the JSON text, with a length that fits again."""
    whole = draw(st.sampled_from(SAFETENSORS))
    length = struct.unpack_from("<Q", whole)[0]
    header, data = whole[8 : 8 + length], whole[8 + length :]
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(header)))
        end = at + draw(st.integers(0, 6))
        header = header[:at] + draw(st.sampled_from(WORDS)).encode() + header[end:]
    return safetensors(header, data)


CASES = (
    damaged(SAFETENSORS).map(lambda data: ("model.safetensors", data))
    | edited_header().map(lambda data: ("model.safetensors", data))
    | damaged(GGUF).map(lambda data: ("model.gguf", data))
)


def read_all(path: Path) -> str:
    """Open and read everything; which way it ended."""
    try:
        with open_checkpoint(path) as checkpoint:
            for name in checkpoint.tensors:
                checkpoint.read(name)
            if checkpoint.gguf is not None:
                check_vocabulary(checkpoint.gguf.kv)
    except CheckpointError as e:
        if path.name not in str(e) or len(str(e)) > 1000 + len(str(path)):
            raise AssertionError(f"a message that does not name the file, or is too long: {e}") from e
        return "refused"
    return "opened"


def guard_allocations(limit: Callable[[], int]) -> None:
    real = torch.empty

    def checked(shape: tuple[int, ...], **options: Any) -> torch.Tensor:
        out = real(shape, **options)
        if out.nbytes > limit():
            raise AssertionError(f"{out.nbytes} bytes were taken for a file of {limit()}")
        return out

    torch.empty = checked


def limit_growth() -> None:
    if sys.platform.startswith("linux"):
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmSize"))
        resource.setrlimit(resource.RLIMIT_AS, (int(line.split()[1]) * 1024 + ROOM, resource.RLIM_INFINITY))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=None)
    args = parser.parse_args()
    chosen = random.randrange(2**32) if args.seed is None else args.seed
    ends: Counter[str] = Counter()
    size = 0
    with tempfile.TemporaryDirectory() as folder:

        @settings(max_examples=ROUND, database=None, deadline=None, suppress_health_check=list(HealthCheck))
        @given(CASES)
        def one(case: tuple[str, bytes]) -> None:
            nonlocal size
            name, data = case
            path, size = Path(folder) / name, len(data)
            path.write_bytes(data)
            ends[f"{path.suffix} {read_all(path)}"] += 1

        guard_allocations(lambda: size)
        limit_growth()
        stop = time.monotonic() + args.seconds
        while time.monotonic() < stop:
            print(f"seed {chosen}: {dict(ends)}", flush=True)
            seed(chosen)(one)()
            chosen = (chosen + 1) % 2**32
    print(f"{sum(ends.values())} files in {args.seconds:g} s, nothing escaped: {dict(sorted(ends.items()))}")


if __name__ == "__main__":
    main()
