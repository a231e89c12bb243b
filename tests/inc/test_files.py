"""Measurement files: as INC lays them out, there and back; ranks put together and taken apart; hostile ones."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fewbit.errors import CheckpointError, FewbitError, RequestError, UnsupportedError
from fewbit.files.npz import read_npz
from fewbit.inc import config, files
from fewbit.inc.files import Node, Stats
from fewbit.inc.unify import expand, postprocess, unify

QKV, IMPL = "model.layers.0.self_attn.qkv_proj", "model.layers.0.self_attn.attn.impl"
WRITTEN = {  # as INC writes it, with the spaces and the order of its own files
    "GlobalRank": None, "LocalRank": 0, "Mode": "DynamicRange",
    "Nodes": {
        QKV: {"inputs": [[[4.40625]]], "params": {"weight": [[91.5]]}},
        "model.layers.0.self_attn.o_proj": {"inputs": [[[0.1162109375]]], "outputs": [[[0.173828125]], [[0.337890625]]],
                                            "params": {"weight": [[0.625]]}},
        f"{IMPL}.matmul_qk": {"inputs": [[[0.625]], [[5.5]]]}, f"{IMPL}.k_cache": {"inputs": [[[5.625]]]},
        f"{IMPL}.matmul_av": {"inputs": [[[1.0]], [[0.25]]]}, f"{IMPL}.v_cache": {"inputs": [[[0.5]]]},
        f"{IMPL}.fused_scaled_dot_product_attention": {"inputs": [[[7.5]], [[5.5]], [[0.25]]],
                                                       "outputs": [[[0.125]], [[1.0]]]},
    },
}  # fmt: skip


def node(*inputs: float, outputs: tuple[float, ...] = (), weight: float | None = None) -> Node:
    states = [tuple(torch.tensor([[x]]) for x in each) for each in (inputs, outputs)]
    return Node(*states, {} if weight is None else {"weight": torch.tensor([[weight]])})


def theirs(path: Path, value: Any) -> None:
    """As INC's own functions save it: JSON with an indent, and the object pickled by numpy with arrays for lists."""
    path.with_name(path.name + ".json").write_text(json.dumps(value, indent=4))
    nodes = {name: {part: {k: np.array(v, np.float32) for k, v in held.items()} if isinstance(held, dict)
                    else [np.array(x, np.float32) for x in held] for part, held in parts.items()}
             for name, parts in value["Nodes"].items()}  # fmt: skip
    np.savez(path.with_name(path.name + ".npz"), value | {"Nodes": nodes})


@pytest.mark.parametrize("only", ["", ".json", ".npz"])
def test_their_files_are_read(only: str, tmp_path: Path) -> None:
    theirs(tmp_path / "m", WRITTEN)
    for end in (".json", ".npz"):
        if only and only != end:
            (tmp_path / f"m{end}").unlink()
    found = files.read(tmp_path / "m")
    assert found.rank == 0 and found.mode == "DynamicRange" and list(found.nodes) == list(WRITTEN["Nodes"])
    assert files.plain(found) == WRITTEN["Nodes"]


def test_ours_are_theirs(tmp_path: Path) -> None:
    """What we write is what they would have written, byte for byte of the JSON, and numpy loads the other."""
    theirs(tmp_path / "theirs", WRITTEN)
    stats = files.read(tmp_path / "theirs")
    written = files.write(tmp_path / "deep" / "ours", Stats(stats.nodes, rank=0, modules=tuple(stats.nodes)))
    assert [p.name for p in written] == ["ours.json", "ours.npz", "ours_mod_list.json"]
    assert written[0].read_text().strip() == (tmp_path / "theirs.json").read_text()
    loaded = np.load(written[1], allow_pickle=True)["arr_0"].item()
    assert loaded["Nodes"].keys() == WRITTEN["Nodes"].keys() and loaded["Nodes"][QKV]["inputs"][0].dtype == np.float32
    assert json.loads(written[2].read_text()) == list(stats.nodes)
    again = files.read(tmp_path / "deep" / "ours")
    assert files.same(again, stats) and again.modules == tuple(stats.nodes)
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == sorted(p.name for p in written)


