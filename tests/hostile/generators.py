"""Bad checkpoints, one function each, built byte by byte (never with the package's own writers).

`HOSTILE`: (case, make, words): `make(folder)` writes the checkpoint and returns the path to open, which must
fail with a CheckpointError holding every one of `words`. `VOCABULARY` holds GGUF files that open and whose
vocabulary is a trap, `BENIGN` odd files that must open. Loop over them in every test of a reader.
"""

import json
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.hostile.raw import (
    ARCH,
    ARRAY,
    BOOL,
    F32,
    I32,
    STRING,
    U8,
    U16,
    U32,
    U64,
    array,
    entry,
    gguf,
    info,
    number,
    pair,
    safetensors,
    strings,
    text,
)

Make = Callable[[Path], Path]

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4, "vocab_size": 4}
MANY = 2**64 - 1
DEEP = 100_000


def folder(content: bytes | None, **files: Any) -> Make:
    """A folder of config.json and, unless None, model.safetensors; `files` are extra, dots written as `__`."""

    def make(path: Path) -> Path:
        path.mkdir(parents=True, exist_ok=True)
        written = {"config__json": CONFIG} | files
        if content is not None:
            written["model__safetensors"] = content
        for name, value in written.items():
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            (path / name.replace("__", ".")).write_bytes(data)
        return path

    return make


def one(dtype: str, shape: Sequence[Any], nbytes: int, data: int | None = None) -> Make:
    """A folder with one tensor "w" whose offsets say `nbytes` and whose data has `data` bytes."""
    return folder(safetensors({"w": entry(dtype, shape, 0, nbytes)}, bytes(nbytes if data is None else data)))


def tiled(*ranges: tuple[int, int], data: int = 8) -> Make:
    """Tensors a, b, ... of one-byte elements in the given ranges."""
    header = {chr(97 + i): entry("U8", [e - s], s, e) for i, (s, e) in enumerate(ranges)}
    return folder(safetensors(header, bytes(data)))


GOOD = safetensors({"w": entry("F32", [2, 2], 0, 16)}, bytes(16))
NESTED = b"[" * DEEP + b"]" * DEEP
TWICE = b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
LONE = b'{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'

