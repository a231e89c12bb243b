"""What can be read, held and run, as rows of plain data: dialects(), formats(), kernels(), algos().

Other packages add to each through the entry-point groups `fewbit.codecs`, `fewbit.formats`, `fewbit.kernels` and
`fewbit.algos`; `origin` says who gave a row. Two of one name are an error that names both.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points

import torch

from fewbit import algos as algorithms
from fewbit import codecs
from fewbit.codecs import gguf
from fewbit.codecs.codec import Codec
from fewbit.errors import SpecError, UnsupportedError
from fewbit.kernels.registry import KERNELS, Kernel
from fewbit.kernels.registry import kernels as all_kernels
from fewbit.quant import formats as rows
from fewbit.quant.formats import FORMATS
from fewbit.quant.qtensor import bits_per_weight
from fewbit.quant.spec import Format, describe

OURS = "fewbit"
# where a dialect keeps its quantization config, by the start of its name; elsewhere it is config.json
CONFIG_FILES = {
    "gptq": ("config.json", "quantize_config.json"),
    "awq": ("config.json", "quant_config.json"),
    "modelopt": ("config.json", "hf_quant_config.json"),
    "auto-round": ("config.json", "quantization_config.json"),
    "gguf": ("*.gguf",),
}


@dataclass(frozen=True, slots=True)
class DialectInfo:
    """A checkpoint dialect."""

    name: str  # its quant_method
    summary: str
    config_files: tuple[str, ...]
    reads: bool
    writes: bool
    formats: tuple[str, ...]  # the rows of formats() that it can write
    origin: str


@dataclass(frozen=True, slots=True)
class FormatInfo:
    """A row of FORMATS."""

    name: str
    bits_per_weight: float  # scales that span a whole axis count as nothing
    element: str
    scales: str  # element, scales and zeros in one line
    act: str  # what inputs are rounded to; "" = they stay as they are
    can_encode: bool
    origin: str


@dataclass(frozen=True, slots=True)
class KernelInfo:
    """One way to run an op."""

    name: str
    op: str
    devices: tuple[str, ...]  # () = every device
    dtypes: tuple[str, ...]
    capability: tuple[int, int]  # least CUDA compute capability
    formats: tuple[str, ...]  # the rows of formats() it takes on its first device
    note: str
    origin: str


@dataclass(frozen=True, slots=True)
class AlgoInfo:
    """A way to choose codes: (weight, stats, spec) -> QTensor."""

    name: str
    needs: tuple[str, ...]  # the statistics it asks calibration for
    summary: str
    origin: str


def dialects() -> list[DialectInfo]:
    """Every checkpoint dialect, and what it can hold."""
    origins = {point.load().name: point.value for point in entry_points(group="fewbit.codecs")}
    safetensors = [_dialect(codec, origins.get(name, OURS)) for name, codec in codecs.CODECS.items()]
    summary = "llama.cpp files, bare or in a folder; config and tokenizer are rebuilt from their metadata"
    held = _held(gguf.fit)
    return [*safetensors, DialectInfo("gguf", summary, _config_files("gguf"), True, True, held, OURS)]


def formats() -> list[FormatInfo]:
    """Every format, fakequant ones included."""
    return [_format(name, row) for name, row in FORMATS.items()]


def kernels() -> list[KernelInfo]:
    """Every kernel, in the order in which they are tried."""
    origins: dict[tuple[str, str], list[str]] = {(k.op, k.name): [OURS] for k in KERNELS}
    for point, kernel in _kernels_of_others():
        origins.setdefault((kernel.op, kernel.name), []).append(point)
    for (op, name), points in origins.items():
        if len(points) > 1:
            raise SpecError(f"two {op} kernels are called {name!r}: of {' and '.join(points)}")
    return [_kernel(kernel, origins[kernel.op, kernel.name][0]) for kernel in all_kernels()]


def algos() -> list[AlgoInfo]:
    """Every algorithm that chooses codes."""
    origins = algorithms.origins()
    return [
        AlgoInfo(name, tuple(sorted(algo.needs)), algo.summary, origins.get(name, OURS))
        for name, algo in algorithms.ALGOS.items()
    ]


def _dialect(codec: Codec, origin: str) -> DialectInfo:
    held = _held(codec.fit) if codec.fit and codec.write else ()
    writes = codec.write is not None or codec.name == "dense"  # floats are written by decoding, not by a codec
    reads = codec.name != "foreign"  # which is the list of what is refused by name
    return DialectInfo(codec.name, codec.summary, _config_files(codec.name), reads, writes, held, origin)


def _config_files(name: str) -> tuple[str, ...]:
    return next((files for start, files in CONFIG_FILES.items() if name.startswith(start)), ("config.json",))


def _held(fit: Callable[[Format], Format]) -> tuple[str, ...]:
    def holds(row: Format) -> bool:
        try:
            fit(row)
        except (UnsupportedError, SpecError):
            return False
        return True

    return tuple(name for name, row in FORMATS.items() if holds(row))


def _format(name: str, row: Format) -> FormatInfo:
    return FormatInfo(
        name,
        bits_per_weight(row.weight),
        row.weight.element.name,
        describe(row.weight),
        describe(row.act) if row.act else "",
        row.weight.element.kind != "run",
        rows.origins().get(name, OURS),
    )


def _kernel(kernel: Kernel, origin: str) -> KernelInfo:
    device = torch.device(kernel.devices[0] if kernel.devices else "cpu")
    taken = tuple(n for n, row in FORMATS.items() if kernel.supports(row, device, kernel.dtypes[0]) is None)
    dtypes = tuple(str(dtype).removeprefix("torch.") for dtype in kernel.dtypes)
    return KernelInfo(kernel.name, kernel.op, kernel.devices, dtypes, kernel.capability, taken, kernel.note, origin)


def _kernels_of_others() -> Iterator[tuple[str, Kernel]]:
    for point in entry_points(group="fewbit.kernels"):
        loaded = point.load()
        for kernel in (loaded,) if isinstance(loaded, Kernel) else loaded():
            yield point.value, kernel
