"""The edge of the server: which hosts it answers to, the bodies that it reads, and errors in OpenAI's
form."""

import asyncio
import json
import re
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from litlora.console import one_line
from litlora.serve.asked import Wrong

HEADERS = {408: {"Connection": "close"}, 429: {"Retry-After": "1"}}
"""Of errors, by their status. The rest of a body that is too long is read, and dropped: who still sends
it would not see an answer before a closed connection."""


class KnownHosts:
    """Lets through what names this machine by one of its names: a page of another site, which a
    browser shows, could send its own name here, and would read the answer."""

    def __init__(self, app: ASGIApp, names: tuple[str, ...]) -> None:
        self.app, self.names = app, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self.app
        if scope["type"] == "http" and "*" not in self.names:
            host = Headers(scope=scope).get("host", "")
            if re.sub(r":\d*$", "", host).lower() not in self.names:
                app = error_response(400, f"the host {host!r} is not known here; use {self.names[0]}")
        await app(scope, receive, send)


async def read_body(request: Request, most: int, seconds: float) -> Any:
    """The JSON value of a request's body. Raises Wrong for one that has more bytes than `most`, takes
    longer than `seconds`, or holds no JSON that can be written again."""
    # Another content type could be sent by any page that a browser shows, without asking.
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Wrong("the content type must be application/json", status=415)
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > most:
                    raise Wrong(f"the body has more than {most:,} bytes", status=413)
    except TimeoutError:
        raise Wrong(f"the body did not come within {seconds:g} seconds", status=408) from None
    try:
        found = json.loads(body.decode("utf-8-sig"))
        if b"\\ud" in body or b"\\uD" in body:  # how surrogates are written: alone, they are no text
            json.dumps(found, ensure_ascii=False).encode()
        return found
    except UnicodeEncodeError:
        raise Wrong("the body holds half a character (a lone surrogate, \\ud800 to \\udfff)") from None
    except (ValueError, RecursionError) as error:
        raise Wrong(f"the body is not JSON: {one_line(str(error))[:200]}") from None


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error as OpenAI writes it."""
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    kind = "rate_limit_error" if status == 429 else kind
    return {"error": {"message": one_line(message), "type": kind, "param": param, "code": code}}


def error_response(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> JSONResponse:
    """The same, as a response."""
    content = error_body(status, message, param, code)
    return JSONResponse(content, status_code=status, headers=HEADERS.get(status))


async def http_error(request: Request, error: HTTPException) -> Response:
    """An address or a method that there is not."""
    response = error_response(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
    response.headers.update(error.headers or {})
    return response
