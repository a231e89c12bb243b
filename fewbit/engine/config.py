"""EngineConfig: what a user asks of an engine, by vLLM's names; "auto" becomes Limits once the model is there."""

from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, Self

from fewbit.errors import RequestError

FUSION = ("off", "auto", "strict")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    model: str
    tokenizer: str | None = None
    served_model_name: tuple[str, ...] = ()
    device: str = "auto"
    dtype: str = "auto"
    quantization: str | None = None  # the checkpoint's dialect, a format to quantize to on arrival, or inc
    quant_config: str | None = None  # INC's JSON; None: the one that QUANT_CONFIG names
    weights_load_device: str | None = None  # where float weights are when they are quantized: cpu
    kernels: str = "auto"
    activations: str = "hardware"
    strict_activations: bool = False  # an error where the device lacks what the checkpoint rounds activations to
    emulate_activations: bool = False  # rounded in software there
    fusion: str = "auto"  # fused modules: off, where the twin agrees, or strict: an error where anything is refused
    emulation: str | None = None  # a file of models.emulation: how a float model is rounded as it is served
    kv_cache_dtype: str = "auto"
    kv_attn_math: str | None = None  # "fp8": attention multiplies e4m3, cast without scales
    kv_scales: str | None = None  # a file of scales that fewbit calibrate measured
    kv_scale: float | None = None  # one number for every layer, instead of what the checkpoint holds
    kv_rotate: bool = False  # keys and values are turned by a Hadamard matrix before they are rounded
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    block_size: int = 16  # tokens of a page
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    max_queue: int = 1024  # requests that wait; more are refused
    enable_prefix_caching: bool = True
    tensor_parallel_size: int = 1
    enforce_eager: bool = False  # no steps are recorded, on a GPU as graphs or on a CPU as tapes
    seed: int = 0
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name in ("block_size", "max_queue", "tensor_parallel_size"):
            self._at_least(name, 1)
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "kv_cache_memory_bytes"):
            if getattr(self, name) is not None:
                self._at_least(name, 1)
        if self.weights_load_device not in (None, "cpu"):
            raise RequestError(
                f"weights_load_device={self.weights_load_device!r}: cpu is the one value; weights are read and "
                "quantized there one at a time, and go to the device as they are then"
            )
        if self.fusion not in FUSION:
            raise RequestError(f"fusion={self.fusion!r}: known are {', '.join(FUSION)}")
        if self.kv_attn_math not in (None, "fp8"):
            raise RequestError(f"kv_attn_math={self.kv_attn_math!r}: known is fp8")
        if self.kv_attn_math and self.kv_cache_dtype not in ("fp8", "fp8_e4m3"):
            why = "attention would read keys and values that were never cast to what it is to multiply"
            raise RequestError(f"kv_attn_math=fp8 wants kv_cache_dtype=fp8, not {self.kv_cache_dtype}: {why}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise RequestError(f"gpu_memory_utilization={self.gpu_memory_utilization}: want a share, above 0 up to 1")

    def _at_least(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise RequestError(f"{name}={value!r}: want a whole number of at least {least}")

    @classmethod
    def of(cls, **asked: Any) -> Self:
        """From keywords; one that is not known is refused, with the nearest that is."""
        known = [f.name for f in fields(cls)]
        for name in asked:
            if name not in known:
                near = get_close_matches(name, known, 3)
                hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(known)}"
                raise RequestError(f"{name}={asked[name]!r}: no such option; {hint}")
        if asked.get("kv_scales") is not None:
            asked["kv_scales"] = str(asked["kv_scales"])  # ranks are told of it in words
        names = asked.get("served_model_name")
        if isinstance(names, str):
            asked["served_model_name"] = (names,)
        elif names is not None:
            asked["served_model_name"] = tuple(names)
        return cls(**{name: value for name, value in asked.items() if value is not None or name != "served_model_name"})

    @property
    def served_names(self) -> tuple[str, ...]:
        return self.served_model_name or (self.model,)
