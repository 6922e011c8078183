"""Who may ask a server, and what it does with too much, too slow and too many."""

from __future__ import annotations

import base64
import socket
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import Running, running, until
from starlette.datastructures import Headers

from sdkd.errors import InputError
from sdkd.serve.cli import check_address, is_own
from sdkd.serve.errors import ForbiddenError, UnauthorizedError
from sdkd.serve.guard import Trust, known_hosts
from sdkd.serve.running import listen
from sdkd.serve.wanted import Limits

ASKED = {"prompt": "a cat", "steps": 2, "seed": 5, "width": 32, "height": 32}


def check(trust: Trust, path: str = "/api/images", **headers: str) -> None:
    trust.check(path, Headers({name.replace("_", "-"): value for name, value in headers.items()}))


@pytest.mark.parametrize(
    "host", ["localhost:7860", "127.0.0.1:7860", "[::1]:7860", "192.168.1.4", "box.lan:80", "LOCALHOST"]
)
def test_hosts_that_are_this_server(host: str) -> None:
    check(Trust(hosts=known_hosts("127.0.0.1", ["Box.lan"])), host=host)


@pytest.mark.parametrize("host", ["evil.example:7860", "127.0.0.1.evil.example", "localhost.evil.example", ""])
def test_another_name_is_refused(host: str) -> None:
    with pytest.raises(ForbiddenError, match="is not a name of this server"):
        check(Trust(), host=host)


def test_pages_of_others_are_refused() -> None:
    check(Trust(), host="localhost:7860", origin="http://localhost:7860")
    check(Trust(origins=frozenset({"https://app.example"})), host="localhost:7860", origin="https://app.example")
    for origin in ("https://evil.example", "http://localhost:8000", "null"):
        with pytest.raises(ForbiddenError, match="--allow-origin"):
            check(Trust(), host="localhost:7860", origin=origin)


def test_a_key_by_bearer_and_by_password() -> None:
    trust = Trust(key="secret")
    check(trust, host="anything.example", authorization="Bearer secret", origin="https://elsewhere.example")
    check(trust, authorization=f"Basic {base64.b64encode(b'user:secret').decode()}")
    for given in ("", "Bearer", "Bearer wrong", "Basic !!", "Basic c2VjcmV0", "Bearer s\xe9cret"):
        with pytest.raises(UnauthorizedError, match="Authorization: Bearer KEY"):
            check(trust, authorization=given)
    for path in ("/", "/page/app.js", "/health", "/docs", "/openapi.json", "/files/0a.png"):
        check(trust, path)
    for path in ("/metrics", "/page/../metrics", "/health/x", "/api/about"):
        with pytest.raises(UnauthorizedError, match="key is needed"):
            check(trust, path)


def test_an_address_that_others_reach_needs_a_key() -> None:
    assert [is_own(host) for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost")] == [True] * 4
    check_address("0.0.0.0", "secret", False)
    check_address("0.0.0.0", None, True)
    for host in ("0.0.0.0", "::", "192.168.1.4", "box.lan"):
        with pytest.raises(InputError, match="can be reached by others: give --api-key KEY"):
            check_address(host, None, False)
    with pytest.raises(InputError, match="leave out one of the two"):
        check_address("0.0.0.0", "secret", True)
    with pytest.raises(InputError, match="the API key is empty"):
        check_address("127.0.0.1", " ", False)


def test_ports_and_addresses() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(InputError, match=f"port {port} of 127.0.0.1 is in use: give --port"),
            listen("127.0.0.1", port),
        ):
            pass
    with pytest.raises(InputError, match="is no address"), listen("no.such.host.invalid", 0):
        pass
    with pytest.raises(InputError, match="is no address of this machine"), listen("203.0.113.77", 0):
        pass


def test_a_server_with_a_key(bundle: Path) -> None:
    with running([f"small={bundle}"], target="openvino", trust=Trust(key="secret")) as server:
        with server.client() as client:
            refused = client.get("/api/about")
            assert (refused.status_code, "a key is needed" in refused.text) == (401, True)
            assert refused.headers["www-authenticate"] == 'Bearer realm="sdkd"'
            assert client.get("/").status_code == client.get("/health").status_code == 200
        with server.client(headers={"authorization": "Bearer secret"}) as client:
            assert client.get("/api/about").json()["auth"] is True


