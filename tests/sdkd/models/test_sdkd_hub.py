"""Models of a hub, from a small hub of the test's own on this machine: what is fetched, and what is refused."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import helpers
import pytest
import torch
from huggingface_hub import constants, hf_api

from sdkd.errors import ModelError
from sdkd.models.diffusers_folder import write_pipeline
from sdkd.models.resolve import load_eager

COMMIT, URL = "a" * 40, "/{repo_id}/resolve/{revision}/{filename}"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as a download needs: what a repository holds, and its files."""

    root: ClassVar[Path]

    def log_message(self, *_: Any) -> None:
        """Nothing on the terminal."""

    def answer(self, body: bytes, code: int = 200, **headers: str) -> None:
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self.describe("/".join(parts[2:4]), "tree" in parts)
            return
        file = self.root / "/".join(parts[:2]) / "/".join(parts[4:])
        if not file.is_file():
            self.answer(b"", 404, X_Error_Code="EntryNotFound")
            return
        data = file.read_bytes()
        self.answer(data, ETag=f'"{hashlib.sha256(data).hexdigest()}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET

    def describe(self, name: str, tree: bool) -> None:
        folder = self.root / name
        if not folder.is_dir():
            self.answer(b"{}", 404, X_Error_Code="RepoNotFound")
            return
        files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
        rows = [{"type": "file", "path": path, "size": file.stat().st_size, "oid": "b"} for path, file in files.items()]
        about = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": path} for path in files]}
        self.answer(json.dumps(rows if tree else about).encode(), Content_Type="application/json")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("hub")
    pipe = helpers.tiny_pipeline()
    write_pipeline(pipe, root / "me" / "full")
    torch.save(pipe.unet.state_dict(), root / "me" / "full" / "unet" / "diffusion_pytorch_model.bin")
    checker = root / "me" / "full" / "safety_checker" / "pytorch_model.bin"
    checker.parent.mkdir()
    checker.write_bytes(b"a pickle")
    pipe.save_pretrained(root / "me" / "half", variant="fp16")
    pipe.save_pretrained(root / "me" / "pickled", safe_serialization=False)
    Hub.root = root
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def at(hub: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Let the hub's library ask another address, with a cache of the test's own."""
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))

    def change(endpoint: str) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + URL)
        monkeypatch.setattr(hf_api.api, "endpoint", endpoint)

    change(hub)
    return change


def test_hub_models(at: Callable[[str], None], tmp_path: Path) -> None:
    weight = helpers.tiny_unet().conv_in.weight
    for name in ("me/full", "me/half"):
        assert torch.equal(load_eager(name).unet.conv_in.weight, weight)
    message = (
        "hub model 'me/pickled' has no complete .safetensors weights, and pickles can run code on loading: convert"
    )
    with pytest.raises(ModelError, match=message):
        load_eager("me/pickled")
    with pytest.raises(
        ModelError, match=r"model 'me/nothing' could not be loaded \(.*check the spelling and the network"
    ):
        load_eager("me/nothing")
    assert [file.name for file in tmp_path.rglob("*.bin")] == []
    at("http://127.0.0.1:9")  # what was fetched once needs no network
    assert torch.equal(load_eager("me/full").unet.conv_in.weight, weight)
