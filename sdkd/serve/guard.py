"""Who may ask, and how much they may send: checked before a request reaches the application.

A browser lets every page that somebody visits send requests to servers on their own machine. So a request must name
this server as its host (else a name that an attacker controls was bound to this address: DNS rebinding), and where a
page made it, the page must be this server's own. With a key neither matters: an attacker does not know it.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import ipaddress
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sdkd.serve.errors import ForbiddenError, RefusedError, TooLargeError, TooSlowError, UnauthorizedError, answer
from sdkd.serve.wanted import Limits

# What needs no key: nothing of anybody is in it, and images have names that cannot be guessed.
OPEN = re.compile(r"/|/page/[\w.-]+|/health|/files/[\w.-]+|/docs|/openapi\.json|/favicon\.ico")
_LOCAL = ("localhost",)


@dataclass(frozen=True)
class Trust:
    """Whom a server answers: anybody with `key`; without one, requests to `hosts` (and addresses) from own pages.

    `origins`: other pages that may ask, as `https://example.org`.
    """

    key: str | None = None
    hosts: frozenset[str] = field(default_factory=frozenset)
    origins: frozenset[str] = field(default_factory=frozenset)

    def check(self, path: str, headers: Headers) -> None:
        """ForbiddenError or UnauthorizedError for a request that is not to be answered."""
        if OPEN.fullmatch(path) and self.key is not None:
            return
        if self.key is not None:
            self._check_key(headers)
            return
        host = _host(headers.get("host", ""))
        if not (host in self.hosts or host in _LOCAL or host == socket.gethostname().lower() or _is_address(host)):
            raise ForbiddenError(
                f"host {host!r} is not a name of this server: open it by its address, or start it with "
                f"--allow-host {host or 'NAME'}"
            )
        origin = headers.get("origin")
        if origin is not None and origin not in self.origins and urlsplit(origin).netloc != headers.get("host"):
            raise ForbiddenError(
                f"a page of {origin!r} asked, and this server answers its own pages: start it with "
                f"--allow-origin {origin} to allow that"
            )

    def _check_key(self, headers: Headers) -> None:
        assert self.key is not None
        given = _given_key(headers.get("authorization", ""))
        if not hmac.compare_digest(given.encode(), self.key.encode()):
            raise UnauthorizedError("a key is needed: send it as 'Authorization: Bearer KEY', or as basic password")


def _host(text: str) -> str:
    """The name in a Host header, without its port, as `[::1]:80` and `localhost:80` have it."""
    name = text.rsplit("]", 1)[0].lstrip("[") if text.startswith("[") else text.rsplit(":", 1)[0]
    return name.lower().rstrip(".")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _given_key(header: str) -> str:
    """The key in an Authorization header: a bearer's, or the password of basic authorization."""
    kind, _, value = header.partition(" ")
    if kind.lower() == "bearer":
        return value.strip()
    if kind.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return ""
    return ""


class Guard:
    """ASGI middleware: answers what `Trust` or the limits of a body refuse, and passes on the rest."""

    def __init__(self, app: ASGIApp, trust: Trust, limits: Limits) -> None:
        self.app, self.trust, self.limits = app, trust, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection of the server."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self.trust.check(scope["path"], headers)
            self._check_length(headers)
        except RefusedError as error:
            await _refuse(error, scope, receive, send)
            return
        await self.app(scope, Body(receive, self.limits).receive, send)

    def _check_length(self, headers: Headers) -> None:
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self.limits.body_bytes:
            raise too_large(int(length), self.limits)


def too_large(length: int, limits: Limits) -> TooLargeError:
    """What a body of so many bytes is answered."""
    return TooLargeError(
        f"the request has {length} bytes or more, and this server takes {limits.body_bytes}: send smaller images"
    )


async def _refuse(error: RefusedError, scope: Scope, receive: Receive, send: Send) -> None:
    # The connection ends with the answer: what is left of a body is not read.
    headers = {"connection": "close"} | (
        {"www-authenticate": 'Bearer realm="sdkd"'} if isinstance(error, UnauthorizedError) else {}
    )
    await JSONResponse(answer(error), error.status, headers)(scope, receive, send)


class Body:
    """The body of a request as it arrives: not more of it than the limit, and no longer between parts than that."""

    def __init__(self, receive: Receive, limits: Limits) -> None:
        self._receive, self._limits = receive, limits
        self._bytes, self._complete = 0, False

    async def receive(self) -> Message:
        """The next part; after the last one whatever the server says, above all that the client left."""
        if self._complete:
            return await self._receive()
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                message = await self._receive()
        except TimeoutError:
            error = TooSlowError(f"{self._limits.body_seconds:g} s went by without more of the request: send it again")
            raise _while_reading(error) from None
        self._bytes += len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        if self._bytes > self._limits.body_bytes:
            raise _while_reading(too_large(self._bytes, self._limits))
        return message


def _while_reading(error: RefusedError) -> HTTPException:
    """The one kind of error that FastAPI passes on as it is while it reads a body."""
    return HTTPException(error.status, str(error), headers={"connection": "close"})


def known_hosts(host: str, allowed: Iterable[str]) -> frozenset[str]:
    """Names by which a server that listens at `host` is asked for, and those that were allowed."""
    return frozenset(name.lower() for name in (host, *allowed) if name)
