"""The only file that imports transformers: config, empty model, names, tokenizer; our attention and experts in it."""

import contextlib
import copy
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, revert_weight_conversion
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import AttentionInterface, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.models.placement import Placement, Rules
from fewbit.modules import attention, experts

OURS = attention.NAME
VERSION = transformers.__version__

AttentionInterface.register(OURS, attention.forward)
AttentionMaskInterface.register(OURS, eager_mask)
ALL_EXPERTS_FUNCTIONS.register(OURS, experts.forward)


def read_config(source: Mapping[str, Any], code: Path | None = None) -> PreTrainedConfig:
    """A config.json -> the config object.

    code: a folder that is trusted; nothing is imported from it but a type that transformers does not have.
    """
    raw = {key: numbers(value) for key, value in source.items()
           if key not in ("quantization_config", "compression_config")}  # fmt: skip
    model_type, named = raw.get("model_type"), raw.get("auto_map")
    if model_type not in CONFIG_MAPPING:
        if code is None or not isinstance(named, Mapping) or "AutoConfig" not in named:
            raise UnsupportedError(f"config.json: model_type {model_type!r} is not known", _unknown(raw, code))
        cls = get_class_from_dynamic_module(named["AutoConfig"], str(code), local_files_only=True)
        config = cls.from_dict(raw)
        config.name_or_path = str(code)  # where model_class finds the rest
        return config
    raw.pop("auto_map", None)
    try:
        return CONFIG_MAPPING[model_type].from_dict(raw)
    except Exception as error:  # config classes validate in ways of their own
        raise CheckpointError(f"config.json: not a config of {model_type}: {error}") from error


def numbers(value: Any) -> Any:
    """With {"__float__": "Infinity"}, as transformers writes what JSON has no number for, as that number."""
    if isinstance(value, list):
        return [numbers(one) for one in value]
    if not isinstance(value, Mapping):
        return value
    if list(value) == ["__float__"] and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
        return float(value["__float__"])
    return {key: numbers(one) for key, one in value.items()}


def _unknown(raw: Mapping[str, Any], code: Path | None) -> list[str]:
    known = f"transformers {VERSION} knows {len(CONFIG_MAPPING.keys())} types"
    near = [f"{known}; architectures says {raw.get('architectures')}"]
    if "auto_map" in raw:
        trust = "trust_remote_code=True would import and run it (--trust-remote-code)"
        would = trust if code is None else "none of it is an AutoConfig"
        near.append(f"auto_map names code in the checkpoint; {would}")
    return near


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The causal language model of a config."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if code := getattr(config, "auto_map", {}).get("AutoModelForCausalLM"):  # read_config keeps it where it is trusted
        return get_class_from_dynamic_module(code, config.name_or_path, local_files_only=True)
    for name in config.architectures or []:
        cls = getattr(transformers, name, None)
        if isinstance(cls, type) and issubclass(cls, PreTrainedModel) and cls.can_generate():
            return cls
    asked = f"model_type {config.model_type!r}, architectures {config.architectures}"
    raise UnsupportedError(
        f"config.json: {asked}: no causal language model", ["encoders and classifiers do not generate"]
    )


def causal_types() -> list[str]:
    """Every model_type with a causal language model."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def default_config(model_type: str) -> PreTrainedConfig:
    return CONFIG_MAPPING[model_type]()


def build(config: PreTrainedConfig, dtype: torch.dtype, attention: str = OURS) -> PreTrainedModel:
    """The model without weights: parameters on the meta device, buffers that no checkpoint stores computed."""
    cls, config = prepared(config, attention)
    with contextlib.ExitStack() as stack:
        for context in cls.get_init_context(dtype, False, False, False):
            stack.enter_context(context)
        model = cls(config)
    _keep_in_float32(model, dtype)
    _compute_buffers(model)
    return model.eval()


def prepared(config: PreTrainedConfig, attention: str) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The class, and a copy of the config (its text part where the class takes that) that routes to our functions."""
    cls = model_class(config)
    if cls.config_class is config.sub_configs.get("text_config"):
        config = config.get_text_config()
    config = copy.deepcopy(config)
    config._attn_implementation = attention
    config._experts_implementation = "eager" if attention == "eager" else OURS
    return cls, config


def _keep_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give the parameters that the class wants in float32 that dtype."""
    plan = {p.replace("*", ".*"): d for p, d in model._get_dtype_plan(dtype).items()}
    for name, parameter in model.named_parameters():
        for pattern, wanted in plan.items():
            if re.search(pattern, name):
                parameter.data = parameter.data.to(wanted)


def _compute_buffers(model: PreTrainedModel) -> None:
    """Fill the non-persistent buffers through the model's own initialization; parameters are meta and stay so."""
    found = list(_computed(model))
    for _, module, name in found:
        old = module._buffers[name]
        new = torch.full_like(old, torch.nan if old.is_floating_point() else 0, device="cpu")
        module._buffers[name] = new
    model.initialize_weights()
    unfilled = [p for p, m, n in found if m._buffers[n].is_floating_point() and m._buffers[n].isnan().any()]
    if unfilled:
        kind = type(model).__name__
        raise UnsupportedError(f"{kind} does not say how to compute its buffers", [f"{path}" for path in unfilled])


