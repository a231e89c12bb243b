"""verify: a static proof that a checkpoint is whole and means what it says. The model is never run.

Every rule is a function from what is known to findings; all findings come at once. `load` runs the same rules and
refuses on an error, unless that finding is skipped by name.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch

from fewbit import codecs
from fewbit.codecs.codec import CONFIG_FILES, Located, kind_of
from fewbit.codecs.source import Source
from fewbit.errors import CapacityError, CheckpointError, FewbitError
from fewbit.files.manifest import MANIFEST, verify_manifest
from fewbit.models.finding import Finding, Severity, refuse_on_errors
from fewbit.models.values import Watch, sibling_groups
from fewbit.quant.qtensor import Quantized

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tokenizer_config.json")
FLOATS = ("F32", "F16", "BF16", "F64")
SIZES = ("hidden_size", "intermediate_size", "vocab_size", "head_dim", "num_attention_heads")  # a weight has that many


@dataclass(slots=False)
class Known:
    """What the rules look at: the source, the empty model, and where each tensor goes in it."""

    source: Source
    model: Any  # a transformers model on the meta device

    @cached_property
    def rules(self) -> Any:
        from fewbit.models import hf

        return hf.rules(self.model)

    @cached_property
    def places(self) -> dict[str, Any]:
        """Module or dense tensor -> Placement or None."""
        from fewbit.models.fill import ask

        asked = {name: ask(name, self.shape(name)) for name in self.source.modules} | {n: n for n in self.source.dense}
        found = self.rules.place(asked.values())
        return {name: found[query] for name, query in asked.items()}

    def shape(self, name: str) -> tuple[int, ...]:
        held: Any = self.source.modules.get(name) or self.source.dense[name]
        return tuple(held.shape)

    @cached_property
    def linears(self) -> frozenset[str]:
        """Paths of the model's nn.Linear weights."""
        return frozenset(f"{n}.weight" for n, m in self.model.named_modules() if isinstance(m, torch.nn.Linear))


def verify(path: str | Path, trust_remote_code: bool = False) -> list[Finding]:
    """Every finding about a checkpoint; an empty list means sound. Errors make `load` refuse."""
    try:
        with codecs.open(path, trust_remote_code) as source:
            return [*_manifest(source), *verify_source(source), *value_findings(source)]
    except FewbitError as error:
        return [Finding("error", "unreadable", str(path), str(error))]


def verify_source(source: Source, model: Any = None) -> list[Finding]:
    """What headers and config alone can say; reads no weights."""
    try:
        known = Known(source, model if model is not None else _skeleton(source))
    except FewbitError as error:
        return [*_grouping(source), Finding("error", "no-model", "config.json", str(error))]
    return [finding for rule in HEADER_RULES for finding in rule(known)]


def _skeleton(source: Source) -> Any:
    from fewbit.models import hf

    with building(source):
        return hf.build(model_config(source), torch.bfloat16)


def model_config(source: Source) -> Any:
    """The config object of a checkpoint, plausible beside its files; by code of its folder only where it is trusted."""
    from fewbit.models import hf

    with building(source):
        config = hf.read_config(source.config, source.path if source.trusted else None)
        plausible(source, config)
        return config


@contextmanager
def building(source: Source) -> Iterator[None]:
    """A config is a stranger's, and model classes trust it: whatever they raise over it is about the checkpoint."""
    if not source.config:
        text = "a folder with a config.json beside the weights, or a .gguf file, would work"
        raise CheckpointError(f"{source.path}: no config.json, so the model is not known; {text}")
    try:
        yield
    except FewbitError:
        raise
    except MemoryError as error:
        raise CapacityError("config.json: no memory for a model of these sizes, even without weights") from error
    except Exception as error:
        text = f"no model can be built from it: {type(error).__name__}: {error}"
        raise CheckpointError(f"config.json: {text}") from error


