"""ModelOpt's presets by name, as data, in the list form its configs have since 2026.

They are the same objects at each access, as there: who changes one without copying it changes it for everyone.
"""

from typing import Any

Config = dict[str, Any]

OFF = (
    "*block_sparse_moe.gate*", "*linear_attn.conv1d*", "*self_attention.conv1d*", "*linear_attn.in_proj_a*",
    "*linear_attn.in_proj_b*", "*lm_head*", "*mixer.conv1d*", "*mlp.gate.*", "*mlp.shared_expert_gate.*",
    "*output_layer*", "*proj_out.*", "*router*", "mtp.*", "output.*", "*embed_vision*", "*vision_tower*", "*visual*",
    "*vision_model*", "*multi_modal_projector*",
)  # fmt: skip
OFF_CLASSES = ("nn.BatchNorm1d", "nn.BatchNorm2d", "nn.BatchNorm3d", "nn.LeakyReLU", "nn.Embedding")
MAMBA_OFF = (
    "*fc1_latent_proj*", "*fc2_latent_proj*", "*q_proj*", "*k_proj*", "*v_proj*", "*o_proj*",
    "*self_attention.linear_qkv*", "*self_attention.linear_proj*",
)  # fmt: skip
MIXER_OFF = ("*mixer.in_proj*", "*mixer.out_proj*")
# how the same layers are called in other models: of these patterns some hit nothing in every model
MLP = ("*mlp*", "*.mixer.up_proj.", "*.mixer.down_proj.", "*block_sparse_moe*", "*.experts.*")
ELSEWHERE = ("*.mixer.", "*block_sparse_moe*", "*.experts.*", "transformer_blocks*", "*p_bmm_quantizer")
W, A, KV = "weight_quantizer", "input_quantizer", "*[kv]_bmm_quantizer"

E4M3: Config = {"num_bits": (4, 3), "axis": None}
FP8_ROWS: Config = {"num_bits": (4, 3), "axis": 0}
FP8_TOKENS: Config = {"num_bits": (4, 3), "axis": None, "type": "dynamic", "block_sizes": {-1: None}}
FP8_BLOCKS: Config = {"num_bits": (4, 3), "axis": None, "block_sizes": {-1: 128, -2: 128}}
INT8: Config = {"num_bits": 8, "axis": None}
INT8_ROWS: Config = {"num_bits": 8, "axis": 0}
INT4: Config = {"num_bits": 4, "block_sizes": {-1: 128, "type": "static"}}
NVFP4: Config = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
NVFP4_32: Config = {"num_bits": (2, 1), "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (4, 3)}}
NVFP4_STATIC: Config = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "static", "scale_bits": (4, 3)}}
FOUR_OVER_SIX: Config = {
    "num_bits": (2, 1), "block_sizes": {-1: 16, "type": "static", "scale_bits": (4, 3), "four_over_six": 1},
}  # fmt: skip
BIAS: Config = {"bias": {-2: None, -4: None, "type": "static"}}