SAFETENSORS: list[tuple[str, Make, tuple[str, ...]]] = [
    ("F1-empty", folder(b""), ("model.safetensors", "at least 8")),
    ("F1-under-8", folder(b"\x02\0\0\0"), ("model.safetensors", "at least 8")),
    ("F1-header-past-end", folder(safetensors(b"{}", length=1000)), ("header", "1000")),
    ("F1-header-over-limit", folder(safetensors(b"{}", length=100_000_001)), ("header", "limit")),
    ("F1-header-huge", folder(safetensors(b"{}", length=MANY)), ("header", "limit")),
    ("F1-header-empty", folder(safetensors(b"")), ("header", "JSON")),
    ("F2-overlap", tiled((0, 5), (3, 8)), ("'b'", "data_offsets", "overlaps")),
    ("F2-same-range", tiled((0, 8), (0, 8)), ("'b'", "overlaps")),
    ("F2-gap", tiled((0, 3), (5, 8)), ("'b'", "data_offsets", "gap")),
    ("F2-gap-at-start", tiled((2, 8)), ("'a'", "gap")),
    ("F2-backwards", tiled((8, 0)), ("'a'", "data_offsets")),
    ("F2-negative-start", tiled((-4, 4)), ("'a'", "data_offsets")),
    ("F2-trailing", tiled((0, 4), (4, 6)), ("2 trailing bytes",)),
    ("F2-no-tensors-trailing", tiled(), ("8 trailing bytes",)),
    ("F2-past-end", tiled((0, 4), (4, 9)), ("'b'", "data_offsets")),
    ("F3-too-few-bytes", one("F32", [4], 12), ("'w'", "takes 16 bytes", "12")),
    ("F3-too-many-bytes", one("F32", [4], 20), ("'w'", "takes 16 bytes", "20")),
    ("F3-product-wraps", one("F32", [2**32, 2**32, 4], 0), ("'w'", "overflows")),
    ("F3-product-wraps-to-size", one("U8", [2**62, 4, 1], 0), ("'w'", "overflows")),
    ("F3-product-wraps-past-zero", one("U8", [0, 2**62, 2**62], 0), ("'w'", "overflows")),
    ("F3-negative-dimension", one("F32", [-1, -4], 16), ("'w'", "dimension -1")),
    ("F3-float-dimension", one("F32", [4.0], 16), ("'w'", "dimension 4.0")),
    ("F3-bool-dimension", one("F32", [True, 4], 16), ("'w'", "dimension True")),
    ("F3-dimension-2^64", one("U8", [2**64], 0), ("'w'", "dimension")),
    ("F3-65-dimensions", one("U8", [1] * 65, 1), ("'w'", "65 dimensions")),
    ("F3-a-terabyte", one("F32", [2**38], 2**40, 16), ("'w'", "data_offsets")),
    ("F3-offset-2^63", one("U8", [2**63 - 1], 2**63 - 1, 16), ("'w'", "data_offsets")),
    ("F3-unknown-dtype", one("F5", [4], 4), ("'w'", "dtype 'F5'")),
    ("F3-dtype-no-string", folder(safetensors({"w": entry([], [1], 0, 1)}, b"a")), ("'w'", "dtype")),
    ("F3-shape-no-list", folder(safetensors({"w": entry("U8", [1], 0, 1) | {"shape": 1}}, b"a")), ("'w'", "shape")),
    ("F3-offsets-no-pair", folder(safetensors({"w": entry("U8", [1], 0, 1) | {"data_offsets": [1]}})), ("'w'", "pair")),
    ("F3-missing-field", folder(safetensors({"w": {"dtype": "U8", "shape": [0]}})), ("'w'", "data_offsets")),
    ("F3-unknown-field", folder(safetensors({"w": entry("U8", [1], 0, 1) | {"x": 1}}, b"a")), ("'w'", "exactly")),
    ("F3-entry-no-object", folder(safetensors({"w": 3})), ("'w'", "entry")),
    ("F3-empty-name", folder(safetensors({"": entry("U8", [1], 0, 1)}, b"a")), ("empty name",)),
    ("F4-header-not-utf8", folder(safetensors(b'{"\xff":1}')), ("header", "UTF-8")),
    ("F4-header-not-json", folder(safetensors(b"{'w': 1}")), ("header", "not JSON")),
    ("F4-header-array", folder(safetensors(b"[]")), ("header", "object")),
    ("F4-header-leading-space", folder(safetensors(b" {}")), ("header", "object")),
    ("F4-header-duplicate", folder(safetensors(TWICE, b"a")), ("header", "duplicate key 'w'")),
    ("F4-header-deep", folder(safetensors(NESTED)), ("header", "nested deeper")),
    ("F4-header-deep-objects", folder(safetensors(b'{"a":' * DEEP + b"1" + b"}" * DEEP)), ("header", "nested deeper")),
    ("F4-header-unclosed", folder(safetensors(b"[" * DEEP)), ("header", "nested deeper")),
    ("F4-header-open-string", folder(safetensors(b'{"' + b'\\"' * DEEP)), ("header", "brackets")),
    ("F4-header-nan", folder(safetensors(b'{"w": NaN}')), ("header", "NaN")),
    ("F4-header-long-number", folder(safetensors(b'{"w": ' + b"9" * 5000 + b"}")), ("header", "not JSON")),
    ("F4-lone-surrogate", folder(safetensors(LONE, b"a")), ("header", "surrogate")),
    ("F4-metadata-no-strings", folder(safetensors({"__metadata__": {"a": 1}})), ("__metadata__",)),
    ("F5-odd-count", one("F4", [3, 3], 5), ("'w'", "F4")),
    ("F5-odd-rows", one("F4", [2, 3], 3), ("'w'", "F4")),
    ("F5-no-dimension", one("F4", [], 1), ("'w'", "F4")),
    ("F5-six-bits", one("F6_E2M3", [2], 2), ("'w'", "F6_E2M3")),
    ("F10-cut", folder(GOOD[:-1]), ("'w'", "data_offsets")),
]

