"""The built-in page: three files of ours and nothing from anywhere else."""

from pathlib import Path

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

FOLDER = Path(__file__).with_name("page")
KINDS = {"page.html": "text/html", "page.css": "text/css", "page.js": "text/javascript"}
POLICY = ("default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src *; base-uri 'none'; "
          "form-action 'none'; frame-ancestors 'none'")  # fmt: skip


async def page(http: HttpRequest) -> Response:
    name = http.url.path.rsplit("/", 1)[-1] or "page.html"
    headers = {"content-security-policy": POLICY, "cache-control": "no-cache", "referrer-policy": "no-referrer"}
    return Response((FOLDER / name).read_bytes(), 200, headers, f"{KINDS[name]}; charset=utf-8")
