"""CUDA C++ beside the Python: compiled by the nvrtc that torch brought, for this device, and kept in the cache."""

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fewbit.errors import UnsupportedError
from fewbit.kernels.compiled import kept

CLUSTER = 4  # the driver's number of a launch attribute: how many blocks are a cluster
EARLY = 6  # of another: to begin before the kernel before it ends
SHARED = 8  # of an attribute of functions: bytes of shared memory that a launch may ask for


class Attribute(ctypes.Structure):
    """CUlaunchAttribute: a number, and a value of 64 bytes."""

    _fields_ = (("id", ctypes.c_int), ("gap", ctypes.c_int), ("value", ctypes.c_uint * 16))


class Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(Attribute)), ("count", ctypes.c_uint),
    )  # fmt: skip


class Function:
    """A kernel on one device."""

    def __init__(self, handle: ctypes.c_void_p, threads: int, shared: int, cluster: int):
        self.handle, self.threads, self.shared, self.cluster = handle, threads, shared, cluster
        self.attributes = (Attribute * 2)(Attribute(EARLY, 0, (1,)), Attribute(CLUSTER, 0, (cluster, 1, 1)))

    def __call__(self, blocks: int, stream: int, arguments: Sequence[Any]) -> None:
        """arguments: values of ctypes, in the kernel's order."""
        grid, block, count = (blocks, 1, 1), (self.threads, 1, 1), 2 if self.cluster > 1 else 1
        config = Config(grid, block, self.shared, stream, self.attributes, count)
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(each) for each in arguments))
        checked(driver().cuLaunchKernelEx(ctypes.byref(config), self.handle, pointers, None))


@cache
def function(
    file: str, name: str, device: torch.device, defines: tuple[str, ...], threads: int, shared: int, cluster: int = 1
) -> Function:
    """kernels/FILE's kernel of that name, compiled with definitions ("A=1"). shared: bytes that a block asks for."""
    major, minor = torch.cuda.get_device_capability(device)
    image = _built(Path(__file__).with_name(file), f"sm_{major}{minor}", defines)
    context, module, handle = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
    checked(driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), torch.device(device).index or 0))  # torch's own
    checked(driver().cuCtxSetCurrent(context))
    checked(driver().cuModuleLoadData(ctypes.byref(module), image))
    checked(driver().cuModuleGetFunction(ctypes.byref(handle), module, name.encode()))
    checked(driver().cuFuncSetAttribute(handle, SHARED, shared))
    return Function(handle, threads, shared, cluster)


@cache
def driver() -> ctypes.CDLL:
    return _library("libcuda.so.1", ())


@cache
def nvrtc() -> ctypes.CDLL:
    name = f"libnvrtc.so.{(torch.version.cuda or '0').partition('.')[0]}"
    beside = Path(torch.__file__).parents[1] / "nvidia"
    return _library(name, sorted(beside.glob(f"*/lib/{name}")))


def _library(name: str, places: Sequence[Path]) -> ctypes.CDLL:
    for place in (*places, name):
        try:
            return ctypes.CDLL(str(place))
        except OSError:
            continue
    raise UnsupportedError(f"{name} was not found, neither beside torch nor by the system")


def _built(source: Path, target: str, defines: tuple[str, ...]) -> bytes:
    """What the device runs; several processes may make it at once."""
    version = (ctypes.c_int * 2)()
    _done(nvrtc().nvrtcVersion(version, ctypes.byref(version, 4)), None)
    text = source.read_bytes()
    options = (f"--gpu-architecture={target}", "--std=c++17", *(f"-D{each}" for each in defines))

    def make(place: Path) -> Path:
        made = place / "made"
        made.write_bytes(_compiled(source.name, text, options))
        return made

    made_of = (text, " ".join(options).encode(), f"{version[0]}.{version[1]}".encode())
    return kept(source.stem, "cubin", made_of, make).read_bytes()


def _compiled(name: str, text: bytes, options: Sequence[str]) -> bytes:
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    _done(nvrtc().nvrtcCreateProgram(ctypes.byref(program), text, name.encode(), 0, None, None), None)
    try:
        _done(nvrtc().nvrtcCompileProgram(program, len(options), given), program)
        _done(nvrtc().nvrtcGetCUBINSize(program, ctypes.byref(size)), program)
        image = ctypes.create_string_buffer(size.value)
        _done(nvrtc().nvrtcGetCUBIN(program, image), program)
        return image.raw
    finally:
        nvrtc().nvrtcDestroyProgram(ctypes.byref(program))


def _done(status: int, program: ctypes.c_void_p | None) -> None:
    if not status:
        return
    said = b""
    if program is not None:
        size = ctypes.c_size_t()
        nvrtc().nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc().nvrtcGetProgramLog(program, log)
        said = log.value
    raise UnsupportedError(f"nvrtc failed ({status}): {said.decode(errors='replace').strip()[:800]}")


def checked(status: int) -> None:
    if status:
        name = ctypes.c_char_p()
        driver().cuGetErrorName(status, ctypes.byref(name))
        raise UnsupportedError(f"the driver refused: {(name.value or b'?').decode()} ({status})")
