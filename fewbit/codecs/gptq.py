"""GPTQ checkpoints: integers of 2 to 8 bits, packed along K, with zeros packed along N.

Three dialects share the tensors. v1 (`gptq`) stores each zero less one, wrapping; v2 (`gptq_v2`) stores it as it is;
planar (`gptq_p`) splits every 32 codes into bit planes, with zeros as in v2. Activation order comes as g_idx: here the
columns are sorted by group and the linear reads its input in that order.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from fewbit.codecs import int_packing as ints
from fewbit.codecs.codec import Codec, Config, Located, Parts, Tensors, refuse, want
from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.quant.pack import pack
from fewbit.quant.plan import Plan, Rule
from fewbit.quant.qtensor import Quantized, Transform
from fewbit.quant.spec import Format, QuantSpec

BITS = (2, 3, 4, 5, 6, 7, 8)
WIDTHS = {"gptq": (2, 3, 4, 8), "gptq-v2": (2, 3, 4, 8), "gptq-p": BITS}  # what other readers know of each
ENDINGS = (".qweight", ".qzeros", ".scales", ".g_idx")
HEAD = r"(.*\.)?(lm_head|embed_out)$"
REFUSED = {
    "marlin": "codes in the order of one kernel, without their zeros",
    "bitblas": "codes in an order that was tuned for one GPU",
}
OVERRIDES = ("bits", "group_size", "sym", "desc_act")


def _layout(config: Config) -> str:
    """The dialect: what checkpoint_format (or format) says, v1 where nothing does."""
    found = config.get("checkpoint_format") or config.get("format") or "gptq"
    if config.get("is_marlin_format"):
        found = "marlin"
    return str(found).lower().replace("_", "-")


def _claims(located: Located, name: str) -> str | None:
    config = located.config
    method = str(config.get("quant_method") or "").lower()
    old = not method and {"bits", "group_size"} <= config.keys() and "zero_point" not in config
    if method != "gptq" and not old:
        return None
    layout = _layout(config)
    if layout != name and not (name == "gptq" and layout not in WIDTHS):  # an unknown layout is refused by the plan
        return None
    what = "quant_method = gptq" if method else "bits, group_size and no quant_method"
    return f"{located.where}: {what}, checkpoint_format = {layout}"


def _plan(config: Config) -> Plan:
    layout = _layout(config)
    if layout not in WIDTHS:
        reason = REFUSED.get(layout, f"known: {', '.join(WIDTHS)}")
        raise UnsupportedError(f"checkpoint_format {layout!r} cannot be read; export it as gptq or gptq_v2", [reason])
    if config.get("pack_dtype", "int32") not in ("int32", "torch.int32"):
        raise UnsupportedError(f"pack_dtype {config['pack_dtype']!r} cannot be read", ["words of int32 are"])
    base = _format(config)
    rules = [*_dynamic(config), *_head(config, base), *_covered(config, base)]
    return Plan(tuple(rules), dialect=layout)


def _format(config: Config) -> Format:
    group = ints.group_size(config)
    ordered = ints.flag(config, "desc_act", False) and group != -1
    bits = ints.integer(config, "bits", None, BITS)
    return ints.int_format(bits, group, ints.flag(config, "sym", True), ("permute",) if ordered else ())


def _dynamic(config: Config) -> Iterator[Rule]:
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, dict):
        raise CheckpointError(f"quantization_config.dynamic: want an object, found {type(dynamic).__name__}")
    for pattern, changes in dynamic.items():
        where = f"quantization_config.dynamic[{pattern!r}]"
        if pattern.startswith("-:"):
            yield Rule(pattern.removeprefix("-:"), "regex", None, where)
            continue
        if not isinstance(changes, dict):
            raise CheckpointError(f"{where}: want an object, found {type(changes).__name__}")
        changed = {key: value for key, value in changes.items() if key in OVERRIDES}
        yield Rule(pattern.removeprefix("+:"), "regex", _format(config | changed), where)


def _head(config: Config, base: Format) -> Iterator[Rule]:
    quantized = ints.flag(config, "lm_head", False)
    yield Rule(HEAD, "regex", base if quantized else None, "quantization_config.lm_head")


def _covered(config: Config, base: Format) -> Iterator[Rule]:
    """Every linear, or those whose name contains one of a list (of lists)."""
    key = "modules_in_block_to_quantize"
    listed = config.get(key)
    if listed is None:
        yield Rule("Linear", "class", base, "quantization_config.bits")
        return
    for i, names in enumerate(listed):
        for name in [names] if isinstance(names, str) else names:
            yield Rule(name, "substring", base, f"quantization_config.{key}[{i}]")


def _shape(form: Format, parts: Parts) -> tuple[int, ...]:
    return _matrix(form, tuple(parts.info(".qweight").shape))


def _matrix(form: Format, words: tuple[int, ...]) -> tuple[int, int]:
    bits = int(form.weight.element.bits)
    if len(words) != 2 or words[0] * 32 % bits:
        raise CheckpointError(f".qweight: want [K * {bits} / 32, N], found {list(words)}")
    return words[1], words[0] * 32 // bits


def read(form: Format, tensors: Mapping[str, Tensor], less: int, planar: bool = False) -> Quantized:
    """less: what was taken from each zero before it was stored."""
    bits = int(form.weight.element.bits)
    qweight = tensors[".qweight"]
    n, k = _matrix(form, tuple(qweight.shape))
    group = ints.one_group(form.weight, k)
    groups = -(-k // group)
    want(".qweight", qweight, torch.int32, (k * bits // 32, n))
    scales = want(".scales", tensors[".scales"], ints.FLOAT_DTYPES, (groups, n)).T
    stored = want(".qzeros", tensors[".qzeros"], torch.int32, (groups, n * bits // 32))
    zeros = ((ints.unpack_words(stored, bits, planar) + less) & (2**bits - 1)).T
    index = _order(form, tensors, k, group)
    plane = _plane(qweight.T, bits, planar, index)
    weight = ints.assemble(form, plane, scales, zeros.contiguous(), (n, k))
    transforms = () if index is None else (Transform("permute", {"index": index}),)
    kinds = tuple(t.kind for t in transforms)
    return Quantized(Format(weight.spec, None, kinds), weight, transforms=transforms)


def _plane(words: Tensor, bits: int, planar: bool, index: Tensor | None) -> Tensor:
    """[N, words] -> offset-binary codes, packed along K: the same bytes, unless something has to move."""
    if not planar and index is None:
        return ints.as_bytes(words)
    values = ints.unpack_words(words, bits, planar)
    return pack(values if index is None else values.index_select(-1, index), bits)


def _order(form: Format, tensors: Mapping[str, Tensor], k: int, group: int) -> Tensor | None:
    """The columns sorted by group, or None where they are."""
    if ".g_idx" not in tensors:
        if form.transforms:
            raise CheckpointError(".g_idx is missing: desc_act is on, and it says which group each column belongs to")
        return None
    g_idx = want(".g_idx", tensors[".g_idx"], (torch.int32, torch.int64), (k,)).long()
    regular = torch.arange(k) // group
    if torch.equal(g_idx, regular):
        return None
    groups = -(-k // group)
    outside = (g_idx < 0) | (g_idx >= groups)
    if bool(outside.any()):
        column = int(outside.nonzero()[0])
        raise CheckpointError(f".g_idx: column {column} is in group {int(g_idx[column])}; there are {groups} groups")
    index = g_idx.argsort(stable=True)
    if not torch.equal(g_idx[index], regular):
        sizes = torch.bincount(g_idx, minlength=groups)
        odd = int((sizes != torch.bincount(regular)).nonzero()[0])
        raise CheckpointError(f".g_idx: group {odd} has {int(sizes[odd])} columns; group_size says {group}")
    return index


def write(q: Quantized, name: str, planar: bool = False) -> Tensors:
    """v1 zeros where the dialect is v1 and the tensor is symmetric, v2 zeros elsewhere."""
    _, k = ints.matrix(name, q)
    bits = int(q.weight.spec.element.bits)
    group = ints.one_group(q.weight.spec, k)
    values, zeros = ints.offset_binary(q.weight), ints.zeros_of(q.weight)
    g_idx = torch.arange(k, device=q.weight.device) // group
    if q.transforms:
        back = q.transforms[0].tensors["index"].argsort()
        values, g_idx = values.index_select(-1, back), g_idx.index_select(0, back)
    less = 1 if name == "gptq" and not q.weight.spec.zeros else 0
    return {
        ".qweight": ints.pack_words(values, bits, planar).T.contiguous(),
        ".qzeros": ints.pack_words((zeros.T - less) & (2**bits - 1), bits, planar).contiguous(),
        ".scales": q.weight.planes["scale0"].T.contiguous(),
        ".g_idx": g_idx.int(),
    }


def fit(form: Format, name: str) -> Format:
    if set(form.transforms) - {"permute"}:
        raise refuse(name, f"the transforms {', '.join(form.transforms)}", "it holds an order of the columns, no more")
    if int(form.weight.element.bits) in (5, 6, 7) and name != "gptq-p":
        raise refuse(name, f"{form.weight.element.name} codes", "its readers know 2, 3, 4 and 8 bits; gptq-p holds it")
    return ints.fit_int(name, form, WIDTHS[name])


def config(formats: Mapping[str, Format], dense: list[str], kv: QuantSpec | None, name: str) -> dict[str, Config]:
    settings = {module: _setting(form) for module, form in formats.items()}
    base = _most_common(list(settings.values()))
    asym = {module for module, form in formats.items() if form.weight.zeros}
    if name == "gptq" and asym and len(asym) < len(formats):
        raise refuse(name, "symmetric and asymmetric modules together", "gptq-v2 stores every zero as it is")
    layout = "gptq_v2" if name == "gptq" and asym else name.replace("-", "_")
    dynamic = _dynamic_rules(settings | dict.fromkeys(dense), base)
    whole: Config = {"quant_method": "gptq", "checkpoint_format": layout, "format": layout, "pack_dtype": "int32"}
    whole |= base | {"desc_act": any(form.transforms for form in formats.values())}
    whole["lm_head"] = any(re.match(HEAD, module) for module in settings)
    if dynamic:
        whole["dynamic"] = dynamic
    return {"quantization_config": whole, "quantize_config.json": whole}


def _setting(form: Format) -> Config:
    weight = form.weight
    group = weight.scales[0].block[1] or -1
    return {"bits": int(weight.element.bits), "group_size": group, "sym": not weight.zeros}


def _most_common(settings: list[Config]) -> Config:
    if not settings:
        raise refuse("gptq", "a checkpoint without quantized modules", "--to dense writes one")
    counts = Counter(tuple(s.items()) for s in settings)
    return dict(counts.most_common(1)[0][0])


def _dynamic_rules(settings: Mapping[str, Config | None], base: Config) -> Config:
    """Regex -> what differs from base. None is left dense. Modules that share their last name share a rule."""
    by_last: dict[str, list[str]] = {}
    for module in settings:
        by_last.setdefault(module.rpartition(".")[2], []).append(module)
    rules: Config = {}
    for last, modules in by_last.items():
        alike = all(settings[m] == settings[modules[0]] for m in modules)
        for module in modules[:1] if alike else modules:
            pattern = rf"(.*\.)?{re.escape(last)}$" if alike else f"{re.escape(module)}$"
            setting = settings[module]
            if setting is None:
                rules[f"-:{pattern}"] = {}
            elif setting != base:
                rules[f"+:{pattern}"] = {key: value for key, value in setting.items() if value != base[key]}
    return rules


def _codec(name: str, less: int, planar: bool, summary: str) -> Codec:
    return Codec(
        name, partial(_claims, name=name), _plan, ENDINGS, (".qweight", ".qzeros"), _shape,
        partial(read, less=less, planar=planar), partial(fit, name=name), partial(write, name=name, planar=planar),
        partial(config, name=name), explicit=False, summary=summary,
    )  # fmt: skip


CODECS = (
    _codec("gptq", 1, False, "GPTQ v1: zeros stored less one; asymmetric models are written as v2"),
    _codec("gptq-v2", 0, False, "GPTQ v2: zeros stored as they are"),
    _codec("gptq-p", 0, True, "GPTQ in bit planes, 2 to 8 bits"),
)
