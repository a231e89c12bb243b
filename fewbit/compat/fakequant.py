"""Fakequant: a float model served as if it were quantized. ModelOpt's example for vLLM, its names and its files.

`prepared` is what LLM and serve use: calibrate (or read what another calibration gave), and leave what ranks read in a
file for as long as the engine starts.
"""

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit import codecs
from fewbit.codecs.source import Source
from fewbit.compat.fakequant_arrivals import Maker
from fewbit.compat.fakequant_ask import Asked, Wish, config_of, retold, wish
from fewbit.compat.fakequant_run import needs_data, run
from fewbit.compat.fakequant_state import SMOOTH, Reader, State, normalized
from fewbit.compat.fakequant_write import KEY, opened, state_file
from fewbit.compat.fakequant_write import calibrate as write
from fewbit.engine.config import EngineConfig
from fewbit.engine.start import device_named, dtype_of, progress
from fewbit.errors import CheckpointError, RequestError
from fewbit.files.pickled import read_pickled
from fewbit.files.safetensors import open_safetensors
from fewbit.models.emulation import Emulation
from fewbit.models.layers import Layers
from fewbit.models.text import tokenizer, tokenizer_of
from fewbit.workflows import calibration_sets as sets
from fewbit.workflows.calibration import Samples, calibration

LOG = logging.getLogger("fewbit.fakequant")
LONGEST = 512  # tokens of a sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Fakequant:
    """What a user asks, by the names of flags and of LLM's keywords."""

    fakequant: Asked = None
    kv_fakequant: Asked = None
    calib_dataset: str | None = None  # None: the text that ships
    calib_size: int = 512
    calib_batch_size: int = 1
    amax_file: str | None = None

    def __post_init__(self) -> None:
        for name in ("calib_size", "calib_batch_size"):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise RequestError(f"{name}={value!r}: want a whole number of at least 1")


NAMES = tuple(f.name for f in fields(Fakequant))


@contextmanager
def prepared(options: Mapping[str, Any]) -> Iterator[EngineConfig]:
    """options: EngineConfig's and Fakequant's -> the engine's, with the file that ranks read while they start."""
    config = EngineConfig.of(**{name: value for name, value in options.items() if name not in NAMES})
    asked = check(config, {name: options[name] for name in NAMES if options.get(name) is not None})
    if asked is None:
        yield config
        return
    device = torch.device(device_named(config.device))
    with progress("calibrating") as tell:
        made = emulation(config.model, asked, device, dtype_of(config, device), config.tokenizer, tell,
                         config.trust_remote_code)  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="fewbit-fakequant-") as folder:
        path = Path(folder) / "emulation.safetensors"
        made.write(path)
        yield EngineConfig.of(**{f.name: getattr(config, f.name) for f in fields(config)} | {"emulation": str(path)})


def check(config: EngineConfig, given: Mapping[str, Any]) -> Fakequant | None:
    """What can be refused before a model is read. -> None where nothing is to be rounded"""
    asked = Fakequant(**given)
    wanted = [config_of(asked.fakequant), config_of(asked.kv_fakequant), asked.amax_file]
    if all(each is None for each in wanted):
        if given:
            raise RequestError(f"{', '.join(given)}: of fakequant, and nothing says how to round: give fakequant too")
        return None
    if config.quantization is not None:
        raise RequestError(f"quantization={config.quantization!r} beside fakequant: one of them rounds the weights")
    if asked.amax_file is not None:
        state_file(asked.amax_file)
    return asked


def emulation(model: str | Path, asked: Fakequant, device: torch.device, dtype: Any, words: str | None = None,
              tell: Any = lambda done, total: None, trust_remote_code: bool = False) -> Emulation:  # fmt: skip
    """words: where the tokenizer is, None for the model's own place."""
    with codecs.open(model, trust_remote_code) as source:
        layers = opened(source, device, dtype)
        if asked.amax_file is not None:
            return from_file(asked, layers, source)
        wanted = wish(asked.fakequant, asked.kv_fakequant, layers)
        batches = batches_of(asked, words or model)(wanted, layers) if needs_data(wanted) else []
        held = run(layers, wanted, batches, tell)
        return Maker(wanted, layers, Reader(held.state, "calibration"), held.codes).emulation()


def batches_of(asked: Fakequant, words: str | Path) -> Any:
    """What calibration runs on, where it needs a text."""

    def batches(wanted: Wish, layers: Layers) -> list[Tensor]:
        reach = int(getattr(layers.config.get_text_config(), "max_position_embeddings", None) or LONGEST)
        read = tokenizer(words, layers.source.trusted)
        found = samples(read, asked.calib_dataset, asked.calib_size, min(LONGEST, reach))
        LOG.info("calibrating on %d samples of %d tokens: %s", len(found.ids), len(found.ids[0]), found.source)
        return found.batches(asked.calib_batch_size)

    return batches


def calibrate(model: str | Path, out: str | Path, fakequant: Asked = None, kv_fakequant: Asked = None, *,
              text: Mapping[str, Any] | None = None, batch: int = 1, **options: Any) -> State:  # fmt: skip
    """A folder with float weights and the state of their quantizers. text: of workflows.calibration, data= the first.

    options: device, dtype, max_shard, overwrite, trust_remote_code, tell, of fakequant_write.calibrate.
    """
    asked = dict(text or {})
    data = asked.pop("data", None)

    def batches(wanted: Wish, layers: Layers) -> list[Tensor]:
        ids = isinstance(data, list | tuple | Tensor)
        return calibration(None if ids else tokenizer_of(layers.source), data, **asked).batches(batch)

    return write(model, out, fakequant, kv_fakequant, batches, **options)


def samples(words: Any, dataset: str | None, size: int, length: int) -> Samples:
    """Of a data set where its hub can be reached, else of the text that ships, as many as it has."""
    if dataset is not None:
        try:
            return calibration(words, dataset, samples=size, length=length)
        except RequestError as error:
            if Path(dataset).exists() or sets.named(dataset) is None:
                raise
            LOG.warning("%s; calibrating on the text that ships", str(error).split("; what works")[0])
    while True:
        try:
            return calibration(words, None, samples=size, length=length)
        except RequestError:
            if size == 1:
                raise
            size //= 2


def from_file(asked: Fakequant, layers: Layers, source: Source) -> Emulation:
    """What another calibration, or training, gave."""
    path = state_file(str(asked.amax_file))
    state, told = read_state(path)
    given = asked.fakequant is not None or asked.kv_fakequant is not None
    if not given and not told:
        reason = "the file holds magnitudes alone: --fakequant (QUANT_CFG) says what they are scales of"
        raise RequestError(f"{path}: {reason}")
    if any(name.endswith(SMOOTH) for name in state) and not beside(path, source.path):
        reason = f"serve the folder that the file was written into, not {source.path}"
        raise CheckpointError(f"{path}: its weights were scaled for it, and lie beside it: {reason}")
    wanted = wish(asked.fakequant, asked.kv_fakequant, layers) if given else retold(told, layers)
    return Maker(wanted, layers, Reader(state, str(path)), came=True).emulation()


def beside(path: Path, model: Path) -> bool:
    folder = model if model.is_dir() else model.parent
    return path.resolve().parent == folder.resolve()


def read_state(path: Path) -> tuple[State, dict[str, Any]]:
    """-> tensors by ModelOpt's names, and of our own files what each quantizer does."""
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"
    if not zipped:
        with open_safetensors(path) as opened_file:
            told = json.loads(opened_file.metadata.get(KEY, "{}"))
            return normalized({name: opened_file.read(name) for name in opened_file.tensors}), told
    return normalized(read_pickled(path)), {}
