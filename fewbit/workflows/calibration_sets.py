"""Data sets by the names that other tools' users know, fetched from a hub where one can be reached."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import chain
from typing import Any

from fewbit import env
from fewbit.errors import RequestError
from fewbit.workflows.calibration_read import Document, of_row

WORKS = "what works: no --calib for the text that ships with the package, or a .txt, .jsonl, .json or .parquet file"


@dataclass(frozen=True, slots=True)
class DataSet:
    """Where a hub keeps it. splits are read in turns."""

    repo: str
    config: str | None = None
    splits: tuple[str, ...] = ("train",)
    column: str | None = None


NEMOTRON = ("stem", "chat", "math", "code")
SETS: dict[str, DataSet] = {
    "cnn_dailymail": DataSet("abisee/cnn_dailymail", "3.0.0", column="article"),
    "ultrachat": DataSet("HuggingFaceH4/ultrachat_200k", splits=("train_sft",), column="messages"),
    "ultrachat_200k": DataSet("HuggingFaceH4/ultrachat_200k", splits=("train_sft",), column="messages"),
    "ultrachat_2k": DataSet("mgoin/ultrachat_2k", splits=("train_sft",), column="messages"),
    "wikitext": DataSet("Salesforce/wikitext", "wikitext-103-raw-v1", column="text"),
    "wikitext2": DataSet("Salesforce/wikitext", "wikitext-2-raw-v1", column="text"),
    "wikipedia": DataSet("wikimedia/wikipedia", "20231101.en", column="text"),
    "c4": DataSet("allenai/c4", "en", column="text"),
    "pile": DataSet("monology/pile-uncopyrighted", column="text"),
    "pile-10k": DataSet("NeelNanda/pile-10k", column="text"),
    "pileval": DataSet("mit-han-lab/pile-val-backup", splits=("validation",), column="text"),
    "minipile": DataSet("JeanKaddour/minipile", column="text"),
    "pg19": DataSet("deepmind/pg19", column="text"),
    "open_platypus": DataSet("garage-bAInd/Open-Platypus"),
    "open-platypus": DataSet("garage-bAInd/Open-Platypus"),
    "magpie": DataSet("Magpie-Align/Magpie-Pro-MT-300K-v0.1", column="conversations"),
    "open_code_reasoning": DataSet("nvidia/OpenCodeReasoning", "split_0", ("split_0",)),
    "open_math_reasoning": DataSet("nvidia/OpenMathReasoning", None, ("cot", "tir", "genselect")),
    "nemotron-post-training-dataset-v1": DataSet(
        "nvidia/Nemotron-Post-Training-Dataset-v1", None, (*NEMOTRON, "tool_calling"), "messages"
    ),
    "nemotron-post-training-dataset-v2": DataSet(
        "nvidia/Nemotron-Post-Training-Dataset-v2", None, NEMOTRON, "messages"
    ),
    "nemotron-science-v1": DataSet("nvidia/Nemotron-Science-v1", None, ("MCQ", "RQA"), "messages"),
}


def named(name: str) -> DataSet | None:
    """A row of the table, by its name or by its repository; or any `owner/name`."""
    known = SETS.get(name.lower()) or next((s for s in SETS.values() if s.repo.lower() == name.lower()), None)
    if known is not None:
        return known
    owner, slash, rest = name.partition("/")
    plain = owner and rest and "/" not in rest and not name.startswith((".", "~")) and " " not in name
    return DataSet(name) if slash and plain else None


def unknown(name: str) -> RequestError:
    near = get_close_matches(name.lower(), SETS, 3)
    hint = f"; near are {', '.join(near)}" if near else f"; known data sets: {', '.join(SETS)}"
    return RequestError(f"--calib {name}: neither a file or folder nor the name of a data set{hint}; {WORKS}")


def fetch(
    name: str, of: DataSet, split: str | None = None, column: str | None = None
) -> tuple[str, Callable[[int], Iterator[Document]]]:
    """-> (licence as its page states it, a reader of the first documents of about so many characters)."""
    if env.offline():
        raise RequestError(f"--calib {name}: a data set of a hub, and HF_HUB_OFFLINE forbids to ask one; {WORKS}")
    try:
        from datasets import load_dataset
        from huggingface_hub import HfApi
    except ImportError as error:
        raise RequestError(f"--calib {name}: `datasets` is missing: pip install fewbit[data]; {WORKS}") from error
    splits = (split,) if split else of.splits
    try:
        licence = _licence(HfApi().dataset_info(of.repo, timeout=10))
        streams = [load_dataset(of.repo, of.config, split=each, streaming=True) for each in splits]
    except Exception as error:  # the library's errors have no common base
        raise _failed(name, of, error) from error
    return licence, lambda limit: _documents(name, of, streams, limit, column or of.column)


def _documents(name: str, of: DataSet, streams: list[Any], limit: int, column: str | None) -> Iterator[Document]:
    """A row of each stream in turn, until the shortest ends."""
    found, rows = 0, enumerate(chain.from_iterable(zip(*streams, strict=False)))
    while True:
        try:
            number, row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # as above
            raise _failed(name, of, error) from error
        document = of_row(row, f"{of.repo}: row {number}", column)
        found += len(document.text)
        if found >= limit:
            yield replace(document, more=True)
            return
        yield document


def _licence(info: Any) -> str:
    stated = getattr(getattr(info, "card_data", None), "license", None)
    return str(stated) if stated else "not stated"


def _failed(name: str, of: DataSet, error: Exception) -> RequestError:
    first = (str(error).splitlines() or [""])[0]
    return RequestError(f"--calib {name}: {of.repo} cannot be fetched: {type(error).__name__}: {first}; {WORKS}")
