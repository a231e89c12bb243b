"""A rank beside rank 0: loads its part of the model, then does what it is told until rank 0 is gone."""

import json
import logging
import os
import signal
import socket
import threading
import time
from functools import partial
from typing import Any

import torch

from fewbit.engine import fusion
from fewbit.engine.batch import Flight
from fewbit.engine.config import EngineConfig
from fewbit.engine.limits import Limits, measured
from fewbit.engine.parallel import digest, tried
from fewbit.engine.parallel_group import Group
from fewbit.engine.parallel_wire import STEP, Receiver, Wire
from fewbit.engine.start import load
from fewbit.models.fuse_place import put_back

BEAT = 0.5  # seconds between looks at whether rank 0 still lives


def main(told: dict[str, Any]) -> None:
    """The process."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)  # rank 0 decides when to end
    logging.getLogger("fewbit").setLevel(logging.ERROR)  # and has said it
    threading.Thread(target=outlive_nobody, args=(os.getppid(),), daemon=True).start()
    wire = Wire(socket.socket(fileno=told["socket"]))
    try:
        serve(wire, told)
    except EOFError:
        code = 0
    except BaseException as error:  # rank 0 is to hear of it, whatever it is
        code = 1
        say(wire, error)
    os._exit(code)  # nothing that hangs on the other ranks may keep this one


def outlive_nobody(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(BEAT)
    os._exit(1)


def say(wire: Wire, error: BaseException) -> None:
    try:
        wire.tell(error=f"{type(error).__name__}: {error}"[:2000])
    except OSError:
        return


def serve(wire: Wire, told: dict[str, Any]) -> None:
    torch.set_num_threads(told["threads"])
    config = EngineConfig.of(**told["config"])
    group = Group(told["rank"], told["size"], told["device"], told["file"])
    if told["device"] == "cuda":
        torch.cuda.set_device(told["rank"])
    loaded = load(config, group)
    wire.tell(digest=digest(loaded.model))
    receiver = Receiver()
    runner: Any = None
    while True:
        kind, data = wire.receive()
        if kind == STEP:
            works, count, rows = receiver.unpack(data)
            tokens = torch.empty(count, dtype=torch.int64, device=loaded.device)
            runner.run(works, Flight(group.broadcast(tokens), rows) if count else None)
            continue
        command = json.loads(data)
        if command["command"] == "connect":
            group.connect()
        elif command["command"] == "logits":
            wire.tell(failed=tried(partial(fusion.own_logits, loaded, command["left"], command["noisy"]))[1])
        elif command["command"] == "put_back":
            put_back(loaded.model, command["kinds"])
        elif command["command"] == "measure":
            wire.tell(measured=measured(config, loaded))
        elif command["command"] == "runner":
            runner = loaded.own_runner(Limits(**command["limits"]))
        elif command["command"] == "capture":
            wire.tell(failed=tried(partial(runner.capture, lambda *_: None, command["prompts"]))[1])
        elif command["command"] == "forget":
            runner.forget()
        elif command["command"] == "finish":
            loaded.finish()
            wire.tell(finished=True)
