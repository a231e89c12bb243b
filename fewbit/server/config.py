"""ServerConfig: what a user asks of the server, as opposed to the engine."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fewbit.errors import RequestError

PARSERS = ("hermes", "llama3_json")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Times are in seconds, sizes in bytes."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: tuple[str, ...] = ()
    root_path: str = ""
    allowed_origins: tuple[str, ...] = ()  # of other sites' pages; none unless asked
    allowed_methods: tuple[str, ...] = ("GET", "POST")
    allowed_headers: tuple[str, ...] = ("authorization", "content-type", "x-request-id")
    allow_credentials: bool = False
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    chat_template: str | None = None  # instead of the tokenizer's
    tool_call_parser: str | None = None  # left out: by what the chat template asks for
    response_role: str = "assistant"
    sampling_defaults: dict[str, Any] = field(default_factory=dict)  # where a request says nothing
    access_log: bool = True
    max_body: int = 16 << 20
    max_bodies: int = 256 << 20  # of all requests that are being read, together
    max_headers: int = 64 << 10
    max_depth: int = 64  # of JSON
    body_seconds: float = 30.0
    send_seconds: float = 30.0  # a reader that takes nothing for so long is gone
    drain_seconds: float = 30.0  # after SIGTERM
    death_seconds: float = 2.0  # how long a dead engine's server still answers 503
    template_seconds: float = 2.0

    def __post_init__(self) -> None:
        if isinstance(self.port, bool) or not 0 <= self.port < 65536:
            raise RequestError(f"port={self.port!r}: want 0 to 65535")
        if any(not key or not key.isascii() or key != key.strip() for key in self.api_key):
            raise RequestError("api_key: want ASCII without spaces around it, at least one character")
        if self.tool_call_parser not in (None, *PARSERS):
            raise RequestError(f"tool_call_parser={self.tool_call_parser!r}: known are {', '.join(PARSERS)}")
        if bool(self.ssl_keyfile) != bool(self.ssl_certfile):
            raise RequestError("ssl_keyfile and ssl_certfile: TLS needs both")
        for name in (self.ssl_keyfile, self.ssl_certfile):
            if name and not Path(name).is_file():
                raise RequestError(f"{name}: there is no such file to read a TLS key or certificate from")
