"""The observer `save`: every tensor that a node reads or makes, in a file of its own below <folder>/tensors."""

from collections import Counter
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from fewbit.files.staging import raise_write_error


class Saver:
    """Files are safetensors, where INC pickles: <node>_input0_iter3.safetensors, with one tensor called x."""

    def __init__(self, stats: str):
        self.folder = Path(stats).parent / "tensors"
        self.calls: Counter[str] = Counter()

    def save(self, node: str, part: str, index: int | str, x: Tensor) -> None:
        name = f"{node}_{index}" if part == "params" else f"{node}_{part[:-1]}{index}"
        path = self.folder / f"{name}_iter{self.calls[name]}.safetensors"
        self.calls[name] += 1
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file({"x": x.detach().cpu().contiguous().clone()}, path)
        except OSError as error:
            raise_write_error(path, error)
