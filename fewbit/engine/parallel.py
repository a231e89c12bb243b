"""Tensor parallel: one process per rank. Rank 0 is the engine; the others run the forwards it tells them to.

Every rank loads the checkpoint and keeps its part. The others are told of a step by numbers over a socket pair, so that
an idle engine costs nothing, and end when that pair is closed. Tokens that rank 0's host does not know yet go from its
device to theirs before the forward. A rank that dies ends the engine.
"""

import hashlib
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fewbit.engine.batch import Flight
from fewbit.engine.config import EngineConfig
from fewbit.engine.graph import Graphs
from fewbit.engine.parallel_group import Group, meeting
from fewbit.engine.parallel_wire import STEP, Sender, Wire
from fewbit.engine.runner import Logits
from fewbit.engine.scheduler import Work
from fewbit.errors import CapacityError, FewbitError, UnsupportedError
from fewbit.models.shard_source import SHARDS
from fewbit.models.twin import first_line

BOOT = ("import json, sys; told = json.loads(sys.argv[1]); sys.path[:] = told['path']; "
        "from fewbit.engine.parallel_rank import main; main(told)")  # fmt: skip
NOTICE = 5.0  # seconds to find out whether a failed step was a rank that died
ENDING = 5.0  # seconds for a rank to end by itself