def plausible(source: Source, config: Any) -> None:
    """Refuse sizes that no weight in the files backs, before a model is built from them."""
    text = config.get_text_config()
    tensors, values = len(source.modules) + len(source.dense), _values(source)
    _at_most(text, "num_hidden_layers", tensors, "tensors")
    for key in SIZES:
        _at_most(text, key, values, "values")


def _values(source: Source) -> int:
    held: list[Any] = [*source.modules.values(), *source.dense.values()]
    return sum(prod(entry.shape) for entry in held)


def _at_most(config: Any, key: str, most: int, what: str) -> None:
    found = getattr(config, key, None)
    if isinstance(found, int) and found > max(most, 1 << 12):
        raise CheckpointError(f"config.json: {key} is {found}, and the checkpoint holds {most} {what}")


def dense_linears(source: Source, heads: bool = False) -> list[str]:
    """Dense tensors that are the weight of an nn.Linear or of one expert; the output head only when asked for."""
    from fewbit.models import hf

    known = Known(source, _skeleton(source))
    head = hf.output_head(known.model)
    named = {f"{n}.weight": m for n, m in known.model.named_modules()}
    found = []
    for name, place in known.places.items():
        if place is None or name in source.modules or len(known.shape(name)) != 2 or not name.endswith(".weight"):
            continue
        linear = place.target in known.linears and (heads or named[place.target] is not head)
        if linear or place.expert is not None:
            found.append(name)
    return found


def value_findings(source: Source) -> Iterator[Finding]:
    """What reading every quantized module and KV scale says."""
    watch = Watch(source)
    for name in source.modules:
        try:
            q = source.read(name)
        except FewbitError as error:
            yield Finding("error", "unreadable", name, str(error))
            continue
        assert isinstance(q, Quantized)
        watch.see(name, q)
    yield from watch.finish()


def _manifest(source: Source) -> Iterator[Finding]:
    if (source.path / MANIFEST).is_file():
        for problem in verify_manifest(source.path):
            yield Finding("error", "digest", str(source.path), problem)


def _grouping(source: Source) -> Iterator[Finding]:
    for name, where, text in source.problems:
        yield Finding("error", name, where, text)
    for name in source.checkpoint.unindexed:
        yield Finding("warning", "not-in-index", name, "a shard holds it, and the index does not list it")


def _problems(known: Known) -> Iterator[Finding]:
    yield from _grouping(known.source)


def _rivals(known: Known) -> Iterator[Finding]:
    """A second quantization config of another dialect, or of other codes: readers would take one or the other."""
    source = known.source
    for located in _located(source):
        try:
            codec, evidence = codecs.claimant(located)
            plan = codec.plan(located.config)
        except FewbitError as error:
            yield Finding("warning", "second-config", located.where, f"is not read: {error}")
            continue
        if codec.plan.__module__ != codecs.CODECS[source.dialect].plan.__module__:
            text = f"{evidence}; {source.evidence} is what is read: remove the one that is wrong"
            yield Finding("error", "two-dialects", located.where, text)
            continue
        for name, entry in source.modules.items():
            form, _ = plan.for_module(name, kind_of(name))
            if form is not None and form.weight.element.bits != entry.format.weight.element.bits:
                text = (
                    f"gives {name} {form.weight.element.name} codes, the file holds {entry.format.weight.element.name}"
                )
                yield Finding("error", "two-configs", located.where, text)
                break


def _located(source: Source) -> Iterator[Located]:
    """Every quantization config but the one that was read."""
    held: dict[str, Any] = {
        f"config.json: {k}": source.config.get(k) for k in ("quantization_config", "compression_config")
    }
    held |= {name: value for name, value in source.checkpoint.extra.items() if name in CONFIG_FILES}
    found = [Located(value, where) for where, value in held.items() if isinstance(value, dict) and value]
    return iter(found[1:] if source.dialect in codecs.CODECS else [])


