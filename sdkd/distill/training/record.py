"""The record of a checkpoint, written last, with digests of itself and of all files; and the checkpoints of a run."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from sdkd.core.files import read_json, sha256, write_json
from sdkd.core.schema import problem
from sdkd.errors import InputError
from sdkd.models.checkpoint import RECORD

SCHEMA = 1
_NAME = re.compile(r"checkpoint-(\d+)")


class Record(TypedDict):
    """What checkpoint.json says for any run; each kind of run adds what it goes on from."""

    schema: int
    step: int
    settings: dict[str, Any]
    digests: dict[str, str]
    files: dict[str, str]
    sha256: str


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run folder, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name) and (path / RECORD).is_file()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Optimizer steps done at a checkpoint, from its name."""
    match = _NAME.fullmatch(checkpoint.name)
    if not match:
        raise InputError(f"folder {str(checkpoint)!r} is no checkpoint: give one named checkpoint-<step>")
    return int(match[1])


def keep_newest(path: Path, keep: int) -> None:
    """Delete the checkpoints beside a new one that are of later steps, from a run that was left, or beyond `keep`."""
    there = checkpoints(path.parent)
    newest = there.index(path) + 1
    for old in (*there[newest:], *there[:newest][:-keep]):
        shutil.rmtree(old)


def write_record(folder: Path, values: Mapping[str, Any]) -> None:
    """Write checkpoint.json of a folder that is complete but for it."""
    files = {str(file.relative_to(folder)): sha256(file) for file in sorted(folder.rglob("*")) if file.is_file()}
    record = {"schema": SCHEMA, **values, "files": files}
    write_json(folder / RECORD, record | {"sha256": _digest(record)})


def _digest(record: Mapping[str, Any]) -> str:
    """SHA-256 of a record, but for its own."""
    text = json.dumps({key: value for key, value in record.items() if key != "sha256"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_record(path: Path, kind: type[Record] = Record) -> dict[str, Any]:
    """What checkpoint.json says, of a run of a kind; InputError when it is damaged or of another version."""
    try:
        record: dict[str, Any] = read_json(path / RECORD, dict[str, Any], strict=True)
    except InputError as error:
        raise damaged(path, f"cannot be read ({error})") from None
    if (schema := record.get("schema", SCHEMA)) != SCHEMA:
        raise InputError(
            f"checkpoint {str(path)!r} has schema {schema!r}, this sdkd reads {SCHEMA}: go on with the version that "
            "wrote it"
        )
    if wrong := problem(record, kind):
        raise damaged(path, f"is not what was written ({RECORD}: {wrong})")
    if record["sha256"] != _digest(record):
        raise damaged(path, f"was changed in {RECORD}")
    return record


def check_files(path: Path, record: Mapping[str, Any]) -> None:
    """InputError when a file is not what was written."""
    for name, digest in record["files"].items():
        if not (path / name).is_file() or sha256(path / name) != digest:
            raise damaged(path, f"was changed in {name}")


def damaged(path: Path, how: str) -> InputError:
    """The error for a damaged checkpoint: it names the one before, if there is one."""
    before = [other for other in checkpoints(path.parent) if step_of(other) < step_of(path)]
    way = (
        f"go on from the one before with --resume {shlex.quote(str(before[-1]))}"
        if before
        else "start over with --overwrite"
    )
    return InputError(f"checkpoint {str(path)!r} {how}: delete it, and {way}")