def _computed(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    for path, module in model.named_modules():
        for name in module._non_persistent_buffers_set:
            if module._buffers.get(name) is not None and module._buffers[name].is_meta:
                yield f"{path}.{name}", module, name


def rules(model: PreTrainedModel) -> Rules:
    """What the model's class says about names on disk."""
    mapping = get_model_conversion_mapping(model)
    return Rules(
        [m for m in mapping if isinstance(m, WeightRenaming)],
        [m for m in mapping if isinstance(m, WeightConverter)],
        {name: tuple(t.shape) for name, t in model.state_dict().items()},
        model.base_model_prefix,
        lambda converter, target, sources: _convert(model, converter, target, sources),
    )


def placements(model: PreTrainedModel, names: Iterable[str]) -> dict[str, Placement | None]:
    """Tensors on disk -> their places; a quantized module is asked for as `<module>.weight`."""
    return rules(model).place(names)


def _convert(
    model: PreTrainedModel, converter: Any, target: str, sources: dict[str, list[Tensor]]
) -> dict[str, Tensor]:
    """Run a converter's operations on gathered tensors (source pattern -> tensors in order)."""
    converter = copy.deepcopy(converter)
    for pattern, tensors in sources.items():
        for tensor in tensors:
            converter.add_tensor(target, target, pattern, tensor)
    out = converter.convert(target, model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in out.items()}


def ties(model: PreTrainedModel) -> dict[str, str]:
    """Parameter -> the parameter it shares memory with."""
    return dict(model.all_tied_weights_keys)


def optional(model: PreTrainedModel) -> tuple[re.Pattern[str] | None, re.Pattern[str] | None]:
    """Parameters that may be missing, and disk names that may be left over, as the class says."""
    surplus = {*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"}
    return _any(model._keys_to_ignore_on_load_missing or ()), _any(surplus)


def _any(patterns: Iterable[str]) -> re.Pattern[str] | None:
    joined = "|".join(f"({p})" for p in patterns)
    return re.compile(joined) if joined else None


def disk_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state dict as transformers would save it: conversions reverted, tied parameters once."""
    state = {k: v for k, v in model.state_dict().items() if k not in model.all_tied_weights_keys}
    return revert_weight_conversion(model, state)


def random_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A model with weights of transformers' own choosing, on transformers' own paths, in float32."""
    cls, config = prepared(config, "eager")
    return cls._from_config(config, dtype=torch.float32).eval()


def layer_overrides(config: PreTrainedConfig) -> dict[int, dict[str, Any]]:
    """What single layers change of a config that is not the same for all."""
    spec = vars(config).get("_heterogeneity_spec")
    return copy.deepcopy(spec.per_layer_overrides) if spec is not None else {}


def attention_of(model: PreTrainedModel) -> str:
    return str(model.config._attn_implementation)


def input_embedding(model: PreTrainedModel) -> nn.Module | None:
    return model.get_input_embeddings()


def output_head(model: PreTrainedModel) -> nn.Module | None:
    return model.get_output_embeddings()


def tokenizer(source: str | Path | Mapping[str, bytes], trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder, or of files in memory (a GGUF's, rebuilt).

    Where transformers is not told whether to trust, it asks at the terminal, and waits. Code is imported only where
    it is trusted and there is no tokenizer without it.
    """
    if not isinstance(source, Mapping):
        try:
            return AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        except ValueError:
            if not trust_remote_code:
                raise
        return AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, content in source.items():
            (Path(folder) / name).write_bytes(content)
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def generation_config(path: str | Path) -> GenerationConfig | None:
    """The folder's generation_config.json, if it has one."""
    file = Path(path) / "generation_config.json"
    return GenerationConfig.from_pretrained(path, local_files_only=True) if file.is_file() else None


def register_attention(name: str, function: Any) -> None:
    """Let models route their attention to a function, with the mask of the eager path."""
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, eager_mask)


def register_unmasked_attention(name: str, function: Any) -> None:
    """The same without a mask: transformers makes none for a name that it has no mask function of."""
    AttentionInterface.register(name, function)


def pretrained(path: str | Path, **options: Any) -> PreTrainedModel:
    """transformers' own model of a folder (or of a name on its hub), weights loaded as transformers loads them."""
    return transformers.AutoModelForCausalLM.from_pretrained(path, **options)