def _mx(num_bits: Any) -> Config:
    return {"num_bits": num_bits, "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}}


def _rule(pattern: str, cfg: Any) -> Config:
    return {"quantizer_name": pattern, "cfg": cfg}


def _off(pattern: str) -> Config:
    return {"quantizer_name": pattern, "enable": False}


def _preset(algorithm: Any, *rules: Config, off: tuple[str, ...] = ()) -> Config:
    """Everything off, these on, and the layers that are never quantized off again."""
    classes = ({"quantizer_name": "*", "parent_class": kind, "enable": False} for kind in OFF_CLASSES)
    return {"quant_cfg": [_off("*"), *rules, *map(_off, OFF), *classes, *map(_off, off)], "algorithm": algorithm}


def _both(weight: Any, act: Any = None, where: tuple[str, ...] = ("*",)) -> list[Config]:
    """Weights and inputs of the modules of some patterns; inputs that stay as they are are switched off by name."""
    rules = []
    for pattern in where:
        rules.append(_rule(pattern + W, weight))
        if act is not None:
            rules.append(_rule(pattern + A, act))
    return rules if act is not None or where != ("*",) else [*rules, _off("*" + A)]


def _cache(*cfgs: Config) -> Config:
    return {"quant_cfg": [_rule(KV, cfg) for cfg in cfgs], "algorithm": None}


_AWQ = {"method": "awq_lite", "alpha_step": 0.1}
_FULL = {"method": "awq_full", "alpha_step": 0.1}
_SWEEP = {"method": "mse", "fp8_scale_sweep": True}
_HESSIAN = {"method": "local_hessian", "fp8_scale_sweep": True}
_STEPS = {
    "method": "mse", "fp8_scale_sweep": False, "start_multiplier": 1.0, "stop_multiplier": 1.5, "step_size": 0.5,
}  # fmt: skip
_MHA = [_rule("*[qkv]_bmm_quantizer", E4M3), _rule("*softmax_quantizer", E4M3), _rule("*p_bmm_quantizer", E4M3),
        _rule("transformer_blocks*bmm2_output_quantizer", E4M3)]  # fmt: skip
_ROTATED = [
    _off("*q_bmm_quantizer"), _rule("*k_bmm_quantizer", NVFP4 | {"rotate": True}), _rule("*v_bmm_quantizer", NVFP4),
]  # fmt: skip

PRESETS: dict[str, Config] = {
    "INT8_DEFAULT_CFG": _preset("max", *_both(INT8_ROWS, INT8)),
    "INT8_SMOOTHQUANT_CFG": _preset("smoothquant", *_both(INT8_ROWS, INT8)),
    "INT8_WEIGHT_ONLY_CFG": _preset("max", *_both(INT8_ROWS)),
    "FP8_DEFAULT_CFG": _preset("max", *_both(E4M3, E4M3)),
    "FP8_PER_CHANNEL_PER_TOKEN_CFG": _preset("max", *_both(FP8_ROWS, FP8_TOKENS)),
    "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG": _preset("max", *_both(FP8_BLOCKS)),
    "INT4_BLOCKWISE_WEIGHT_ONLY_CFG": _preset("max", *_both(INT4)),
    "INT4_AWQ_CFG": _preset(_AWQ, *_both(INT4)),
    "W4A8_AWQ_BETA_CFG": _preset("awq_lite", *_both([INT4, E4M3], E4M3)),
    "NVFP4_DEFAULT_CFG": _preset("max", *_both(NVFP4, NVFP4)),
    "NVFP4_AWQ_LITE_CFG": _preset("awq_lite", *_both(NVFP4, NVFP4)),
    "NVFP4_AWQ_CLIP_CFG": _preset({"method": "awq_clip"}, *_both(NVFP4, NVFP4)),
    "NVFP4_AWQ_FULL_CFG": _preset(_FULL, *_both(NVFP4, NVFP4)),
    "NVFP4_SVDQUANT_DEFAULT_CFG": _preset({"method": "svdquant", "lowrank": 32}, *_both(NVFP4, NVFP4)),
    "NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG": _preset(_SWEEP, *_both(NVFP4_STATIC, NVFP4)),
    "NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG": _preset(_HESSIAN, *_both(NVFP4_STATIC, NVFP4)),
    "NVFP4_FOUR_OVER_SIX_CFG": _preset(_STEPS, *_both(FOUR_OVER_SIX, NVFP4)),
    "W4A16_NVFP4_CFG": _preset("max", *_both(NVFP4)),
    "W4A8_NVFP4_FP8_CFG": _preset("max", *_both(NVFP4_32, E4M3)),
    "NVFP4_MLP_WEIGHT_ONLY_CFG": _preset("max", *_both(NVFP4_32, None, ("*mlp*", "*block_sparse_moe*"))),
    "NVFP4_MLP_ONLY_CFG": _preset("max", *_both(NVFP4, NVFP4, MLP)),
    "NVFP4_OMLP_ONLY_CFG": _preset("max", *_both(NVFP4, NVFP4, ("*o_proj*", *MLP))),
    "NVFP4_EXPERTS_ONLY_CFG": _preset("max", *_both(NVFP4, NVFP4, ("*block_sparse_moe*", "*.experts.*"))),
    "MXFP8_DEFAULT_CFG": _preset(None, *_both(_mx((4, 3)), _mx((4, 3)))),
    "MXFP6_DEFAULT_CFG": _preset(None, *_both(_mx((3, 2)), _mx((3, 2)))),
    "MXFP4_DEFAULT_CFG": _preset(None, *_both(_mx((2, 1)), _mx((2, 1)))),
    "MXINT8_DEFAULT_CFG": _preset(None, *_both(_mx(8), _mx(8))),
    "W4A8_MXFP4_FP8_CFG": _preset(None, *_both(_mx((2, 1)), E4M3)),
    "MXFP4_MLP_WEIGHT_ONLY_CFG": _preset(None, *_both(_mx((2, 1)), None, ("*mlp*", "*block_sparse_moe*"))),
    "MAMBA_MOE_FP8_AGGRESSIVE_CFG": _preset("max", *_both(E4M3, E4M3), off=MAMBA_OFF),
    "MAMBA_MOE_FP8_CONSERVATIVE_CFG": _preset("max", *_both(E4M3, E4M3), off=MAMBA_OFF + MIXER_OFF),
    "MAMBA_MOE_NVFP4_AGGRESSIVE_CFG": _preset("max", *_both(NVFP4, NVFP4), off=MAMBA_OFF),
    "MAMBA_MOE_NVFP4_CONSERVATIVE_CFG": _preset("max", *_both(NVFP4, NVFP4), off=MAMBA_OFF + MIXER_OFF),
    "FP8_KV_CFG": _cache(E4M3),
    "FP8_AFFINE_KV_CFG": _cache(E4M3 | BIAS),
    "NVFP4_KV_CFG": _cache(NVFP4),
    "NVFP4_AFFINE_KV_CFG": _cache(NVFP4 | BIAS),
    "NVFP4_KV_ROTATE_CFG": {"quant_cfg": _ROTATED, "algorithm": "max"},
    "NVFP4_FP8_MHA_CONFIG": {"quant_cfg": [_off("*"), *_both(NVFP4, NVFP4), *_MHA], "algorithm": "max"},
}
