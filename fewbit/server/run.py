"""Serving until told to stop: SIGTERM finishes what runs and exits 0; a dead engine is told and exits 1."""

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from starlette.applications import Starlette

from fewbit.engine.loop import Loop
from fewbit.errors import RequestError
from fewbit.server.app import build
from fewbit.server.config import ServerConfig
from fewbit.server.http import Protocol
from fewbit.server.state import State

LOG = logging.getLogger("fewbit.server")


class Server(uvicorn.Server):
    """uvicorn's, with signals that drain. A second signal cuts off what runs, a third ends hard."""

    def __init__(self, config: uvicorn.Config, state: State, ready: Callable[[str], None]):
        super().__init__(config)
        self.state, self.ready, self.signals = state, ready, 0
        self._draining: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Ours instead; only the main thread can have any."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        for name in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(name, self.told)
        yield
        for name in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(name)

    async def startup(self, sockets: Any = None) -> None:
        self.state.loop.on_death = self._on_death(asyncio.get_running_loop())
        await super().startup(sockets)
        if self.started:
            self.ready(self.url())

    def url(self) -> str:
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        return f"{'https' if self.config.is_ssl else 'http'}://{shown}:{port}{self.config.root_path}"

    def told(self) -> None:
        self.signals += 1
        if self.signals > 2:
            self.should_exit = self.force_exit = True
        elif self.signals == 2 or self.state.loop.dead:
            self.hurry()
        elif self._draining is None:
            self._draining = asyncio.ensure_future(self.drain())

    def hurry(self) -> None:
        """Cut readers off, which their requests take as leaving, and end."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        self.should_exit = True

    async def drain(self) -> None:
        """Nothing new; what runs may finish, up to the limit."""
        self.state.draining = True
        running, seconds = self.state.loop.rows, self.state.config.drain_seconds
        said = f"; they have {seconds:g} s, or until Ctrl-C again" if running else ""
        LOG.info("shutting down: %d running%s", running, said)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.state.config.drain_seconds):
                while self.state.loop.rows:
                    await asyncio.sleep(0.02)
                await asyncio.sleep(0.1)  # the last events are on their way
        self.should_exit = True

    def _on_death(self, loop: asyncio.AbstractEventLoop) -> Callable[[], None]:
        def told() -> None:
            LOG.error("the engine has stopped: %s", self.state.loop.dead, exc_info=self.state.loop.dead)
            loop.call_later(self.state.config.death_seconds, setattr, self, "should_exit", True)

        def on_death() -> None:
            with contextlib.suppress(RuntimeError):  # the event loop has ended first
                loop.call_soon_threadsafe(told)

        return on_death


def free(host: str, port: int) -> None:
    """Refuse an address that cannot be listened on; asked before a model is loaded for it."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in found:
            with socket.socket(family, kind, protocol) as made:
                made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                made.bind(address)
    except socket.gaierror as error:
        raise RequestError(f"host {host!r}: {error.strerror}; an address of this machine is wanted") from error
    except OSError as error:
        said = f"host {host!r}, port {port}: {os.strerror(error.errno or 0).lower()}"
        hint = {errno.EADDRINUSE: "another port, or 0 for a free one, is wanted",
                errno.EADDRNOTAVAIL: "an address of this machine is wanted; 0.0.0.0 is all of them",
                errno.EACCES: "ports below 1024 are the administrator's"}  # fmt: skip
        raise RequestError("; ".join(part for part in (said, hint.get(error.errno or 0)) if part)) from error


def settings(app: Starlette, config: ServerConfig) -> uvicorn.Config:
    made = uvicorn.Config(
        app, host=config.host, port=config.port, root_path=config.root_path, http=Protocol, ws="none", loop="asyncio",
        lifespan="on", log_config=None, log_level="warning", access_log=config.access_log, server_header=False,
        h11_max_incomplete_event_size=config.max_headers, timeout_graceful_shutdown=2,
        ssl_keyfile=config.ssl_keyfile, ssl_certfile=config.ssl_certfile,
    )  # fmt: skip
    if config.access_log:
        logging.getLogger("uvicorn.access").setLevel(logging.INFO)
    return made


def serve(make: Callable[[], Any], config: ServerConfig, facts: dict[str, Any] | None = None,
          ready: Callable[[str], None] = lambda url: None) -> int:  # fmt: skip
    """Build the engine, serve it, end it. -> the exit status."""
    loop = Loop(make)
    loop.start()
    app = build(loop, config, facts)
    server = Server(settings(app, config), app.state.fewbit, ready)
    try:
        server.run()
    finally:
        status = ended(loop)
    return status if server.started else 1


def ended(loop: Loop) -> int:
    """End the engine. A step that hangs must not keep the process, so that one ends at once and hard."""
    if not loop.stop():
        LOG.error("the engine did not stop: ending without it")
        sys.stderr.flush()
        os._exit(1)
    return 1 if loop.dead else 0