def _unknown(known: Known) -> Iterator[Finding]:
    from fewbit.models import hf

    _, surplus = hf.optional(known.model)
    ties = hf.ties(known.model)
    for name, place in known.places.items():
        if place is None and not (surplus and surplus.search(name)) and name not in ties:
            kind = type(known.model).__name__
            yield Finding("error", "unknown-tensor", name, f"{kind} has no place for it, and no dialect knows it")


def _missing(known: Known) -> Iterator[Finding]:
    from fewbit.models import hf

    may_miss, _ = hf.optional(known.model)
    ties = hf.ties(known.model)
    have: dict[str, int] = defaultdict(int)
    for name, place in known.places.items():
        if place is not None:
            for target in place.targets:
                have[target] += prod(known.shape(name)) // len(place.targets)
            if place.group is not None:
                have[place.group.target] += 1
    for path, parameter in known.model.named_parameters():
        if path in have or path in ties or (may_miss and may_miss.search(path)):
            continue
        if path in ties.values() and any(tied in have for tied, to in ties.items() if to == path):
            continue
        yield Finding("error", "missing-tensor", path, f"no tensor fills it (shape {list(parameter.shape)})")


def _shapes(known: Known) -> Iterator[Finding]:
    parts: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for name, place in known.places.items():
        if place is None or place.group is not None:
            continue
        shape, target = known.shape(name), place.targets[0]
        if place.swap:
            shape = tuple(torch.empty(shape, device="meta").transpose(*place.swap).shape)
        want = tuple(known.rules.parameters[target])
        if place.parts > 1 or len(place.targets) > 1:
            parts[target][name] = shape
            continue
        slot = want[1:] if place.expert is not None else want
        if shape != slot and shape != tuple(reversed(slot)) and not _stack_of(shape, slot):
            yield Finding(
                "error", "shape", name, f"{list(shape)} on disk, config.json asks for {list(slot)} ({target})"
            )
        elif place.expert is not None and place.expert >= want[0]:
            yield Finding("error", "shape", name, f"expert {place.expert}, config.json has {want[0]}")


def _stack_of(shape: tuple[int, ...], slot: tuple[int, ...]) -> bool:
    """Stacked experts may be stored [E, N, K] or [E, K, N]."""
    return len(shape) == 3 and (shape[0], shape[2], shape[1]) == slot


def _counts(known: Known) -> Iterator[Finding]:
    """A stack of experts or a joined parameter must be filled to the last value."""
    have: dict[str, int] = defaultdict(int)
    for name, place in known.places.items():
        if (
            place is not None
            and place.group is None
            and len(place.targets) == 1
            and (place.parts > 1 or place.expert is not None)
        ):
            have[place.target] += prod(known.shape(name))
    for target, count in have.items():
        want = prod(known.rules.parameters[target])
        if count != want:
            yield Finding(
                "error", "missing-tensor", target, f"{count} of {want} values are on disk: parts or experts are missing"
            )


def _idle_rules(known: Known) -> Iterator[Finding]:
    source = known.source
    names = {*source.modules, *(n.rpartition(".")[0] for n in source.dense), *source.surplus, *source.kv}
    names |= {n for n, _ in known.model.named_modules()}
    idle = source.plan.idle(name for name in names if kind_of(name) == "Linear")
    of_embeddings = source.plan.idle((name for name in names if kind_of(name) == "Embedding"), "Embedding")
    for rule in (rule for rule in idle if rule in of_embeddings):
        text = f"the {rule.match} rule {rule.pattern!r} matches no module of this checkpoint"
        yield Finding("warning", "idle-rule", rule.where or rule.pattern, text)