CONFIGS: list[tuple[str, Make, tuple[str, ...]]] = [
    ("F4-config-not-utf8", folder(GOOD, config__json=b'{"a": "\xff"}'), ("config.json", "UTF-8")),
    ("F4-config-not-json", folder(GOOD, config__json=b"{a}"), ("config.json", "not JSON")),
    ("F4-config-empty", folder(GOOD, config__json=b""), ("config.json", "not JSON")),
    ("F4-config-array", folder(GOOD, config__json=b"[]"), ("config.json", "object")),
    ("F4-config-duplicate", folder(GOOD, config__json=b'{"a": 1, "b": {"c": 1, "c": 2}}'), ("config.json", "'c'")),
    ("F4-config-deep", folder(GOOD, config__json=b'{"a":' + NESTED + b"}"), ("config.json", "nested deeper")),
    ("F4-config-nan", folder(GOOD, config__json=b'{"rms_norm_eps": NaN}'), ("config.json", "NaN")),
    ("F4-config-infinity", folder(GOOD, config__json=b'{"rms_norm_eps": 1e999}'), ("config.json", "1e999")),
    ("F4-quantize-config", folder(GOOD, quantize_config__json=b"{"), ("quantize_config.json",)),
]


# index files and folders


def sharded(weight_map: Any, shards: Mapping[str, bytes] | None = None) -> Make:
    """A folder with an index (unless None) and, unless told otherwise, two shards holding "a" and "b"."""
    held = {"model-00001-of-00002.safetensors": shard("a"), "model-00002-of-00002.safetensors": shard("b")}

    def make(path: Path) -> Path:
        folder(None)(path)
        raw = weight_map if isinstance(weight_map, bytes) else json.dumps({"weight_map": weight_map}).encode()
        if weight_map is not None:
            (path / "model.safetensors.index.json").write_bytes(raw)
        for name, data in (held if shards is None else shards).items():
            (path / name).write_bytes(data)
        return path

    return make


def shard(*names: str) -> bytes:
    header = {name: entry("U8", [4], 4 * i, 4 * i + 4) for i, name in enumerate(names)}
    return safetensors(header, bytes(4 * len(names)))


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
BOTH = {"a": FIRST, "b": SECOND}
LISTED_TWICE = json.dumps({"weight_map": BOTH}).replace('"b"', '"a"').encode()


def linked_out(path: Path) -> Path:
    """The second shard is a symlink to a good file beside the folder."""
    sharded(BOTH)(path)
    outside = path.with_name(path.name + "-outside.safetensors")
    os.replace(path / SECOND, outside)
    (path / SECOND).symlink_to(outside)
    return path


def linked_config(path: Path) -> Path:
    folder(GOOD)(path)
    outside = path.with_name(path.name + "-outside.json")
    os.replace(path / "config.json", outside)
    (path / "config.json").symlink_to(outside)
    return path


def linked_circle(path: Path) -> Path:
    folder(None)(path)
    (path / "model.safetensors").symlink_to(path / "model.safetensors")
    return path


def outside_shard(name: str) -> Make:
    def make(path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "x.safetensors").write_bytes(shard("b"))
        return sharded({"a": FIRST, "b": name.format(parent=path.parent)})(path)

    return make


def pipe(path: Path) -> Path:
    folder(None)(path)
    os.mkfifo(path / "model.safetensors")
    return path


def empty_folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


def nothing(path: Path) -> Path:
    return path / "org" / "model"


