"""`sdkd inspect`: what is in a bundle, what is stale or damaged, and why."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from sdkd.bundle import Bundle, ComponentRecord, EngineRecord
from sdkd.console import show, show_json, table
from sdkd.errors import BundleError, MissingExtraError
from sdkd.targets import environment

MB = 1e6


def examine(bundle: Bundle, hashes: bool = True) -> dict[str, Any]:
    """A JSON-ready account of a bundle; with `hashes`, every file is read and compared with the manifest."""
    manifest = bundle.manifest
    return {
        "path": str(bundle.path),
        "source": dict(manifest.source),
        "versions": dict(manifest.versions),
        "components": [_component(bundle, record, hashes) for record in manifest.components.values()],
        "engines": [_engine(bundle, record, hashes) for record in manifest.engines.values()],
    }


def _damage(bundle: Bundle, record: ComponentRecord | EngineRecord, hashes: bool) -> list[str]:
    if not hashes:
        return []
    try:
        bundle.verify_files(record)
    except BundleError as error:
        return [str(error).split(": ", 1)[1]]
    return []


def _component(bundle: Bundle, record: ComponentRecord, hashes: bool) -> dict[str, Any]:
    return {
        "component": record.name,
        "precision": record.precision,
        "opset": record.opset,
        "parameters": record.parameters,
        "bytes": record.total_bytes,
        "export_seconds": record.seconds,
        "parity": record.parity,
        "problems": _damage(bundle, record, hashes),
    }


def _engine(bundle: Bundle, record: EngineRecord, hashes: bool) -> dict[str, Any]:
    return {
        "component": record.component,
        "slot": record.slot,
        "precision": record.precision,
        "ranges": record.ranges.to_json(),
        "environment": dict(record.environment),
        "built_for": list(record.built_for),
        "flags": dict(record.flags),
        "bytes": record.total_bytes,
        "build_seconds": record.seconds,
        "parity": record.parity,
        "problems": _damage(bundle, record, hashes) + bundle.stale_reasons(record, _here(record.target)),
    }


def _here(target: str) -> dict[str, str] | None:
    try:
        return environment(target)
    except MissingExtraError:
        return None


def _agreement(parity: Mapping[str, Any] | None) -> str:
    """The parity figure that says most in one cell."""
    if parity is None:
        return "not checked"
    for key in ("max_abs", "max_abs_error", "relative"):
        if key in parity:
            return f"{float(parity[key]):.1e}"
    return "checked"


def _state(problems: list[str]) -> str:
    return "; ".join(problems) if problems else "fresh"


def _tables(found: dict[str, Any]) -> list[Any]:
    components = [
        [
            row["component"], row["precision"], row["opset"], f"{row['parameters']:,}", f"{row['bytes'] / MB:,.1f}",
            _agreement(row["parity"]), _state(row["problems"]),
        ]
        for row in found["components"]
    ]  # fmt: skip
    columns = ["component", "precision", "opset", "parameters", "MB", "max error", "state"]
    slots = list(dict.fromkeys(row["slot"] for row in found["engines"]))
    return [
        table("ONNX, against PyTorch", columns, components),
        *(part for slot in slots for part in _slot(found, slot)),
    ]


def _slot(found: dict[str, Any], slot: str) -> list[Any]:
    """The engines of a slot as a table, and what all of them have in common as lines below it."""
    from sdkd.contract import ShapeRanges

    rows = [row for row in found["engines"] if row["slot"] == slot]
    engines = [
        [
            row["component"], row["precision"], f"{row['bytes'] / MB:,.1f}", f"{row['build_seconds']:.1f}",
            _agreement(row["parity"]), _state(row["problems"]),
        ]
        for row in rows
    ]  # fmt: skip
    columns = ["component", "precision", "MB", "build s", "max error", "state"]
    one = rows[0]
    made_for = (
        "compute capability " + ", ".join(one["built_for"]) if one["built_for"] else one["environment"].get("gpu")
    )
    return [
        table(f"Engines for {slot}, against ONNX", columns, engines),
        f"  takes {ShapeRanges.from_json(one['ranges'])}",
        f"  built for {made_for or 'this CPU'}",
    ]


def inspect(
    bundle: Annotated[Path, typer.Argument(help="A bundle folder.")],
    hashes: Annotated[bool, typer.Option(help="Read every file and compare its SHA-256 with the manifest.")] = True,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Say what is in a bundle, what is stale and why; status 1 when something is stale or damaged."""
    found = examine(Bundle.open(bundle), hashes)
    problems = [problem for row in found["components"] + found["engines"] for problem in row["problems"]]
    if json:
        show_json(found)
    else:
        source = found["source"]
        random = ", random weights" if source.get("random_weights") else ""
        show(f"[bold]{found['path']}[/]: {source.get('model', 'unknown model')}{random}")
        show(*_tables(found))
    if problems:
        raise BundleError(f"{len(problems)} of the parts need repair: {problems[0]}")
