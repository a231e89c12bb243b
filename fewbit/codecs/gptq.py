"""GPTQ checkpoints: integers of 2 to 8 bits with scales and zeros per group, and perhaps columns out of order.

Three dialects share the tensors. v1 (`gptq`) stores each zero less one, wrapping; v2 (`gptq_v2`) stores it as it is;
planar (`gptq_p`) splits every 32 codes into bit planes, with zeros as in v2. Activation order comes as g_idx: here the
columns are sorted by group and the linear reads its input in that order.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial

from fewbit.codecs.codec import Codec, Config, Located, Tensors, by_header, refuse
from fewbit.codecs.int_config import fit_int, flag, group_size, int_format, integer, names, setting
from fewbit.codecs.int_packing import GPTQ_ENDINGS, read_gptq, write_gptq
from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.quant.plan import Plan, Rule
from fewbit.quant.qtensor import Quantized
from fewbit.quant.spec import Format, QuantSpec

BITS = (2, 3, 4, 5, 6, 7, 8)
WIDTHS = {"gptq": (2, 3, 4, 8), "gptq-v2": (2, 3, 4, 8), "gptq-p": BITS}  # what other readers know of each
LESS = {"gptq": 1, "gptq-v2": 0, "gptq-p": 0}  # what is taken from a zero before it is stored
HEAD = r"(.*\.)?(lm_head|embed_out)$"
REFUSED = {
    "marlin": "it holds codes in the order of one kernel, without their zeros",
    "bitblas": "it holds codes in an order that was tuned for one GPU",
}
OVERRIDES = ("bits", "group_size", "sym", "desc_act")


def _layout(config: Config) -> str:
    """The dialect: what checkpoint_format (or format) says, v1 where nothing does."""
    found = config.get("checkpoint_format") or config.get("format") or "gptq"
    return "marlin" if config.get("is_marlin_format") else str(found).lower().replace("_", "-")


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
        raise UnsupportedError(f"pack_dtype {config['pack_dtype']!r} cannot be read", ["words of int32 can"])
    base = _format(config)
    head = Rule(HEAD, "regex", base if flag(config, "lm_head", False) else None, "quantization_config.lm_head")
    return Plan((*_dynamic(config), head, *_covered(config, base)), dialect=layout)


def _format(config: Config) -> Format:
    group = group_size(config)
    ordered = flag(config, "desc_act", False) and group != -1
    bits = integer(config, "bits", None, BITS)
    return int_format(bits, group, flag(config, "sym", True), ("permute",) if ordered else ())


def _dynamic(config: Config) -> Iterator[Rule]:
    """Regex -> {}, to leave dense ("-:"), or what differs ("+:", or no prefix)."""
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


def _covered(config: Config, base: Format) -> Iterator[Rule]:
    """Every linear, or those whose name contains one of a list."""
    key = "modules_in_block_to_quantize"
    if config.get(key) is None:
        yield Rule("Linear", "class", base, "quantization_config.bits")
    for i, name in enumerate(names(config, key)):
        yield Rule(name, "substring", base, f"quantization_config.{key}[{i}]")


def _fit(form: Format, name: str) -> Format:
    if set(form.transforms) - {"permute"}:
        raise refuse(name, f"the transforms {', '.join(form.transforms)}", "it holds an order of the columns, no more")
    fitted = fit_int(name, form, BITS)
    if fitted.weight.element.bits not in WIDTHS[name]:
        raise refuse(name, f"{form.weight.element.name} codes", "its readers know 2, 3, 4 and 8 bits; gptq-p holds it")
    return fitted


def _write(q: Quantized, name: str) -> Tensors:
    return write_gptq(q, name, LESS[name], planar=name == "gptq-p")


def _config(formats: Mapping[str, Format], dense: list[str], kv: QuantSpec | None, name: str) -> dict[str, Config]:
    settings = {module: setting(form) for module, form in formats.items()}
    base = _most_common(list(settings.values()))
    layout = name.replace("-", "_")
    whole: Config = {"quant_method": "gptq", "checkpoint_format": layout, "format": layout, "pack_dtype": "int32"}
    whole |= base | {"desc_act": any(form.transforms for form in formats.values())}
    whole["lm_head"] = any(re.match(HEAD, module) for module in settings)
    whole["dynamic"] = _differing(settings | dict.fromkeys(dense), base)
    return {"quantization_config": whole, "quantize_config.json": whole}


def _most_common(settings: list[Config]) -> Config:
    if not settings:
        raise refuse("gptq", "a checkpoint without quantized modules", "--to dense writes one")
    return dict(Counter(tuple(s.items()) for s in settings).most_common(1)[0][0])


def _differing(settings: Mapping[str, Config | None], base: Config) -> Config | None:
    """The `dynamic` section: one rule for all modules of a last name where they agree, else one each."""
    alike: dict[str, list[str]] = {}
    for module in settings:
        alike.setdefault(module.rpartition(".")[2], []).append(module)
    rules: Config = {}
    for last, modules in alike.items():
        agree = all(settings[module] == settings[modules[0]] for module in modules)
        for module in modules[:1] if agree else modules:
            pattern = rf"(.*\.)?{re.escape(last)}$" if agree else f"{re.escape(module)}$"
            own = settings[module]
            if own is None:
                rules[f"-:{pattern}"] = {}
            elif own != base:
                rules[f"+:{pattern}"] = {key: value for key, value in own.items() if value != base[key]}
    return rules or None


def _codec(name: str, summary: str) -> Codec:
    read = partial(read_gptq, less=LESS[name], planar=name == "gptq-p")
    return Codec(
        name, partial(_claims, name=name), _plan, GPTQ_ENDINGS, (".qweight", ".qzeros"), by_header(read, ".g_idx"),
        read, partial(_fit, name=name), partial(_write, name=name), partial(_config, name=name), explicit=False,
        summary=summary,
    )  # fmt: skip


CODECS = (
    _codec("gptq", "GPTQ v1: each zero stored less one"),
    _codec("gptq-v2", "GPTQ v2: zeros stored as they are"),
    _codec("gptq-p", "GPTQ in bit planes, 2 to 8 bits"),
)
