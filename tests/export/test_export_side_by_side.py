"""Components in two processes: the same bundle as in one, and when one process does it all."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from small_exports import ONE_LEVEL, small_pipeline

from export import export_pipeline, side_by_side
from export.component import ExportOptions
from sdkd.bundle.manifest import Bundle
from sdkd.core.profiles import Range, ShapeRanges

PARTS = ("text_encoder", "unet")


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A one-level pipeline in a folder."""
    folder = tmp_path_factory.mktemp("model")
    small_pipeline(**ONE_LEVEL).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def in_turn(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Its bundle, made in one process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return export_pipeline(model, tmp_path_factory.mktemp("one") / "bundle", components=PARTS[:1], verify=False)
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The components that children were asked for."""
    found: list[list[str]] = []
    original = side_by_side.BackgroundJob

    def begin(function: str, arguments: dict[str, Any]) -> Any:
        found.append(arguments["names"])
        return original(function, arguments)

    monkeypatch.setattr(side_by_side, "BackgroundJob", begin)
    return found


@pytest.mark.slow
def test_two_processes_make_the_bundle_of_one(
    model: Path, in_turn: Bundle, begun: list[list[str]], tmp_path: Path
) -> None:
    said: list[tuple[str, float | None]] = []
    bundle = export_pipeline(
        model, tmp_path / "bundle", components=PARTS, verify=False, progress=lambda *one: said.append(one)
    )
    assert begun == [["text_encoder"]]
    assert tuple(bundle.manifest.components) == PARTS
    record, other = bundle.component("text_encoder"), in_turn.component("text_encoder")
    assert (record.files, record.contract, record.source_sha256) == (other.files, other.contract, other.source_sha256)
    assert {record.parity for record in bundle.manifest.components.values()} == {None}
    assert [message for message, _ in said if message.startswith("text_encoder: ")]
    fractions = [fraction for _, fraction in said if fraction is not None]
    assert fractions == sorted(fractions)


def test_an_error_here_ends_the_child(model: Path, begun: list[list[str]], tmp_path: Path) -> None:
    def fail(message: str, fraction: float | None) -> None:
        if message == "unet: exporting to ONNX":
            raise ValueError("no terminal")

    (tmp_path / "model").symlink_to(model)
    with pytest.raises(ValueError, match="no terminal"):
        export_pipeline(tmp_path / "model", tmp_path / "bundle", verify=False, components=PARTS, progress=fail)
    assert begun == [["text_encoder"]]
    assert {path.name for path in tmp_path.iterdir()} == {"model", ".bundle.lock"}
    assert _children() == []


def _children() -> list[psutil.Process]:
    """Exports still at work for us; the dead of other tests that nobody has waited for yet have no command."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):  # ZombieProcess is one
            if "sdkd.core.child" in " ".join(child.cmdline()):
                found.append(child)
    return found


def test_one_process_for_modules_in_memory_what_is_there_a_check_one_thread_or_little_memory(
    model: Path, in_turn: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    unchecked = ExportOptions("fp32", verify=False)

    def worth(source: Any, options: ExportOptions = unchecked, part: str = "text_encoder") -> bool:
        return side_by_side._worth_a_child(source, [part], options, in_turn.manifest.versions)

    named = side_by_side.source_for(model, {}, unchecked)
    monkeypatch.setattr(side_by_side, "free_memory", lambda: 4 * 10**9)
    assert worth(named)
    assert not worth(named, ExportOptions("fp32"))  # the check has work for every core
    there = replace(unchecked, reuse=(in_turn.path,))
    assert not worth(named, there)
    assert worth(named, there, "vae_decoder")  # which is not there
    assert not worth(side_by_side.source_for(small_pipeline(), {}, unchecked))
    monkeypatch.setattr(side_by_side, "free_memory", lambda: 2 * 10**9)
    assert not worth(named)
    monkeypatch.setattr(side_by_side, "free_memory", lambda: 4 * 10**9)
    torch.set_num_threads(1)
    assert not worth(named)


def test_options_survive_json() -> None:
    side = Range(64, 64, 128)
    options = ExportOptions(
        "fp16", 18, "onnxruntime", True, ("vae_decoder.decoder.mid_block",),
        ShapeRanges(Range.fixed(1), side, side, Range.fixed(77)), False, ("one", Path("two")),
    )  # fmt: skip
    read = ExportOptions.from_json(json.loads(json.dumps(options.to_json())))
    assert read == ExportOptions(**{**vars(options), "reuse": ("one", "two")})
