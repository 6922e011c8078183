"""What sdkd itself wrote: each kind of output is known by what its own record says, never by a file's name alone.

Standard library only.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdkd.core.components import COMPONENTS

_LARGEST = 1 << 28  # bytes; a record is smaller
_LINE = 1 << 20  # bytes of a log's first line that are read
_FIELD = 1 << 20  # bytes of a field of a PNG that are passed over
LORA_MARK = {"written_by": "sdkd"}  # in the metadata of a LoRA's file
CHECKPOINT_MARK = {"written_by": "sdkd convert"}  # and of a model in one file
# What every image of `sdkd generate` says of itself in its PNG text.
_DRAWN = frozenset(["prompt", "seed", "steps", "guidance_scale", "size", "scheduler", "model", "target"])
_PAGE = re.compile(rb'<link rel="icon" href="data:,">\s*<title>[^<]*: training</title>\s*<style>\s*body \{ margin: 0; ')
# Left by file managers and by writers that were killed: nobody's work.
_LITTER = (
    *(".DS_Store", "Thumbs.db", "desktop.ini", ".*.lock", "*/.*.lock"),
    *(".*.partial", ".*.partial/*", "*/.*.partial", "*/.*.partial/*"),
)


@dataclass(frozen=True)
class Kind:
    """One kind of output: the records that prove it (glob -> the keys and types of its JSON), and what may be in it."""

    name: str
    marks: tuple[tuple[str, Mapping[str, type]], ...]
    holds: tuple[str, ...]  # globs of paths in the folder; a star goes over folders, too


def _within(folders: str, files: str) -> tuple[str, ...]:
    return tuple(f"{folder}/{file}" for folder in folders.split() for file in files.split())


_SIDE = "scheduler tokenizer tokenizer_2 feature_extractor"
_TEXT = _within(_SIDE, "*.json *.txt *.model")
_ENGINES = "*.engine *.blob *.xml *.bin *.onnx *.onnx.data *.cache *.json *.pt2 *.constants.safetensors"
_BUNDLE = (
    *("bundle.json", "model_index.json"),
    *_TEXT,
    *_within(" ".join(COMPONENTS), "*.json *.onnx *.onnx.data *.onnx_data *.pt2"),
    *_within("engines swapped", _ENGINES),
    *_within("calibration", "*.safetensors"),
    *_within("swapped/*", "*.txt *.model"),
)
_PARTS = "unet vae text_encoder text_encoder_2 safety_checker image_encoder"
_PIPELINE = (
    *("model_index.json", "sdkd.json", "demo.json", "README.md", "pytorch_lora_weights.safetensors"),
    *_TEXT,
    *_within(_PARTS, "*.json *.safetensors"),
    *("config.json", "diffusion_pytorch_model.safetensors"),  # a VAE alone
    *("training.jsonl", "plot.html", "samples/step-*.png", "samples/prompts.json", "sdkd/*", "wandb/*", ".final/*"),
    *_within("checkpoint-*", "*.json *.safetensors"),
)
_BUNDLE_KEYS: dict[str, type] = {"schema": int, "source": dict, "versions": dict, "components": dict, "engines": dict}
_CACHE_KEYS: dict[str, type] = {"schema": int, "images": int, "data": str, "resolution": int, "scaling_factor": float}
_CHECKPOINT_KEYS: dict[str, type] = {"schema": int, "step": int, "settings": dict, "optimizer": dict}

CACHE = Kind(
    "cache",
    (("index.json", _CACHE_KEYS), ("settings.json", _CACHE_KEYS)),
    (
        *("index.json", "settings.json", "captions.jsonl"),
        *(f"{part}-*.{end}" for part in ("latents", "text") for end in ("json", "safetensors")),
    ),
)
_REPORT_KEYS: dict[str, type] = {"schema": int, "setup": dict, "environment": dict, "results": list}
COMPARISON = Kind(
    "comparison",
    tuple((name, _REPORT_KEYS) for name in ("report.json", ".report.json.*.partial")),  # the latter: of a killed writer
    ("report.json", "report.md", "report.html", "images/*.png", "demo.png"),
)
RUN = Kind(
    "model or run",
    (
        ("sdkd.json", {"teacher": str, "student": str}),
        ("sdkd.json", {"objective": str, "settings": dict}),
        ("checkpoint-*/checkpoint.json", _CHECKPOINT_KEYS),
        ("training.jsonl", {"step": int, "loss/total": float, "lr": float}),
    ),
    _PIPELINE,
)
KINDS = (
    Kind("bundle", (("bundle.json", _BUNDLE_KEYS),), _BUNDLE),
    Kind("checkpoint", (("checkpoint.json", _CHECKPOINT_KEYS),), ("*.json", "*.safetensors")),
    RUN,
    CACHE,
    Kind(
        "evaluation",
        (("evaluation.json", {"schema": int, "settings": dict, "versions": dict, "models": list}),),
        ("evaluation.json", "evaluation.md"),
    ),
    COMPARISON,
)


def kind_of(folder: Path) -> Kind | None:
    """The kind of output of ours that a folder holds, by a record that is one; None for anything else."""
    return next((kind for kind in KINDS if proves(folder, kind)), None)


def damaged_mark(folder: Path) -> str | None:
    """The record that proves nothing in a folder of what is otherwise sdkd's alone; None for any other folder."""
    names = ((kind, name) for kind in KINDS for name, _ in kind.marks if (folder / name).is_file())
    return next((name for kind, name in names if foreign(folder, kind) is None), None)


