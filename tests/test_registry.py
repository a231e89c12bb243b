"""The lists of what there is; and the example package, installed: everything it adds is listed, and used."""

import json
import re
import subprocess
import sys
from dataclasses import asdict, is_dataclass
from importlib.metadata import EntryPoint, EntryPoints
from importlib.util import find_spec
from pathlib import Path
from shutil import copytree

import pytest
import torch

from fewbit import algos, registry
from fewbit.errors import SpecError
from fewbit.kernels import registry as kernels
from fewbit.quant import formats
from fewbit.quant.formats import FORMATS
from fewbit.quant.qtensor import bits_per_weight
from tests.tiny import llama

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "fewbit_plugin"


def python(code: str, *path: Path, ok: bool = True, args: tuple[str, ...] = ()) -> str:
    """Run code where these folders come before everything else; -> what it printed (its error, if it must fail)."""
    first = f"import sys; sys.path[:0] = {[str(p) for p in (*path, ROOT)]!r}\n"
    out = subprocess.run([sys.executable, "-c", first + code, *args], capture_output=True, text=True)
    assert (out.returncode == 0) is ok, out.stderr
    return out.stdout if ok else out.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example package, installed by pip into a folder of its own, without a network."""
    if find_spec("pip") is None or find_spec("setuptools") is None:
        pytest.skip("needs pip and setuptools")
    folder = tmp_path_factory.mktemp("plugin")
    source = copytree(EXAMPLE, folder / "source")  # building leaves files beside the source
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(folder / "site"), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "site"


def test_formats_are_the_rows_of_the_table() -> None:
    rows = registry.formats()
    assert [row.name for row in rows] == list(FORMATS)
    for row in rows:
        assert row.bits_per_weight == bits_per_weight(FORMATS[row.name].weight)
    by_name = {row.name: row for row in rows}
    assert by_name["nvfp4"].scales == "e2m1 x e4m3[1x16] x f32[tensor]"
    assert by_name["nvfp4"].act == "e2m1 x e4m3[1x16 dynamic] x f32[tensor dynamic]"
    assert by_name["int4-g128"].act == ""
    assert not by_name["iq2_s"].can_encode
    assert by_name["q4_k"].can_encode


def test_dialects_say_what_they_can_hold() -> None:
    rows = {row.name: row for row in registry.dialects()}
    wanted = {"gptq", "awq", "fp8", "compressed-tensors", "modelopt", "gguf", "mxfp4", "bitsandbytes", "auto-round"}
    assert wanted <= set(rows)
    holds = {
        "gptq": "int4-g128-asym", "awq": "int4-g64-asym", "fp8": "fp8-block", "compressed-tensors": "nvfp4",
        "modelopt": "mxfp8", "gguf": "q4_k", "mxfp4": "mxfp4-a16", "bitsandbytes": "nf4-dq",
    }  # fmt: skip
    for dialect, name in holds.items():
        assert name in rows[dialect].formats, rows[dialect]
    assert "nvfp4" not in rows["gptq"].formats
    assert rows["modelopt"].config_files == ("config.json", "hf_quant_config.json")
    assert rows["gguf"].config_files == ("*.gguf",)
    assert all(row.summary for row in rows.values())
    assert not rows["foreign"].reads


def test_the_reference_runs_everything() -> None:
    last = registry.kernels()[-2:]
    assert [(row.name, row.op) for row in last] == [("reference", "linear"), ("reference", "experts")]
    for row in last:
        assert row.formats == tuple(FORMATS)
        assert row.dtypes == ("float32", "bfloat16", "float16")
        assert (row.devices, row.capability) == ((), (0, 0))


def test_rows_are_plain_data() -> None:
    for rows in (registry.dialects(), registry.formats(), registry.kernels(), registry.algos()):
        for row in rows:
            assert is_dataclass(row)
            json.dumps(asdict(row))
            with pytest.raises(AttributeError):
                row.name = "other"  # type: ignore[misc]


def test_names_are_unique() -> None:
    for rows in (registry.dialects(), registry.formats(), registry.algos()):
        names = [row.name for row in rows]
        assert len(set(names)) == len(names)


def test_an_installed_package_is_listed(site: Path) -> None:
    code = """