def test_an_allowed_page_of_another_site(bundle: Path) -> None:
    """A browser asks first whether it may; a page that is not allowed gets no permission."""
    trust = Trust(origins=frozenset({"https://app.example"}))
    asking = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    with running([f"small={bundle}"], target="openvino", trust=trust) as server, server.client() as client:
        allowed = client.options("/api/images", headers={"origin": "https://app.example", **asking})
        assert allowed.headers["access-control-allow-origin"] == "https://app.example"
        answer = client.get("/api/about", headers={"origin": "https://app.example"})
        assert answer.headers["access-control-allow-origin"] == "https://app.example"
        refused = client.options("/api/images", headers={"origin": "https://evil.example", **asking})
        assert "access-control-allow-origin" not in refused.headers
        assert client.get("/api/about", headers={"origin": "https://evil.example"}).status_code == 403


@pytest.fixture(scope="module")
def strict(bundle: Path) -> Any:
    """A server that takes little, and not for long."""
    limits = Limits(body_bytes=50_000, body_seconds=0.5, pixels=64 * 64)
    with running([f"small={bundle}"], target="openvino", limits=limits) as server:
        yield server


def works(server: Running) -> None:
    with server.client() as client:
        assert client.post("/api/images", json=ASKED).status_code == 200


def test_large_bodies(strict: Running) -> None:
    with strict.client() as client:
        told = client.post("/api/images", content=b"x" * 60_000)
        assert (told.status_code, "this server takes 50000" in told.text) == (413, True)
        untold = client.post("/api/images", content=iter([b"x" * 30_000] * 3))  # chunked: without a length
        assert (untold.status_code, "this server takes 50000" in untold.text) == (413, True)
        garbage = client.post("/api/images", content=bytes(range(256)) * 100)
        assert garbage.status_code == 400
    works(strict)


def test_an_image_of_too_many_pixels(strict: Running) -> None:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("L", (2000, 2000)).save(buffer, format="PNG")  # few bytes, many pixels
    with strict.client() as client:
        answer = client.post("/api/images", json={**ASKED, "image": base64.b64encode(buffer.getvalue()).decode()})
    assert (answer.status_code, "image of 2000x2000 pixels is larger" in answer.text) == (413, True)


def test_a_body_that_does_not_come(strict: Running) -> None:
    with socket.create_connection((strict.host, strict.port)) as connection:
        head = f"POST /api/images HTTP/1.1\r\nHost: {strict.host}\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        connection.settimeout(30)
        answer = b"".join(iter(lambda: connection.recv(4096), b"")).decode()  # the connection ends with it
    assert answer.startswith("HTTP/1.1 408")
    assert "0.5 s went by without more of the request" in answer


def test_many_connections_that_ask_nothing(strict: Running) -> None:
    open_ones = [socket.create_connection((strict.host, strict.port)) for _ in range(300)]
    try:
        works(strict)
    finally:
        for one in open_ones:
            one.close()


def test_a_slow_reader_holds_up_nobody(strict: Running) -> None:
    """It asks for a stream and never reads; others' images arrive meanwhile."""
    body = b'{"prompt": "a cat", "steps": 60, "width": 32, "height": 32, "stream": true}'
    head = f"POST /api/images HTTP/1.1\r\nHost: {strict.host}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((strict.host, strict.port)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        until(lambda: strict.service.current(), "it is taken")
        works(strict)
        until(lambda: not strict.service.current(), "it was drawn")


def test_clients_that_leave_at_once(strict: Running) -> None:
    def ask() -> None:
        with pytest.raises(httpx.TimeoutException, match="timed out"), httpx.Client(timeout=0.05) as client:
            client.post(f"{strict.url}/api/images", json={**ASKED, "steps": 150})

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    until(lambda: not strict.service.current(), "all are cancelled")
    works(strict)
