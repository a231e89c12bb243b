"""C++ beside the Python: compiled for this very processor when first needed, kept in the cache by what it was made of.

All of it is called by `call`, so that who listens can call it again: see engine.tape. OpenMP is the one that torch
brought, so that there is one pool of threads: our part is linked against none and finds torch's in the process.
"""

import ctypes
import hashlib
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from pathlib import Path
from typing import Any

from fewbit import env

FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno")

_LEFT: ContextVar[bool] = ContextVar("left to torch", default=False)
LISTENER: ContextVar[Callable[[Callable[[], Any]], None] | None] = ContextVar("who hears of calls", default=None)


def call(function: Any, *arguments: Any) -> None:
    """A function of a library, told to the listener with all that it was given. What pointers point to is not held."""
    function(*arguments)
    if (listener := LISTENER.get()) is not None:
        listener(partial(function, *arguments))


@contextmanager
def left_to_torch() -> Iterator[None]:
    """Within, no library is asked for: what is proven of a model is not to depend on how a kernel adds up, and where
    weights go to a GPU nobody waits for a compiler. It is for kernels to ask `left` before they take anything."""
    token = _LEFT.set(True)
    try:
        yield
    finally:
        _LEFT.reset(token)


def left() -> bool:
    return _LEFT.get()


@cache
def library(name: str) -> ctypes.CDLL | str:
    """kernels/NAME.cpp as a library, or why there is none."""
    compiler = shutil.which(env.compiler()) or shutil.which("g++") or shutil.which("clang++")
    if platform.system() != "Linux" or compiler is None:
        return "needs Linux and a C++ compiler (g++ or clang++), found none: apt install g++"
    openmp = _openmp()
    if openmp is None:
        return "torch's own OpenMP library was not found beside it"
    source = Path(__file__).with_name(f"{name}.cpp")
    try:
        built = _built(source, compiler)
        ctypes.CDLL(str(openmp), ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(str(built))
    except subprocess.CalledProcessError as error:
        return f"{compiler} could not compile {source.name}: {error.stderr.strip()[:400]}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{source.name}: {error}"


def _openmp() -> Path | None:
    found = [Path(line.split()[-1]) for line in Path("/proc/self/maps").read_text().splitlines()
             if "libgomp" in line or "libiomp5" in line]  # fmt: skip
    return found[0] if found else None


def _built(source: Path, compiler: str) -> Path:
    """The library; several processes may make it at once."""
    files = (source, *sorted(source.parent.glob("*.h")))
    made_of = (" ".join(FLAGS), _run(compiler, "--version"), _processor())

    def make(place: Path) -> Path:
        made = [place / "made.o", place / "made.so"]
        _run(compiler, *FLAGS, "-c", str(source), "-o", str(made[0]))
        _run(compiler, "-shared", str(made[0]), "-o", str(made[1]))
        return made[1]

    return kept(source.stem, "so", (*(file.read_bytes() for file in files), *(part.encode() for part in made_of)), make)


def kept(stem: str, suffix: str, made_of: Iterable[bytes], make: Callable[[Path], Path]) -> Path:
    """What `make` makes in a folder, from the cache or made now. made_of: all that it depends on."""
    digest = hashlib.sha256(b"\0".join(made_of)).hexdigest()[:20]
    target = env.cache() / "kernels" / f"{stem}-{digest}.{suffix}"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as place:
            make(Path(place)).rename(target)
    return target


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout


def _processor() -> str:
    """What -march=native depends on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