INDEX_JSON = "model.safetensors.index.json"
FOLDERS: list[tuple[str, Make, tuple[str, ...]]] = [
    ("F6-missing-shard", sharded(BOTH, {FIRST: shard("a")}), (SECOND, "missing")),
    ("F6-listed-twice", sharded(LISTED_TWICE), (INDEX_JSON, "duplicate key 'a'")),
    ("F6-in-two-shards", sharded(BOTH, {FIRST: shard("a", "b"), SECOND: shard("b")}), (SECOND, "'b'", FIRST)),
    ("F6-not-in-shard", sharded(BOTH | {"c": FIRST}), (INDEX_JSON, "'c'", FIRST)),
    ("F6-in-other-shard", sharded({"a": SECOND, "b": FIRST}), (INDEX_JSON, "'a'", SECOND)),
    ("F6-parent-folder", outside_shard("../x.safetensors"), ("../x.safetensors", "plain name")),
    ("F6-absolute", outside_shard("{parent}/x.safetensors"), ("x.safetensors", "plain name")),
    ("F6-symlink-leaves", linked_out, (SECOND, "symlink", "leaves the folder")),
    ("F6-symlink-config", linked_config, ("config.json", "leaves the folder")),
    ("F6-symlink-circle", linked_circle, ("model.safetensors",)),
    ("F6-nul-in-name", sharded({"a": "x\0.safetensors"}), ("plain name",)),
    ("F6-no-map", sharded(b'{"metadata": {}}'), (INDEX_JSON, "weight_map")),
    ("F6-map-of-numbers", sharded({"a": 1}), (INDEX_JSON, "'a'")),
    ("F6-names-a-pickle", sharded({"a": "pytorch_model.bin"}), (INDEX_JSON, "pytorch_model.bin")),
    ("F6-no-index", sharded(None), ("no model.safetensors.index.json",)),
    (
        "F6-two-models",
        sharded(BOTH, {FIRST: shard("a"), SECOND: shard("b"), "model.safetensors": GOOD}),
        ("two models",),
    ),
    ("F12-bin", folder(None, pytorch_model__bin=b"\x80\x02."), ("pytorch_model.bin", "pickle", "weights_only=True")),
    ("F12-pt", folder(None, consolidated__00__pth=b"\x80\x02."), ("pickle", "safetensors")),
    ("F12-ckpt", folder(None, model__ckpt=b"\x80\x02."), ("pickle", "safetensors")),
    ("folder-empty", empty_folder, ("empty",)),
    ("folder-other", folder(None, README__md=b"hello"), ("README.md", "would work")),
    ("path-missing", nothing, ("no such", "hub id")),
    ("path-pipe", pipe, ("regular file",)),
]


# GGUF


def file(content: bytes, name: str = "model.gguf") -> Make:
    def make(path: Path) -> Path:
        path.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
        return path / name

    return make


def with_kv(*kv: bytes) -> Make:
    return file(gguf([ARCH, *kv]))


def with_tensors(*tensors: bytes, data: int = 64) -> Make:
    return file(gguf([ARCH], tensors, bytes(data)))


def aligned(alignment: int, kind: int = U32, code: str = "I") -> Make:
    return file(gguf([number("general.alignment", alignment, kind, code)], [info("a", [4])], bytes(64)))


def two_at(alignment: int) -> Make:
    """A sound file of two 4-byte tensors with an alignment of its own."""
    kv, tensors = [number("general.alignment", alignment)], [info("a", [1]), info("b", [1], 0, alignment)]
    return file(gguf(kv, tensors, bytes(alignment + 4), alignment=alignment))


def split(*parts: tuple[Sequence[bytes], Sequence[str]], names: Sequence[str] = (), total: int | None = None) -> Make:
    """A split set; each part is (metadata, tensor names), its file called as `names` or as the set wants."""

    def make(path: Path) -> Path:
        path.mkdir(parents=True, exist_ok=True)
        count = len(parts) if total is None else total
        wanted = names or [f"m-{i:05d}-of-{count:05d}.gguf" for i in range(1, len(parts) + 1)]
        for name, (kv, held) in zip(wanted, parts, strict=True):
            tensors = [info(t, [8], 0, 32 * i) for i, t in enumerate(held)]
            (path / name).write_bytes(gguf([ARCH, *kv], tensors, bytes(32 * len(held))))
        return path / wanted[0]

    return make