class Team:
    """The other ranks, seen from rank 0."""

    def __init__(self, config: EngineConfig, device: str):
        self.size = config.tensor_parallel_size
        if device == "cuda" and torch.cuda.device_count() < self.size:
            raise CapacityError(f"tensor_parallel_size={self.size}: there are {torch.cuda.device_count()} GPUs here")
        self.group = Group(0, self.size, device, meeting(self.size))
        self.lost: str = ""
        self.first: Rank | None = None  # the one that died first: what the others say follows from it
        self._threads = torch.get_num_threads()
        self._failed, self._closing = threading.Event(), False
        self._sender = Sender()
        torch.set_num_threads(max(1, self._threads // self.size))  # ranks share the cores
        self.ranks: list[Rank] = []
        try:
            for number in range(1, self.size):
                self.ranks.append(Rank(number, config, device, self.group.file, self._died))
        except BaseException:
            self.close()
            raise

    def _died(self, rank: "Rank", code: int) -> None:
        if self._closing:
            return
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        if self.first is None:
            self.first, self.lost = rank, f"rank {rank.number} of {self.size} (process {rank.process.pid}) {how}"
        self._failed.set()
        self.group.abort()

    def check(self, wait: float = 0.0) -> None:
        """Raise if a rank is gone."""
        if self._failed.wait(wait) if wait else self._failed.is_set():
            words = self.first.last_words() if self.first is not None else ""
            raise FewbitError(
                f"tensor parallel: {self.lost}; the engine ends with it" + (f"\n{words}" if words else "")
            )

    def connect(self, digest: str) -> None:
        """All have loaded: meet. digest: of what is cut, which all must have found alike."""
        for rank in self.ranks:
            found = self.answer(rank)["digest"]
            if found != digest:
                raise FewbitError(f"tensor parallel: rank {rank.number} cut the model in another way than rank 0")
        self.command("connect")
        self.guarded(self.group.connect)

    def command(self, name: str, **values: Any) -> None:
        self._each(lambda rank: rank.wire.tell(command=name, **values))

    def answer(self, rank: "Rank") -> dict[str, Any]:
        try:
            _, data = rank.wire.receive()
            found: dict[str, Any] = json.loads(data)
        except (OSError, EOFError):
            found = {"error": ""}
        if "error" in found:
            rank.words = found["error"]
            if not self._failed.wait(NOTICE):
                self.first, self.lost = rank, f"rank {rank.number} of {self.size} gave up"
                self._failed.set()
            self.check()
        return found

    def _each(self, tell: Callable[["Rank"], None]) -> None:
        self.check()
        try:
            for rank in self.ranks:
                tell(rank)
        except OSError as error:
            self.check(NOTICE)
            raise FewbitError(f"tensor parallel: a rank cannot be reached: {error}") from error

    def guarded(self, call: Callable[[], Any]) -> Any:
        """What all ranks do together. An error in it may be a rank that died."""
        try:
            return call()
        except Exception:
            self.check(NOTICE)
            raise

    def measure(self, mine: Callable[[], tuple[int, int]]) -> list[tuple[int, int]]:
        """A measurement that runs the model -> every rank's."""
        self.command("measure")
        found = [self.guarded(mine)]
        return found + [tuple(self.answer(rank)["measured"]) for rank in self.ranks]

    def together(self, name: str, mine: Callable[[], Any], what: str, **values: Any) -> tuple[Any, list[str]]:
        """What all ranks run, and each may fail at. -> rank 0's result, and of every rank why it failed, or ""

        Whoever fails alone leaves the others waiting for what it no longer does: that ends the engine. what: it could
        not, with {} for why.
        """
        self.command(name, **values)
        said, over = [""], threading.Event()

        def hear() -> None:
            with suppress(FewbitError):  # `check` raises it
                said.extend(self.answer(rank)["failed"] for rank in self.ranks)
            if any(said) and not over.wait(NOTICE):
                self.group.abort()

        hearing = threading.Thread(target=hear, daemon=True)
        hearing.start()
        found, said[0] = tried(partial(self.guarded, mine))
        over.set()
        hearing.join(NOTICE if said[0] else None)
        self.check()
        if hearing.is_alive() or self.group.aborted:
            self.alone(said, what)
        return found, said

    def alone(self, said: Sequence[str], what: str) -> None:
        """End the engine: a rank failed where others did not. It raises."""
        self.lost = f"one rank alone {what.format(next(filter(None, said)))}"
        self._failed.set()
        self.check()

    def capture(self, mine: Callable[[], None], prompts: bool) -> None:
        """All record what they do together, or none does: a graph has rows that a step without it has not."""
        what = "could not record CUDA graphs: {}; --enforce-eager does without"
        _, said = self.together("capture", mine, what, prompts=prompts)
        if any(said):
            self.command("forget")
            raise UnsupportedError(next(filter(None, said)))

    def logits(self, mine: Callable[[], Tensor], left: Collection[str], noisy: bool) -> Tensor:
        """Of a few tokens, as engine.fusion asks for them."""
        what = "could not run a few tokens: {}; --fusion off runs none"
        found, said = self.together("logits", mine, what, left=list(left), noisy=noisy)
        if any(said) and not all(said):
            self.alone(said, what)
        if found is None:
            raise UnsupportedError(said[0])
        made: Tensor = found
        return made

    def step(self, works: Sequence[Work], flight: Flight | None, run: Callable[..., Logits]) -> Logits:
        flight = flight if any(work.pending for work in works) else None
        data = self._sender.pack(works, flight)
        self._each(lambda rank: rank.wire.send(STEP, data))
        if flight is not None:
            self.guarded(partial(self.group.broadcast, flight.tokens))
        found: Logits = self.guarded(partial(run, works, flight))
        self.check()  # on a GPU nothing has waited for the others yet
        return found

    def close(self) -> None:
        """End every rank; none is left when this returns."""
        if self._closing:
            return
        self._closing = True
        for rank in self.ranks:
            rank.close()
        self.group.close()
        torch.set_num_threads(self._threads)


class Rank:
    """One other process. It hears of the end of rank 0 by the end of their socket pair."""

    def __init__(self, number: int, config: EngineConfig, device: str, file: int,
                 died: Callable[["Rank", int], None]):  # fmt: skip
        self.number, self.words = number, ""
        mine, theirs = socket.socketpair()
        told = {"path": sys.path, "rank": number, "size": config.tensor_parallel_size, "device": device,
                "file": file, "socket": theirs.fileno(), "config": asdict(config),
                "threads": torch.get_num_threads()}  # fmt: skip
        with theirs:
            self.process = subprocess.Popen([sys.executable, "-c", BOOT, json.dumps(told)], stdin=subprocess.DEVNULL,
                                            pass_fds=[theirs.fileno(), file])  # fmt: skip
        self.wire = Wire(mine)
        self._watch = threading.Thread(target=lambda: died(self, self.process.wait()), daemon=True)
        self._watch.start()

    def last_words(self) -> str:
        """What it said before it ended."""
        if not self.words:
            try:
                self.wire.end.settimeout(1.0)
                self.words = json.loads(self.wire.receive()[1]).get("error", "")
            except (OSError, EOFError, ValueError):
                self.words = ""
        return f"rank {self.number}: {self.words}" if self.words else ""

    def close(self) -> None:
        self.wire.close()
        self._watch.join(ENDING)
        if self._watch.is_alive():
            self.process.kill()
            self._watch.join()


class Lockstep:
    """A runner whose steps all ranks take."""

    def __init__(self, inner: Any, team: Team):
        self.inner, self.team, self.paged, self.ahead = inner, team, inner.paged, inner.ahead

    @property
    def graphs(self) -> Graphs | None:
        return self.inner.graphs if self.paged else None

    def capture(self, tell: Callable[[int, int], None], prompts: bool = True) -> None:
        self.team.capture(partial(self.inner.capture, tell, prompts), prompts)

    def forget(self) -> None:
        self.inner.forget()

    def run(self, works: Sequence[Work], flight: Flight | None = None) -> Logits:
        return self.team.step(works, flight, self.inner.run)

    def free(self) -> None:
        self.inner.free()


def tried(call: Callable[[], Any]) -> tuple[Any, str]:
    """-> its result, and why there is none."""
    try:
        return call(), ""
    except Exception as error:  # whatever ranks run together: the others are to hear of it
        return None, first_line(error)


def digest(model: Any) -> str:
    """Of what is cut and how, whatever the rank."""
    cuts = getattr(model, SHARDS).cuts
    said = json.dumps([(path, cut.kind, cut.sizes) for path, cut in cuts.items()])
    return hashlib.sha256(said.encode()).hexdigest()
