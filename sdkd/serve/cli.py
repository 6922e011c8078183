"""`sdkd serve`: images over HTTP."""

from __future__ import annotations

import ipaddress
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdkd.core.console import show
from sdkd.core.numbers import check_number
from sdkd.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from sdkd.serve.catalog import Catalog

PORT = 7860  # where clients of A1111's API look by default


def serve(
    models: Annotated[list[str], typer.Argument(help="Bundles, or other models (run eagerly); NAME=MODEL names one.")],
    host: Annotated[str, typer.Option(help="Address to listen at; another than this machine's own needs a key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0: any free one.")] = PORT,
    target: Annotated[
        str | None, typer.Option(help="Only this target of the bundles; default: all that run here, the best first.")
    ] = None,
    lora_dir: Annotated[Path | None, typer.Option(help="A folder of LoRAs, asked for by the files' names.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A folder that keeps every image.")] = None,
    memory_gb: Annotated[
        float | None, typer.Option(help="What all loaded models may take; default: 80 % of what is free now.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="SDKD_API_KEY", help="Answer only who sends this key; better in SDKD_API_KEY.")
    ] = None,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Listen at any address without a key.")] = False,
    allow_host: Annotated[list[str] | None, typer.Option(help="Another name of this server, as of a proxy.")] = None,
    allow_origin: Annotated[list[str] | None, typer.Option(help="A page that may ask, as https://example.org.")] = None,
    max_steps: Annotated[int, typer.Option(min=1, help="Denoising steps of a request, at most.")] = 150,
    max_images: Annotated[int, typer.Option(min=1, help="Images of a request, at most.")] = 8,
    max_pixels: Annotated[int, typer.Option(min=1, help="Pixels of an image, drawn or sent, at most.")] = 4 << 20,
    max_queue: Annotated[int, typer.Option(min=1, help="Images that may wait; more are refused (429).")] = 64,
    max_body_mb: Annotated[int, typer.Option(min=1, help="Megabytes of a request, at most.")] = 32,
    drain_seconds: Annotated[float, typer.Option(min=0, help="When it is ended: time for what runs.")] = 30.0,
) -> None:
    """Serve models: a page to draw on, OpenAI's and A1111's image APIs, and one with progress.

    Requests that differ only in prompt, seed and picture are drawn in one call of the engine. Ends with Ctrl-C or
    SIGTERM: what waits is answered 503, what runs is finished.
    """
    check_address(host, api_key, no_auth)
    check_number("drain seconds", drain_seconds, 0)
    require_serve()
    from sdkd.serve.app import create_app
    from sdkd.serve.catalog import make_catalog
    from sdkd.serve.guard import Trust, known_hosts
    from sdkd.serve.running import listen, run
    from sdkd.serve.wanted import Limits

    with listen(host, port) as listening:
        catalog = make_catalog(models, target)
        limits = Limits(max_steps, max_images, max_pixels, max_body_mb << 20, max_queue)
        trust = Trust(api_key, known_hosts(host, allow_host or ()), frozenset(allow_origin or ()))
        app = create_app(catalog, lora_dir=lora_dir, output=output, memory_gb=memory_gb, limits=limits, trust=trust)
        tell(catalog, listening, api_key)
        run(app, listening, drain_seconds)


def check_address(host: str, api_key: str | None, no_auth: bool) -> None:
    """InputError for an address that others reach and nothing that keeps them out, and for an empty key."""
    if api_key is not None and (not api_key.strip() or not api_key.isascii()):
        raise InputError("the API key is empty or not ASCII: give a long random one, or leave it out")
    if api_key is not None and no_auth:
        raise InputError("a key and --no-auth were given: leave out one of the two")
    if api_key is None and not no_auth and not is_own(host):
        raise InputError(
            f"host {host!r} can be reached by others: give --api-key KEY (or SDKD_API_KEY), or --no-auth where "
            "everybody on that network may use this machine"
        )


def is_own(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def require_serve() -> None:
    """MissingExtraError without what the extra `serve` installs."""
    from importlib.util import find_spec

    for package in ("fastapi", "uvicorn", "multipart", "prometheus_client"):
        if find_spec(package) is None:
            raise MissingExtraError(package, "serve", "sdkd serve")


def tell(catalog: Catalog, listening: socket.socket, api_key: str | None) -> None:
    """Say where it is, and what is served."""
    host, port = listening.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    for served in catalog.all:
        run, (height, width) = served.generation, served.size
        show(f"{served.id}: {served.target}, {width}x{height} px (width x height), {run}")
    show(
        f"page {url}/  OpenAI {url}/v1  A1111 {url}/sdapi/v1  API {url}/docs" + ("  (with the key)" if api_key else "")
    )