def part(no: int, count: int, tensors: int = 2) -> list[bytes]:
    return [
        number("split.no", no, U16, "H"),
        number("split.count", count, U16, "H"),
        number("split.tensors.count", tensors, I32, "i"),
    ]


FULL = gguf([ARCH, strings("x", ["a", "bc"])], [info("a", [4, 2]), info("b", [32], 8, 32)], bytes(32 + 34))
BIG = 2**63 - 1

GGUF: list[tuple[str, Make, tuple[str, ...]]] = [
    ("F7-empty-file", file(b""), ("model.gguf", "magic")),
    ("F7-magic", file(gguf(magic=b"GGML")), ("magic", "GGML")),
    *((f"F7-version-{v}", file(gguf(version=v)), (f"version {v}",)) for v in (0, 1, 4, 2**32 - 1)),
    ("F7-big-endian", file(gguf(version=3 << 24)), ("big-endian",)),
    ("F7-tensor-count", file(gguf(n_tensors=MANY)), ("tensor count", str(MANY))),
    ("F7-kv-count", file(gguf(n_kv=MANY)), ("metadata count", str(MANY))),
    ("F7-kv-count-one-more", file(gguf(n_kv=2)), ("model.gguf", "left")),
    ("F7-empty-key", with_kv(number("", 1)), ("empty key",)),
    ("F7-duplicate-key", with_kv(number("a", 1), number("a", 1)), ("duplicate key 'a'",)),
    ("F7-key-length", with_kv(struct.pack("<Q", MANY)), ("key", str(MANY))),
    ("F7-key-over-64k", with_kv(number("k" * 65536, 1)), ("key", "65535")),
    ("F7-key-not-utf8", with_kv(pair(b"\xff\xfe", U32, bytes(4))), ("key", "UTF-8")),
    ("F7-value-not-utf8", with_kv(pair("a", STRING, text(b"\xff"))), ("'a'", "UTF-8")),
    ("F7-value-type", with_kv(pair("a", 13, bytes(8))), ("'a'", "type 13")),
    ("F7-array-type", with_kv(array("a", 99, 1, bytes(8))), ("'a'", "type 99")),
    ("F7-array-of-arrays", with_kv(array("a", ARRAY, 1, bytes(12))), ("'a'", "array of arrays")),
    ("F7-bool-2", with_kv(pair("a", BOOL, b"\2")), ("'a'", "bool")),
    ("F7-string-length", with_kv(pair("a", STRING, struct.pack("<Q", 2**62))), ("'a'", str(2**62))),
    ("F7-alignment-13", aligned(13), ("general.alignment", "13", "power of two")),
    ("F7-alignment-0", aligned(0), ("general.alignment", "power of two")),
    ("F7-alignment-u64", aligned(32, U64, "Q"), ("general.alignment", "u64", "u32")),
    ("F7-alignment-i32", aligned(32, I32, "i"), ("general.alignment", "i32", "u32")),
    ("F7-alignment-string", file(gguf([pair("general.alignment", STRING, text("32"))])), ("alignment", "string")),
    ("F7-name-64", with_tensors(info("n" * 64, [4])), ("name", "64")),
    ("F7-name-length", file(gguf(tensors=[struct.pack("<Q", MANY) + bytes(64)])), ("name", str(MANY))),
    ("F7-name-empty", with_tensors(info("", [4])), ("name", "0")),
    ("F7-name-twice", with_tensors(info("a", [4]), info("a", [4], 0, 32)), ("duplicate tensor 'a'",)),
    ("F7-5-dimensions", with_tensors(info("a", [1] * 5)), ("'a'", "5 dimensions")),
    ("F7-dimension-count", file(gguf(tensors=[text("a") + struct.pack("<I", 2**32 - 1) + bytes(99)])), ("dimensions",)),
    ("F7-dimension-negative", with_tensors(info("a", [MANY])), ("'a'", "dimension")),
    ("F7-product-wraps", with_tensors(info("a", [2**32, 2**32, 2])), ("'a'", "overflows")),
    ("F7-product-wraps-past-zero", with_tensors(info("a", [2**62, 0, 8])), ("'a'", "overflows")),
    ("F7-bytes-overflow", with_tensors(info("a", [2**62], 28)), ("'a'", "overflows")),
    ("F7-bytes-overflow-of-nothing", with_tensors(info("a", [2, 2**59 + 1, 0], 28)), ("'a'", "overflows")),
    ("F7-tensor-type", with_tensors(info("a", [32], 4)), ("'a'", "type 4")),
    ("F7-tensor-type-huge", with_tensors(info("a", [32], 2**32 - 1)), ("'a'", "type")),
    ("F7-part-block", with_tensors(info("a", [33], 8)), ("'a'", "blocks of 32")),
    ("F7-offset-unaligned", with_tensors(info("a", [4], 0, 7)), ("'a'", "bad offset 7")),
    ("F7-offset-past-end", with_tensors(info("a", [4], 0, 2**40)), ("'a'", "bad offset")),
    ("F7-offset-wraps", with_tensors(info("a", [4], 0, MANY - 31)), ("'a'", "bad offset")),
    ("F7-offset-overlap", with_tensors(info("a", [16]), info("b", [4], 0, 32)), ("'b'", "bad offset 32")),
    ("F7-offset-gap", with_tensors(info("a", [4]), info("b", [4], 0, 64), data=96), ("'b'", "bad offset 64")),
    *((f"F7-cut-at-{at}", file(FULL[:at]), ("model.gguf",)) for at in (3, 6, 20, 30, 60, 100, len(FULL) - 1)),
    ("F9-array-of-gigabytes", with_kv(array("a", F32, 2**30, bytes(2000))), ("'a'", str(2**30))),
    ("F9-bytes-of-gigabytes", with_kv(array("a", U8, 2**33, bytes(2000))), ("'a'", str(2**33))),
    ("F9-strings-of-gigabytes", with_kv(array("a", STRING, 2**28, bytes(2000))), ("'a'", str(2**28))),
    ("F9-string-of-gigabytes", with_kv(pair("a", STRING, struct.pack("<Q", 2**32) + bytes(2000))), ("'a'",)),
    ("F9-tensor-of-gigabytes", with_tensors(info("a", [2**30, 4]), data=2000), ("'a'", "file has")),
    ("F9-alignment-of-gigabytes", aligned(2**31), ("'a'", "file has")),
    ("F7-split-missing", split((part(0, 3), ["a"]), (part(1, 3), ["b"]), total=3), ("00003-of-00003", "missing")),
    ("F7-split-count", split((part(0, 2), ["a"]), (part(1, 3), ["b"])), ("split.count is 3", "2 parts")),
    ("F7-split-no", split((part(0, 2), ["a"]), (part(0, 2), ["b"])), ("split.no is 0",)),
    ("F7-split-no-keys", split(([], ["a"]), ([], ["b"])), ("split.count",)),
    ("F7-split-duplicate", split((part(0, 2), ["a"]), (part(1, 2), ["a"])), ("duplicate tensor 'a'",)),
    ("F7-split-total", split((part(0, 2, 5), ["a"]), (part(1, 2), ["b"])), ("split.tensors.count is 5",)),
    ("F7-split-alone", split((part(0, 2), ["a"]), names=["m.gguf"]), ("split.count is 2",)),
    ("F7-split-part-0", split((part(0, 2), ["a"]), names=["m-00000-of-00002.gguf"]), ("part 0 of 2",)),
]