def proves(folder: Path, kind: Kind) -> bool:
    """Whether a folder holds a record that proves that it is an output of this kind."""
    return any(is_record(file, keys) for pattern, keys in kind.marks for file in sorted(folder.glob(pattern)))


def is_record(file: Path, keys: Mapping[str, type]) -> bool:
    """Whether a file is JSON (of a .jsonl its first line) with these keys, whose values are of these types."""
    found = _read(file)
    return isinstance(found, dict) and all(_fits(found.get(key), kind) for key, kind in keys.items())


def _fits(value: object, kind: type) -> bool:
    return type(value) is kind or (kind is float and type(value) is int)


def _read(file: Path) -> Any:
    try:
        if not file.is_file() or file.stat().st_size > _LARGEST:
            return None
        with file.open("rb") as stream:
            return json.loads(stream.readline(_LINE) if file.suffix == ".jsonl" else stream.read())
    except (OSError, ValueError, RecursionError):
        return None


def foreign(folder: Path, kind: Kind, parts: Sequence[str] | None = None) -> str | None:
    """A path in the folder (of `parts` only, where some are named) that is none of this kind's, or None; empty folders
    do not count.
    """
    for path in _files(folder):
        name = path.relative_to(folder).as_posix()
        if parts is not None and name.partition("/")[0] not in parts:
            continue
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in (*kind.holds, *_LITTER)):
            return name
    return None


def _files(folder: Path) -> Iterator[Path]:
    """All files and links below a folder; links are not followed."""
    for root, folders, files in os.walk(folder):
        here = Path(root)
        yield from (here / name for name in files)
        yield from (here / name for name in folders if (here / name).is_symlink())


def is_drawn_image(file: Path) -> bool:
    """Whether a file is a PNG that `sdkd generate` drew: it carries its settings, before its pixels."""
    found = set()
    with contextlib.suppress(OSError), file.open("rb") as stream:
        if stream.read(8) != b"\x89PNG\r\n\x1a\n":
            return False
        while len(head := stream.read(8)) == 8 and head[4:] != b"IDAT":
            if (size := int.from_bytes(head[:4], "big")) > _FIELD:
                return False
            field = stream.read(size + 4)
            if head[4:] in (b"iTXt", b"tEXt"):
                found.add(field.partition(b"\0")[0].decode("latin-1"))
    return found >= _DRAWN


def is_written_lora(file: Path) -> bool:
    """Whether a file is a LoRA that sdkd trained or fitted to a student, by the metadata in its header."""
    return _safetensors_notes(file).items() >= LORA_MARK.items()


def is_written_checkpoint(file: Path) -> bool:
    """Whether a file is a model in one file that sdkd wrote, by the metadata in its header."""
    return _safetensors_notes(file).items() >= CHECKPOINT_MARK.items()


def _safetensors_notes(file: Path) -> dict[str, Any]:
    """The metadata in a .safetensors file's header; empty for anything else."""
    with contextlib.suppress(OSError, ValueError, RecursionError), file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        head = json.loads(stream.read(size)) if size <= _LARGEST else None
        notes = head.get("__metadata__") if isinstance(head, dict) else None
        return notes if isinstance(notes, dict) else {}
    return {}


def is_plot(file: Path) -> bool:
    """Whether a file is a page that `sdkd plot` drew, by its head."""
    with contextlib.suppress(OSError), file.open("rb") as stream:
        return _PAGE.search(stream.read(2000)) is not None
    return False
