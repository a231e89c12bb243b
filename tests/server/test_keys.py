"""Keys, ids, other sites: who may ask what."""

import base64
import socket
from collections.abc import Iterator

import pytest

from tests.server.echo_engine import EchoEngine
from tests.server.served import Running, running

KEYS = ("sk-one", "sk-two")
BODY = {"prompt": [1, 2], "max_tokens": 1}
PATHS = [
    "/", "//", "/page.js", "/v1/models", "/v1/models/echo", "/metrics", "/info", "/stats", "/version", "/openapi.json",
    "/ping", "/docs", "/nope",
    "//health", "/health/", "/health/../v1/models", "/health/..%2fv1/models", "/health%2f..%2fv1%2fmodels", "/%68ealth",
    "/./health", "/v1/../health", "/health;x", "/health%00", "/HEALTH", "/v1/models?/health", "/v1/models#/health",
    "http://x/health", "/health/../../v1/completions",
]  # fmt: skip


@pytest.fixture(scope="module")
def keyed() -> Iterator[Running]:
    with running(EchoEngine, api_key=KEYS) as found:
        yield found


def asked(served: Running, method: str, target: str, *headers: str) -> int:
    """The status of a request whose target is sent as it is."""
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 5) as made:
        lines = [f"{method} {target} HTTP/1.1", "host: x", "connection: close", *headers, "", ""]
        made.sendall("\r\n".join(lines).encode())
        return int(made.recv(4096).split(b" ")[1])


@pytest.mark.parametrize("target", PATHS)
def test_every_other_path_needs_the_key(keyed: Running, target: str) -> None:
    for method in ("GET", "POST", "HEAD", "OPTIONS", "PUT"):
        assert asked(keyed, method, target) in (400, 401), (method, target)


def test_health_is_open(keyed: Running) -> None:
    assert asked(keyed, "GET", "/health") == asked(keyed, "GET", "/health?x=1") == 200
    assert asked(keyed, "POST", "/health") == 401


@pytest.mark.parametrize("value", [
    "Bearer", "Bearer sk-on", "Bearer sk-onee", "Bearer sk-one sk-two", "sk-one", "Basic sk-one",
    "Basic " + base64.b64encode(b"sk-one").decode(), "Token sk-one", "Bearer \xff\xfe",
])  # fmt: skip
def test_wrong_keys(keyed: Running, value: str) -> None:
    found = keyed.http.get("/v1/models", headers={b"authorization": value.encode("latin-1")})
    assert found.status_code == 401 and found.json()["error"]["code"] == "invalid_api_key"
    assert found.headers["www-authenticate"].startswith("Bearer")


def test_no_key_at_all(keyed: Running) -> None:
    for line in ("authorization: Bearer ", "authorization: Bearer   ", "authorization:", "x: y"):
        assert asked(keyed, "GET", "/v1/models", line) == 401


def test_two_headers_are_none(keyed: Running) -> None:
    both = ("authorization: Bearer sk-one", "authorization: Bearer wrong")
    assert asked(keyed, "GET", "/v1/models", *both) == asked(keyed, "GET", "/v1/models", *both[::-1]) == 401


@pytest.mark.parametrize("key", KEYS)
def test_right_keys(keyed: Running, key: str) -> None:
    basic = base64.b64encode(f"any:{key}".encode()).decode()
    for value in (f"Bearer {key}", f"bearer {key}", f"Basic {basic}"):
        found = keyed.http.post("/v1/completions", json=BODY, headers={"authorization": value})
        assert found.status_code == 200


def test_ids(keyed: Running) -> None:
    head = {"authorization": "Bearer sk-one"}
    assert keyed.http.get("/version", headers={**head, "x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    for strange in ("", "a b", "x" * 500, "\xff"):
        found = keyed.http.get("/version", headers={**head, b"x-request-id": strange.encode("latin-1")})
        assert len(found.headers["x-request-id"]) == 32
    assert keyed.http.get("/version").headers["x-request-id"]  # of refusals too


def test_other_sites() -> None:
    """No site but those named gets leave to read an answer."""
    ask = {"origin": "http://site", "access-control-request-method": "POST",
           "access-control-request-headers": "content-type,authorization"}  # fmt: skip
    with running(EchoEngine) as closed:
        assert (
            "access-control-allow-origin" not in closed.http.get("/version", headers={"origin": "http://site"}).headers
        )
        assert closed.http.options("/v1/completions", headers=ask).status_code == 405
    with running(EchoEngine, allowed_origins=("http://site",), api_key=KEYS) as opened:
        found = opened.http.options("/v1/completions", headers=ask)
        assert (found.status_code, found.headers["access-control-allow-origin"]) == (200, "http://site")
        assert opened.http.options("/v1/completions", headers={**ask, "origin": "http://else"}).status_code == 400
        found = opened.http.get("/v1/models", headers={"origin": "http://site"})
        assert found.status_code == 401


def test_page_allows_no_script_of_others() -> None:
    with running(EchoEngine) as served:
        found = served.http.get("/")
        assert "script-src 'self'" in found.headers["content-security-policy"]
        assert found.headers["x-content-type-options"] == "nosniff"
        assert served.http.get("/page/../auth.py").status_code == 404


def test_a_name_pointed_at_loopback_opens_nothing() -> None:
    """DNS rebinding: the page's origin and host agree, and both are a stranger's."""
    with running(EchoEngine) as served:
        strange = {"origin": "http://evil.example", "host": "evil.example"}
        assert served.post("/v1/completions", BODY, headers=strange).status_code == 403
        for host in ("localhost:8000", "127.0.0.1", "[::1]:8000"):
            head = {"origin": f"http://{host}", "host": host}
            assert served.post("/v1/completions", BODY, headers=head).status_code == 200
        assert served.post("/v1/completions", BODY, headers={"host": "tunnel.example"}).status_code == 200
