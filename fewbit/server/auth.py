"""What stands before every route: the request's id, and the key."""

import base64
import binascii
import hmac
import re
import uuid
from collections import Counter
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fewbit.server.failures import answer

NAME = re.compile(rb"[\x21-\x7e]{1,128}")
LOOPBACK = re.compile(rb"(localhost|127(\.[0-9]{1,3}){3}|\[::1\])(:[0-9]{1,5})?")
SECURITY = [(b"x-content-type-options", b"nosniff")]


class Identified:
    """Gives each response the x-request-id of its request, or one of ours; counts them by status."""

    def __init__(self, app: ASGIApp, count: Counter[int]):
        self.app, self.count = app, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = header(scope, b"x-request-id")
        name = given if NAME.fullmatch(given) else uuid.uuid4().hex.encode()

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.count[message["status"]] += 1
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", name), *SECURITY]
            await send(message)

        await self.app(scope, receive, named)


class Local:
    """For a server on loopback without a key: a page that reaches it by a name of its own making is refused.

    A browser sends Origin with every POST; a name that an attacker pointed at 127.0.0.1 shows in Host.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and header(scope, b"origin") and not LOOPBACK.fullmatch(header(scope, b"host")):
            await answer(403, "a page of another site may not call a server that listens on loopback alone; "
                              "--api-key or --host opens it")(scope, receive, send)  # fmt: skip
            return
        await self.app(scope, receive, send)


class Keyed:
    """Lets through who has a key, and /health. A browser may give the key as the password of HTTP Basic."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]):
        self.app = app
        self.digests = [sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or is_health(scope) or self.knows(header(scope, b"authorization")):
            await self.app(scope, receive, send)
        else:
            refused = answer(401, "a valid key is needed: Authorization: Bearer KEY", code="invalid_api_key")
            await refused(scope, receive, send)

    def knows(self, authorization: bytes) -> bool:
        """Compared as digests and with every key, so that the time taken tells nothing."""
        given = sha256(key_of(authorization)).digest()
        return bool(sum(hmac.compare_digest(given, digest) for digest in self.digests))


def is_health(scope: Scope) -> bool:
    """Exactly that path, as it was sent: no other spelling of it opens anything."""
    path = scope.get("root_path", "") + "/health"
    return (scope["type"] == "http" and scope["method"] in ("GET", "HEAD") and scope["path"] == path
            and scope.get("raw_path", b"").split(b"?")[0] in (b"", path.encode()))  # fmt: skip


def key_of(authorization: bytes) -> bytes:
    scheme, _, rest = authorization.partition(b" ")
    rest = rest.strip()
    if scheme.lower() == b"bearer":
        return rest
    if scheme.lower() == b"basic":
        try:
            return base64.b64decode(rest, validate=True).partition(b":")[2]
        except binascii.Error:
            return b""
    return b""


def header(scope: Any, name: bytes) -> bytes:
    """The header's value; empty where it is absent or said twice."""
    found = [value for key, value in scope.get("headers", ()) if key == name]
    return found[0] if len(found) == 1 else b""