HOSTILE = SAFETENSORS + CONFIGS + FOLDERS + GGUF


# files that open, for the tests of what comes after


def narrow_array(path: Path) -> Path:
    """F8: scores stored as bytes where floats are read."""
    return with_kv(array("tokenizer.ggml.scores", U8, 4, bytes(4)))(path)


def vocabulary(pieces: Sequence[str | bytes], kinds: Sequence[int] | None = None, scores: int | None = None) -> Make:
    kinds = [1] * len(pieces) if kinds is None else kinds
    scores = len(pieces) if scores is None else scores
    return with_kv(
        pair("tokenizer.ggml.model", STRING, text("llama")),
        strings("tokenizer.ggml.tokens", pieces),
        array("tokenizer.ggml.token_type", I32, len(kinds), struct.pack(f"<{len(kinds)}i", *kinds)),
        array("tokenizer.ggml.scores", F32, scores, bytes(4 * scores)),
    )


VOCABULARY: list[tuple[str, Make, tuple[str, ...]]] = [
    ("F11-byte-negative", vocabulary(["a", "<0x-1>"]), ("malformed byte", "<0x-1>")),
    ("F11-byte-wide", vocabulary(["a", "<0x100>"]), ("malformed byte", "<0x100>")),
    ("F11-byte-empty", vocabulary(["a", "<0x>"]), ("malformed byte", "<0x>")),
    ("F11-byte-type", vocabulary(["a", "b"], [1, 6]), ("token_type", "'b'")),
    ("F11-empty-piece", vocabulary(["a", ""]), ("empty pieces", "first at 1")),
    ("F11-duplicate", vocabulary(["a", "b", "a"]), ("duplicate", "'a'")),
    ("F11-huge-piece", vocabulary(["a", "x" * 70_000]), ("65536 bytes",)),
    ("F11-types-short", vocabulary(["a", "b"], [1]), ("token_type", "1 entries for 2")),
    ("F11-scores-long", vocabulary(["a", "b"], scores=3), ("scores", "3 entries for 2")),
    (
        "F11-id-outside",
        with_kv(strings("tokenizer.ggml.tokens", ["a"]), number("tokenizer.ggml.bos_token_id", 7)),
        ("7",),
    ),
    ("F11-tokens-no-strings", with_kv(array("tokenizer.ggml.tokens", U8, 2, b"ab")), ("array of strings",)),
]