import json, fewbit
from fewbit import algos, registry
rows = (registry.formats(), registry.dialects(), registry.kernels(), registry.algos())
others = [row for table in rows for row in table if row.origin != "fewbit"]
print(json.dumps({type(row).__name__: [row.name, row.origin] for row in others}))
assert "int4-g16" in fewbit.FORMATS and fewbit.FORMATS["int4-g16"].weight.scales[0].block == (1, 16)
"""
    assert json.loads(python(code, site)) == {
        "FormatInfo": ["int4-g16", "fewbit_toy.formats:INT4_G16"],
        "DialectInfo": ["toy-int4", "fewbit_toy.codec:CODEC"],
        "KernelInfo": ["toy-unpacked", "fewbit_toy.kernel:KERNEL"],
        "AlgoInfo": ["toy-shrink", "fewbit_toy.algo:ALGO"],
    }


def toy_checkpoint(folder: Path) -> Path:
    """A tiny Llama whose linears are stored as the example's dialect stores them, made without the example."""
    from safetensors.torch import load_file, save_file

    from fewbit.quant.elements import F32, INT4
    from fewbit.quant.reference import encode
    from fewbit.quant.spec import spec

    llama(folder)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            q = encode(tensor, spec(INT4, (F32, 1, 16), rule="range"))
            module = name.removesuffix(".weight")
            tensors |= {f"{module}.toy_codes": q.planes["codes"], f"{module}.toy_scale": q.planes["scale0"]}
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "toy-int4", "skip": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_an_installed_package_is_used(site: Path, tmp_path: Path) -> None:
    """The plan, the codec, the kernel and a whole model, with nothing imported but fewbit."""
    code = """
import json, sys, torch, fewbit
from fewbit import codecs
from fewbit.modules.linear import Linear
path = sys.argv[1]
config = json.load(open(path + "/config.json"))
plan = fewbit.Plan.from_config(config)
form, rule = plan.for_module("model.layers.0.mlp.up_proj")
assert form == fewbit.FORMATS["int4-g16"] and plan.for_module("lm_head")[0] is None, (form, rule)
with codecs.open(path) as source:
    assert source.dialect == "toy-int4" and len(source.modules) == 14, source
    assert source.read("model.layers.0.mlp.up_proj").weight.shape == (256, 128)
info = fewbit.inspect(path)
assert {m.format for m in info.modules} == {"int4-g16"} and {m.kernel for m in info.modules} == {"toy-unpacked"}
ids = torch.arange(12).view(1, 12)
fast, slow = (fewbit.load(path, dtype="float32", kernels=k) for k in ("auto", "reference"))
used = {p.kernel.name for m in fast.modules() if isinstance(m, Linear) for p in m.parts}
assert used == {"toy-unpacked"}, used
torch.testing.assert_close(fast(input_ids=ids).logits, slow(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
print("ok")
"""
    assert python(code, site, args=(str(toy_checkpoint(tmp_path / "toy")),)).endswith("ok\n")


def test_the_example_writes_its_dialect(site: Path, tmp_path: Path) -> None:
    code = """
import sys, fewbit
made = fewbit.quantize(sys.argv[1], sys.argv[2], "int4-g16", algo="toy-shrink", to="toy-int4")
assert made.dialect == "toy-int4" and len(made.modules) == 14, made
info = fewbit.inspect(sys.argv[2])
assert (info.dialect, {m.format for m in info.modules}) == ("toy-int4", {"int4-g16"})
assert not [f for f in fewbit.verify(sys.argv[2]) if f.severity == "error"]
print("ok")
"""
    args = (str(llama(tmp_path / "plain")), str(tmp_path / "out"))
    assert python(code, site, args=args).endswith("ok\n")


def test_the_example_algorithm_is_no_worse_than_rounding(site: Path) -> None:
    code = """
import torch, fewbit
from fewbit import algos
from fewbit.quant.reference import decode, encode
algo = algos.get("toy-shrink")
w, spec = torch.randn(32, 256, generator=torch.Generator().manual_seed(0)), fewbit.FORMATS["int4-g16"].weight
(found,) = algo.encode([w], [spec], None, algo.options())
assert (decode(found.weight) - w).norm() <= (decode(encode(w, spec)) - w).norm()
print("ok")
"""
    assert python(code, site).endswith("ok\n")


CLASH = [
    ("int4-g128 = other:ROW", "formats", r"'int4-g128': fewbit's own and other:ROW"),
    ("new = one:ROW; new = two:ROW", "formats", r"'new': one:ROW and two:ROW"),
    ("odd = fewbit.quant.pack:pack", "formats", r"'odd' of fewbit.formats gives function, not a Format"),
    ("rtn = other:algo", "algos", r"'rtn': of fewbit and other:algo"),
    ("odd = fewbit.quant.pack:__doc__", "algos", r"'odd' of fewbit.algos gives str, not an Algo"),
    ("own = fewbit.kernels.registry:KERNELS.__iter__", "kernels", r"'packed': of fewbit and fewbit.kernels"),
]  # fmt: skip


@pytest.mark.parametrize(("points", "group", "message"), CLASH, ids=[f"{c[1]}: {c[0]}" for c in CLASH])
def test_a_taken_name_names_both(points: str, group: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def installed(**wanted: str) -> EntryPoints:
        parts = (line.split(" = ") for line in points.split("; "))
        return EntryPoints(EntryPoint(n, value, f"fewbit.{group}") for n, value in parts).select(**wanted)

    caches = (formats.origins, formats._more, kernels.kernels, algos._points)
    for module in (formats, kernels, registry, algos):
        monkeypatch.setattr(module, "entry_points", installed)
    for cache in caches:
        cache.cache_clear()
    try:
        with pytest.raises(SpecError, match=message):
            getattr(registry, group)()
    finally:
        for cache in caches:
            cache.cache_clear()


def test_a_codec_of_a_taken_name_names_both(site: Path, tmp_path: Path) -> None:
    """Another package, known by its metadata alone."""
    info = tmp_path / "second-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: second\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[fewbit.codecs]\nagain = fewbit_toy.codec:CODEC\n")
    error = python("import fewbit.codecs", site, tmp_path, ok=False)
    assert re.search("two codecs are called 'toy-int4': .*fewbit_toy.codec:CODEC", error), error
