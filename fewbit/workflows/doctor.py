"""doctor: what this machine can do. Devices, what is installed, which formats run fast, slow or emulated, and why.

fast: a kernel made for the format runs it. slow: the reference decodes the weight at each call. emulated: inputs are
rounded as the format says, and multiplied in a wider type because the device has no multiplier for theirs.
"""

import os
import platform
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

import torch

import fewbit
from fewbit.kernels.registry import REFERENCE
from fewbit.kernels.select import select
from fewbit.quant.formats import FORMATS
from fewbit.quant.spec import Format

Report = dict[str, Any]
FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16")
SPEEDS = ("fast", "slow", "emulated")


@dataclass(frozen=True, slots=True)
class Multiplier:
    """Which hardware multiplies elements of some types as they are."""

    elements: tuple[str, ...]
    what: str
    capability: tuple[int, int]  # least CUDA compute capability
    flags: tuple[str, ...] = ()  # of a CPU; any one is enough


MULTIPLIERS = (
    Multiplier(("int8",), "INT8", (7, 5), ("avx512_vnni", "avx_vnni", "amx_int8")),
    Multiplier(("e4m3", "e5m2"), "FP8", (8, 9)),
    Multiplier(("e2m1",), "FP4", (10, 0)),
    Multiplier(("e3m2", "e2m3"), "FP6", (10, 0)),
)

GROUPS = ("fewbit.formats", "fewbit.codecs", "fewbit.algos", "fewbit.kernels")  # where other packages add to this one

# package -> (the extra of ours that brings it, what it is for)
PACKAGES = {
    "torch": ("", "tensors"),
    "transformers": ("", "model definitions, tokenizers"),
    "tokenizers": ("", "tokenizers"),
    "safetensors": ("", "checkpoints"),
    "numpy": ("", "arrays"),
    "jinja2": ("", "chat templates"),
    "typer": ("", "the command line"),
    "rich": ("", "tables and progress bars"),
    "triton": ("", "kernels on GPUs; comes with torch for CUDA"),
    "humming-kernels": ("gpu", "fast quantized linears on NVIDIA GPUs"),
    "auto-round-lib": ("", "fast quantized linears on CPUs; this version does not use it yet"),
    "gguf": ("test", "checks our GGUF against gguf-py"),
    "compressed-tensors": ("test", "checks our numbers against theirs"),
    "ml-dtypes": ("test", "checks our elements against theirs"),
    "hypothesis": ("test", "property tests"),
    "pytest": ("test", "tests"),
}


def doctor() -> Report:
    """-> plain data, ready for JSON."""
    cpu = _cpu()
    devices = [cpu, *_gpus()]
    return {
        "fewbit": fewbit.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": devices,
        "packages": [_package(name, extra, use) for name, (extra, use) in PACKAGES.items()],
        "extensions": [
            {"group": group, "name": point.name, "value": point.value}
            for group in GROUPS
            for point in entry_points(group=group)
        ],
        "formats": [row for device in devices for row in _formats(device)],
    }


def render(report: Report) -> str:
    """The report as plain text."""
    lines = [f"fewbit {report['fewbit']}, Python {report['python']}, {report['platform']}", "", "Devices"]
    lines += [f"  {_device_line(device)}" for device in report["devices"]]
    lines += ["", "Installed"]
    lines += [f"  {p['name']:20} {p['version'] or 'missing':12} {p['use']}{_hint(p)}" for p in report["packages"]]
    if report["extensions"]:
        lines += ["", "Added by other packages"]
        lines += [f"  {e['group'].removeprefix('fewbit.'):8} {e['name']:20} {e['value']}" for e in report["extensions"]]
    for device in report["devices"]:
        lines += ["", f"Formats on {device['device']}"]
        lines += _format_lines([row for row in report["formats"] if row["device"] == device["device"]])
    return "\n".join(lines)