def test_scales_and_channels(tmp_path: Path) -> None:
    channels = {"weight": {"0": torch.tensor([0.5, 2.0]), "1": torch.tensor([1.0])}}
    held = {
        "a": Node((torch.tensor(0.0625),), (torch.tensor(1.0),), {"weight": torch.tensor(0.5)}),
        "b": Node((torch.tensor(0.25),), (torch.tensor([0.5, 2.0]),), channels),
        "c": Node((torch.tensor(1.0),)),
    }
    files.write(tmp_path / "s", Stats(held, "Scale", 1, 7))
    found = files.read(tmp_path / "s")
    assert found.mode == "Scale" and (found.rank, found.samples) == (1, 7)
    assert files.plain(found) == files.plain(Stats(held, "Scale"))
    assert found.nodes["b"].weight().tolist() == [0.5, 2.0] and found.nodes["a"].weight().item() == 0.5
    assert json.loads((tmp_path / "s.json").read_text())["Nodes"]["a"] == {
        "inputs": [0.0625], "outputs": [1.0], "params": {"weight": 0.5}}  # fmt: skip


NAMES = [
    ({}, 0, 1, "", "out/x_hooks_maxabs"), ({}, 1, 2, "", "out/x_hooks_maxabs_1_2"),
    ({}, 0, 2, "MAXABS_HW", "out/x_hooks_maxabs_MAXABS_HW_0_2"),
    ({}, 0, 1, "MAXABS_HW", "out/x_hooks_maxabs_MAXABS_HW"),
    ({"mode": "SHAPE"}, 0, 1, "", "out/x_hooks_shape"),
    ({"seperate_measure_files": False}, 1, 2, "", "out/x_hooks_maxabs"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(NAMES)))
def test_names(case: int) -> None:
    given, rank, size, method, want = NAMES[case]
    made = config.parsed({"dump_stats_path": "out/x", **given})
    assert str(files.stem(made, rank, size, method)) == want


def test_ranks_become_one() -> None:
    """The maximum of each state; weights too."""
    parts = [Stats({"o": node(1, outputs=(3, 4), weight=5)}, rank=0, samples=4, modules=("o",)),
             Stats({"o": node(2, outputs=(2, 9), weight=4)}, rank=1, samples=3, modules=("o", "p"))]  # fmt: skip
    found = unify(parts)
    assert files.plain(found) == files.plain(Stats({"o": node(2, outputs=(3, 9), weight=5)}))
    assert (found.rank, found.samples, found.modules) == (None, 4, ("o", "p"))
    with pytest.raises(CheckpointError, match="only some have"):
        unify([*parts, Stats({"q": node(1)})])
    with pytest.raises(UnsupportedError, match="cannot be put together"):
        unify([Stats({"o": Node((torch.ones(2, 1),))}), Stats({"o": Node((torch.ones(3, 1),))})])


def test_experts_are_renumbered() -> None:
    """Each rank had two; the intermediate maxima follow one another."""
    op = "model.layers.0.mlp.experts.moe_op"

    def rank(r: int) -> Stats:
        lists = {f"{op}.{kind}.{e}": node(10 * r + e, weight=e) for kind in ("w13_list", "w2_list") for e in range(2)}
        return Stats({op: node(r, outputs=(r, 100 + 10 * r, 101 + 10 * r)), **lists}, rank=r)

    found = unify([rank(0), rank(1)], expert_parallel=True)
    assert [x.item() for x in found.nodes[op].outputs] == [1, 100, 101, 110, 111]
    assert [found.nodes[f"{op}.w2_list.{e}"].inputs[0].item() for e in range(4)] == [0, 1, 10, 11]
    back = expand(found, 2, expert_parallel=True)
    assert [x.item() for x in back[1].nodes[op].outputs] == [1, 110, 111]
    assert back[1].nodes[f"{op}.w13_list.0"].inputs[0].item() == 10 and f"{op}.w13_list.2" not in back[1].nodes
    assert [s.rank for s in back] == [0, 1] and [s.rank for s in expand(found, 1)] == [None]
    with pytest.raises(RequestError, match="dealt out to 3"):
        expand(found, 3, expert_parallel=True)


