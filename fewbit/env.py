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