def _cpu() -> Report:
    found = _proc("/proc/cpuinfo")
    flags = set(found.get("flags", found.get("Features", "")).split())
    return {
        "device": "cpu",
        "name": found.get("model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory(),
        "flags": [flag for flag in FLAGS if flag in flags],
        "capability": None,
    }


def _proc(path: str) -> dict[str, str]:
    """`key : value` lines of a file of the kernel, the first of each; empty where there is no such file."""
    found: dict[str, str] = {}
    try:
        text = Path(path).read_text()
    except OSError:
        return found
    for line in text.splitlines():
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    return found


def _memory() -> int:
    """What this process may use: the machine's, or less where a container says so."""
    kib = _proc("/proc/meminfo").get("MemTotal", "").split()
    total = int(kib[0]) * 1024 if kib else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(limit).read_text().strip()
        except OSError:
            continue
        total = min(total, int(text)) if text.isdigit() else total
    return total


def _gpus() -> list[Report]:
    if not torch.cuda.is_available():
        return []
    found = []
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        found.append(
            {
                "device": f"cuda:{i}",
                "name": about.name,
                "cores": about.multi_processor_count,
                "memory_bytes": about.total_memory,
                "flags": [],
                "capability": [about.major, about.minor],
            }
        )
    return found


def _package(name: str, extra: str, use: str) -> Report:
    try:
        found: str | None = version(name)
    except PackageNotFoundError:
        found = None
    return {"name": name, "version": found, "extra": extra, "use": use}


def _hint(package: Report) -> str:
    if package["version"]:
        return ""
    wanted = f"'fewbit[{package['extra']}]'" if package["extra"] else package["name"]
    return f" (pip install {wanted})"


def _formats(device: Report) -> list[Report]:
    return [{"device": device["device"], "format": name, **_speed(row, device)} for name, row in FORMATS.items()]


def _speed(row: Format, device: Report) -> Report:
    """Which kernel runs it here, how fast that is, and why it is no faster."""
    target = torch.device(device["device"])
    kernel, refused = select("linear", row, target, torch.float32 if target.type == "cpu" else torch.bfloat16)
    speed, why = "fast", kernel.note
    if kernel.name == REFERENCE:
        speed, why = "slow", "no other kernel takes it; the reference decodes the weight at each call"
        if row.act and (lack := _lack(row.act.element.name, device)):
            speed, why = "emulated", f"inputs are rounded to {row.act.element.name}, then multiplied as floats: {lack}"
    reasons = [f"{name}: {reason}" for name, reason in refused]
    return {"speed": speed, "kernel": kernel.name, "why": why, "refused": reasons}


def _lack(element: str, device: Report) -> str | None:
    """None where the device multiplies inputs of this element as they are, else what it lacks."""
    multiplier = next((m for m in MULTIPLIERS if element in m.elements), None)
    if multiplier is None:
        return f"no hardware multiplies {element}"
    if device["capability"]:
        need, found = multiplier.capability, tuple(device["capability"])
        return (
            None if found >= need else f"{multiplier.what} needs compute capability {_dots(need)}, found {_dots(found)}"
        )
    if set(multiplier.flags) & set(device["flags"]):
        return None
    return (
        f"{multiplier.what} needs {' or '.join(multiplier.flags)}"
        if multiplier.flags
        else f"no CPU has {multiplier.what}"
    )


def _dots(capability: Sequence[int]) -> str:
    return ".".join(map(str, capability))


def _device_line(device: Report) -> str:
    about = f"{device['device']}: {device['name']}, {device['memory_bytes'] / 2**30:.0f} GiB, {device['cores']} cores"
    if device["capability"]:
        return f"{about}, compute capability {_dots(device['capability'])}"
    return f"{about}, {' '.join(device['flags']) or 'none of the vector extensions that kernels use'}"


def _format_lines(rows: list[Report]) -> list[str]:
    """Formats of one speed, kernel and reason together."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for row in sorted(rows, key=lambda row: SPEEDS.index(row["speed"])):
        groups.setdefault((row["speed"], row["kernel"], row["why"]), []).append(row["format"])
    lines = []
    for (speed, kernel, why), names in groups.items():
        lines.append(f"  {speed} ({kernel}), {len(names)} format{'s' * (len(names) > 1)}: {why}")
        lines.append(textwrap.fill(", ".join(names), 100, initial_indent=" " * 4, subsequent_indent=" " * 4))
    return lines