def test_caches_are_what_attention_reads(tmp_path: Path) -> None:
    theirs(tmp_path / "m", WRITTEN)
    found = postprocess(files.read(tmp_path / "m")).nodes
    assert [x.item() for x in found[f"{IMPL}.matmul_qk"].inputs] == [0.625, 5.625]
    assert [x.item() for x in found[f"{IMPL}.matmul_av"].inputs] == [1.0, 0.5]
    assert [x.item() for x in found[f"{IMPL}.fused_scaled_dot_product_attention"].outputs] == [0.1162109375, 1.0]
    latent = {"l.attn.impl.matmul_av": node(1, 2), "l.attn.impl.latent_cache_k": node(7)}
    assert postprocess(Stats(latent)).nodes["l.attn.impl.matmul_av"].inputs[1].item() == 7


WRONG: list[tuple[Any, str]] = [
    ({"Nodes": []}, "want an object with Nodes"), (WRITTEN | {"Mode": "Range"}, "Mode is 'Range'"),
    (WRITTEN | {"Nodes": {"a": []}}, "a: want an object"),
    (WRITTEN | {"Nodes": {"a": {"weights": []}}}, "holds weights"),
    (WRITTEN | {"Nodes": {"a": {"inputs": [[["x"]]]}}}, "want numbers"),
    (WRITTEN | {"Nodes": {"a": {"inputs": [[[-1.0]]]}}}, "none below 0"),
    (WRITTEN | {"Nodes": {"a": {"inputs": [[[1e39]]]}}}, "want finite numbers"),
    (WRITTEN | {"Nodes": {"a": {"inputs": 3}}}, "lists of states"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_files_that_make_no_sense(case: int, tmp_path: Path) -> None:
    value, text = WRONG[case]
    (tmp_path / "m.json").write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match=text):
        files.read(tmp_path / "m")


def test_two_files_that_differ(tmp_path: Path) -> None:
    theirs(tmp_path / "m", WRITTEN)
    edited = json.loads((tmp_path / "m.json").read_text())
    edited["Nodes"][QKV]["inputs"] = [[[5.0]]]
    (tmp_path / "m.json").write_text(json.dumps(edited))
    with pytest.raises(CheckpointError, match="say different things"):
        files.read(tmp_path / "m")
    with pytest.raises(RequestError, match="no measurements"):
        files.read(tmp_path / "none")


class Evil:
    def __reduce__(self) -> Any:
        return print, ("called",)


def looped() -> Any:
    held: list[Any] = []
    held.append(held)
    return held


HOSTILE: list[tuple[Any, str]] = [
    (Evil(), "builtins.print"), ({"a": looped()}, "stands in two places"), ({1, 2}, "the instruction"),
    (np.array([{}, 1], dtype=object), "one object"), (np.arange(3), "one object"), ({"a": 1j}, "only plain values"),
    ({"a": np.array(["x"])}, "numbers of type"), ({"a": np.array([{}, {}], dtype=object)}, "array of objects"),
    ({"a": np.array([1.0], ">f4")}, "type >f4|big-endian"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(HOSTILE)))
def test_nothing_is_called(case: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    value, text = HOSTILE[case]
    np.savez(tmp_path / "m.npz", value)
    with pytest.raises(CheckpointError, match=text):
        read_npz(tmp_path / "m.npz")
    assert "called" not in capsys.readouterr().out


def test_every_cut_and_every_byte(tmp_path: Path) -> None:
    """A damaged file is an error of ours or a value, whatever was damaged."""
    np.savez(tmp_path / "m.npz", {"Nodes": {"a": {"inputs": [np.ones((1, 1), np.float32)]}}})
    with zipfile.ZipFile(tmp_path / "m.npz") as archive:
        whole = archive.read("arr_0.npy")
    draws = np.random.default_rng(0)
    for i in range(600):
        data = bytearray(whole[: int(draws.integers(len(whole)))] if i % 2 else whole)
        if not i % 2:
            data[int(draws.integers(len(data)))] = int(draws.integers(256))
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            archive.writestr("arr_0.npy", bytes(data))
        (tmp_path / "x.npz").write_bytes(packed.getvalue())
        try:
            read_npz(tmp_path / "x.npz")
        except FewbitError:
            continue