def _dense_but_covered(known: Known) -> Iterator[Finding]:
    """A class in a config need not mean the output head: some tools leave it dense, and engines read it so."""
    from fewbit.models import hf

    head = hf.output_head(known.model)
    heads = {f"{n}.weight" for n, m in known.model.named_modules() if m is head}
    for name, info in known.source.dense.items():
        place = known.places[name]
        module = name.removesuffix(".weight")
        if place is None or place.target not in known.linears or info.dtype not in FLOATS or module == name:
            continue
        form, rule = known.source.plan.for_module(module)
        if form is not None and known.source.explicit:
            by = f"{rule.where} = {rule.pattern!r}" if rule else "the plan"
            severity: Severity = "warning" if rule and rule.match == "class" and place.target in heads else "error"
            yield Finding(severity, "stored-dense", module, f"{by} says it is quantized; it is stored as {info.dtype}")


def _bare_codes(known: Known) -> Iterator[Finding]:
    for name, info in known.source.dense.items():
        place = known.places[name]
        if place is not None and info.dtype not in FLOATS and _is_float(known, place.target):
            text = f"holds {info.dtype} codes and nothing says how to read them (no scale, or no quantization_config)"
            yield Finding("error", "bare-codes", name, text)


def _is_float(known: Known, target: str) -> bool:
    state = known.model.state_dict()
    return target in state and state[target].is_floating_point()


def _sibling_formats(known: Known) -> Iterator[Finding]:
    if known.source.dialect == "gguf":  # its mixes give siblings different types on purpose, and its engines expect it
        return
    for parent, found in sibling_groups(known.source.modules).items():
        formats = {known.source.modules[name].format for name in found}
        if len(formats) > 1:
            text = "siblings hold different formats; engines that fuse them refuse the file, here each runs as it is"
            yield Finding("warning", "sibling-formats", parent, f"{', '.join(found)}: {text}")


def _tokenizer(known: Known) -> Iterator[Finding]:
    source = known.source
    folder = source.path if source.path.is_dir() else source.path.parent
    if source.tokenizer is None and not any((folder / name).exists() for name in TOKENIZERS):
        yield Finding("warning", "no-tokenizer", str(source.path), "no tokenizer file: ids work, text does not")


def _remote_code(known: Known) -> Iterator[Finding]:
    said = "nothing of it is imported; transformers' own class is used"
    if known.source.trusted:
        said = "trusted: imported and run where transformers has no class of its own"
    for text in known.source.checkpoint.remote_code:
        yield Finding("warning", "remote-code", text, said)


def _kv_declared(known: Known) -> Iterator[Finding]:
    source = known.source
    if source.plan.kv is None or source.plan.kv.dynamic:
        return
    attentions = {n for n, _ in known.model.named_modules() if n.endswith(("self_attn", "attention", ".attn", "mixer"))}
    if not source.kv:
        yield Finding("error", "kv-scale-missing", "quantization_config", "declares KV scales, and no tensor holds any")
        return
    for module in sorted(attentions - source.kv.keys()) if attentions & source.kv.keys() else ():
        yield Finding("error", "kv-scale-missing", module, "declared, and no k_scale or v_scale is in the file")
    for module, scales in source.kv.items():
        lacking = [of for of in "kv" if of not in scales and "kv" not in scales]
        if lacking:
            yield Finding("error", "kv-scale-missing", module, f"no {' and '.join(f'{of}_scale' for of in lacking)}")
        if biases := [tensor for tensor in scales.values() if tensor.endswith("_bias")]:
            text = (
                f"{', '.join(biases)}: its tool takes it from keys and values before rounding them; here it is not read"
            )
            yield Finding("warning", "kv-bias", module, text)


HEADER_RULES: tuple[Callable[[Known], Iterable[Finding]], ...] = (
    _problems, _rivals, _unknown, _missing, _shapes, _counts, _idle_rules, _dense_but_covered, _bare_codes,
    _sibling_formats, _tokenizer, _remote_code, _kv_declared,
)  # fmt: skip


__all__ = ["Finding", "dense_linears", "refuse_on_errors", "verify", "verify_source"]
