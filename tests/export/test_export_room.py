"""What an export takes is said, and refused, before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

import export.room as room
from export import export_pipeline
from export.component import ExportOptions
from export.side_by_side import source_for
from sdkd.errors import ExportError

UNET = 745_225_604  # Vega's parameters


@pytest.mark.parametrize(
    ("precision", "verify", "bytes_each"), [("fp32", True, 4), ("fp16", True, 4), ("fp16", False, 2)]
)
def test_the_estimate_follows_from_the_configs(precision: str, verify: bool, bytes_each: int) -> None:
    options = ExportOptions(precision, verify=verify)  # type: ignore[arg-type]
    found = room.estimate(source_for("random:vega", {}, options), ("unet", "vae_decoder"), options)
    assert found.largest == "unet"
    assert found.memory == room.BASE_BYTES + bytes_each * UNET
    assert found.disk == (4 if precision == "fp32" else 2) * (UNET + 49_490_199)


def test_too_little_memory_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "free_memory", lambda: 2_000_000_000)
    with pytest.raises(
        ExportError, match=r"the export, unet most of all, need about 3.5 GB of memory, and 2.0 GB are free: "
    ):
        export_pipeline("random:vega", tmp_path / "bundle")
    assert not any(path.is_dir() for path in tmp_path.iterdir())


def test_too_little_disk_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ExportError, match=r"graphs in '.*' need about 1.6 GB of disk space, and 0.0 MB are free"):
        export_pipeline("random:vega", tmp_path / "bundle", precision="fp16", components=("unet", "vae_decoder"))