BENIGN: list[tuple[str, Make]] = [
    ("safetensors-no-tensors", folder(safetensors({}))),
    ("safetensors-padded-header", folder(safetensors(b"{}      "))),
    ("safetensors-empty-tensor", one("F32", [0, 4], 0)),
    ("safetensors-huge-empty-tensor", one("F32", [2**40, 0], 0)),
    ("safetensors-scalar", one("F32", [], 4)),
    ("safetensors-any-order", tiled((4, 8), (0, 4))),
    ("safetensors-empty-between", tiled((4, 8), (4, 4), (0, 4), (0, 0), (8, 8))),
    ("safetensors-F4", one("F4", [2, 4], 4)),
    ("safetensors-F6", one("F6_E3M2", [2, 4], 6)),
    ("safetensors-64-levels", folder(GOOD, config__json=b'{"a":' + b"[" * 63 + b"]" * 63 + b"}")),
    ("sharded", sharded(BOTH)),
    ("sharded-unindexed", sharded(BOTH, {FIRST: shard("a", "c"), SECOND: shard("b")})),
    ("gguf-nothing", file(gguf([]))),
    ("gguf-no-tensors", file(gguf())),
    ("gguf-version-2", file(gguf(version=2))),
    ("gguf-zero-dimension", with_tensors(info("a", [0, 4]), info("b", [4], 0, 0))),
    ("gguf-no-dimensions", with_tensors(info("a", []))),
    ("gguf-4-dimensions", with_tensors(info("a", [4, 1, 2, 1]))),
    ("gguf-name-63", with_tensors(info("n" * 63, [4]))),
    ("gguf-alignment-64", two_at(64)),
    ("gguf-alignment-4", two_at(4)),
    ("gguf-split", split((part(0, 2), ["a"]), (part(1, 2), ["b"]))),
    ("gguf-split-of-one", split((part(0, 1, 1), ["a"]))),
    ("gguf-full", file(FULL)),
]  # fmt: skip
