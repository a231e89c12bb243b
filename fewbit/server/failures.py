"""What went wrong, in OpenAI's shape: {"error": {message, type, param, code}}."""

import json
from typing import Any

from starlette.responses import Response

from fewbit.errors import CapacityError, FewbitError, RequestError, UnsupportedError

TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    405: "invalid_request_error", 408: "timeout_error", 413: "invalid_request_error", 415: "invalid_request_error",
    429: "rate_limit_error", 500: "server_error", 501: "not_implemented_error", 503: "service_unavailable_error",
}  # fmt: skip
LONGEST = 2000  # characters of a message: what was sent is never sent back whole


class Refusal(RequestError):
    """A request answered with a status of its own."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        self.status, self.param, self.code = status, param, code
        super().__init__(message)


def body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    if len(message) > LONGEST:
        message = message[:LONGEST] + " ..."
    return {"error": {"message": message, "type": TYPES.get(status, "api_error"), "param": param, "code": code}}


def answer(status: int, message: str, param: str | None = None, code: str | None = None) -> Response:
    headers = {"retry-after": "1"} if status in (429, 503) else {}
    if status == 401:
        headers["www-authenticate"] = 'Bearer, Basic realm="fewbit"'
    content = encoded(body(status, message, param, code))
    return Response(content, status, headers, "application/json")


def encoded(value: Any) -> bytes:
    """JSON bytes; half of a surrogate pair, which UTF-8 cannot hold, becomes a question mark."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def of(error: Exception) -> tuple[int, str, str | None, str | None]:
    """Status, message, parameter, code."""
    if isinstance(error, Refusal):
        return error.status, str(error), error.param, error.code
    if isinstance(error, RequestError | UnsupportedError):
        return 400, str(error), None, None
    if isinstance(error, CapacityError):
        return 429, str(error), None, "server_busy"
    if type(error) is FewbitError:  # the engine's end
        return 503, str(error), None, "engine_dead"
    return 500, "the server failed on this request; its log says how", None, None
