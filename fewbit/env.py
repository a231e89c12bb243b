"""The only reader of environment variables."""

import os
from pathlib import Path


def offline() -> bool:
    """No network unless the user left the hub reachable."""
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def cache() -> Path:
    """Where downloads of ours go."""
    base = os.environ.get("FEWBIT_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fewbit"
    return Path(base)


FAKEQUANT = {  # variables of ModelOpt's example for vLLM, early and late -> flags of ours
    "QUANT_CFG": "--fakequant", "RECIPE_PATH": "--fakequant", "KV_QUANT_CFG": "--kv-fakequant",
    "AMAX_FILE_PATH": "--amax-file", "QUANT_FILE_PATH": "--amax-file", "MODELOPT_STATE_PATH": "--amax-file",
    "QUANT_DATASET": "--calib-dataset", "QUANT_CALIB_SIZE": "--calib-size", "CALIB_BATCH_SIZE": "--calib-batch-size",
    "KV_ATTN_MATH": "--kv-attn-math",
}  # fmt: skip


def fakequant() -> dict[str, str]:
    """Those that are set, by name. "None" is how that example spells that one is not."""
    found = {name: os.environ.get(name, "").strip() for name in FAKEQUANT}
    return {name: value for name, value in found.items() if value and value != "None"}


def compiler() -> str:
    """The C++ compiler that the user wants, "" for the one that is there."""
    return os.environ.get("CXX", "")


def quant_config() -> str:
    """INC's JSON config, "" for none."""
    return os.environ.get("QUANT_CONFIG", "")


def vllm_waits() -> dict[str, str]:
    """Variables of vLLM on Gaudi that nothing here waits by, where they are set."""
    names = ("VLLM_SKIP_WARMUP", "VLLM_ENGINE_ITERATION_TIMEOUT_S", "VLLM_RPC_TIMEOUT")
    return {name: os.environ[name] for name in names if name in os.environ}


def triton_interpreted() -> bool:
    """Triton runs its kernels in Python, on any device: for tests."""
    return os.environ.get("TRITON_INTERPRET", "") == "1"


def test_checkpoints() -> list[Path]:
    """Folders of checkpoints that a user wants tested, separated as in PATH."""
    return [Path(part) for part in os.environ.get("FEWBIT_TEST_CHECKPOINTS", "").split(os.pathsep) if part]
