"""The reader agrees with the safetensors library, tensor by tensor and byte by byte."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbit.errors import CapacityError, CheckpointError
from fewbit.files import disk
from fewbit.files.safetensors import DTYPE_NAMES, DTYPES, open_safetensors
from tests.hostile.generators import one
from tests.hostile.raw import entry, safetensors

FIXTURES = Path(__file__).parents[3] / "shared" / "fixtures"
FILES = sorted(FIXTURES.glob("*/*.safetensors"))


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def random(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    data = torch.randint(0, 2 if dtype is torch.bool else 256, (*shape[:-1], shape[-1] * dtype.itemsize))
    return data.to(torch.uint8).view(dtype)


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return ours.dtype is theirs.dtype and ours.shape == theirs.shape and torch.equal(raw(ours), raw(theirs))


@pytest.mark.skipif(not FILES, reason="the shared fixtures are not beside the repository")
def test_fixtures() -> None:
    for path in FILES:
        theirs = load_file(path)
        with open_safetensors(path) as file:
            assert list(file.tensors.keys() - theirs.keys()) == []
            assert all(same(file.read(name), tensor) for name, tensor in theirs.items()), path


@pytest.mark.parametrize("dtype", sorted(DTYPE_NAMES, key=str), ids=str)
def test_every_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {"a": random(dtype, 5, 3), "b": random(dtype, 7), "empty": random(dtype, 0, 4)}
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    with open_safetensors(tmp_path / "x.safetensors") as file:
        assert file.metadata == {"format": "pt"}
        assert all(same(file.read(name), tensor) for name, tensor in tensors.items())
        assert {info.dtype for info in file.tensors.values()} == {DTYPE_NAMES[dtype]}


@pytest.mark.parametrize("name", [name for name, (_, bits) in DTYPES.items() if bits < 8])
def test_packed_dtypes_stay_packed(name: str, tmp_path: Path) -> None:
    dtype, bits = DTYPES[name]
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors({"w": entry(name, [4, 8], 0, 4 * bits)}, bytes(range(4 * bits))))
    with open_safetensors(path) as file:
        out = file.read("w")
        assert file.tensors["w"].shape == (4, 8)
    assert out.dtype is dtype and out.shape == (4, bits)
    assert raw(out).tolist() == list(range(4 * bits))


def test_large_tensor_is_read_in_parallel(tmp_path: Path) -> None:
    tensors = {"a": torch.arange((2 * disk.CHUNK + 4096) // 4, dtype=torch.int32), "b": torch.ones(3)}
    save_file(tensors, tmp_path / "x.safetensors")
    with open_safetensors(tmp_path / "x.safetensors") as file:
        assert all(torch.equal(file.read(name), tensor) for name, tensor in tensors.items())


def test_read_into(tmp_path: Path) -> None:
    tensor = torch.randn(4, 6).bfloat16()
    save_file({"w": tensor}, tmp_path / "x.safetensors")
    with open_safetensors(tmp_path / "x.safetensors") as file:
        plain, strided, stacked = tensor * 0, torch.zeros(6, 4).bfloat16().T, torch.zeros(2, 4, 6).bfloat16()
        for out in (plain, strided, stacked[1]):
            file.read_into("w", out)
            assert torch.equal(out, tensor)
        assert not stacked[0].any()
        bytes_out = torch.zeros(48, dtype=torch.uint8)
        file.read_into("w", bytes_out)
        assert torch.equal(bytes_out, raw(tensor))
        for bad in (torch.zeros(4, 6), torch.zeros(6, 4).bfloat16(), torch.zeros(47, dtype=torch.uint8)):
            with pytest.raises(CheckpointError, match=r"x\.safetensors: tensor 'w': is torch\.bfloat16"):
                file.read_into("w", bad)


def test_unknown_name_and_closed_file(tmp_path: Path) -> None:
    save_file({"layer.weight": torch.ones(2)}, tmp_path / "x.safetensors")
    file = open_safetensors(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"no tensor 'layer\.wieght'; near are layer\.weight"):
        file.read("layer.wieght")
    file.close()
    with pytest.raises(CheckpointError, match="was closed"):
        file.read("layer.weight")


def test_file_cut_while_open(tmp_path: Path) -> None:
    path = one("F32", [4], 16)(tmp_path) / "model.safetensors"
    with open_safetensors(path) as file:
        os.truncate(path, path.stat().st_size - 4)
        with pytest.raises(CheckpointError, match="tensor 'w': the file became shorter"):
            file.read("w")


def test_no_memory_is_a_capacity_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with open_safetensors(one("F32", [4], 16)(tmp_path) / "model.safetensors") as file:
        monkeypatch.setattr(torch, "empty", full)
        with pytest.raises(CapacityError, match="'w': no memory for 16 bytes"):
            file.read("w")
