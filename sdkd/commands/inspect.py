"""`sdkd inspect`: what is in a bundle, what is stale or damaged, and why."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from sdkd.bundle.manifest import REPLACEMENTS, Bundle, ComponentRecord, EngineRecord
from sdkd.bundle.memory import run_memory
from sdkd.bundle.quantized import KEYS
from sdkd.commands import rounding
from sdkd.core.console import show, show_json, styled, table
from sdkd.core.contract import Contract
from sdkd.core.profiles import ShapeRanges
from sdkd.errors import BundleError, MissingExtraError, SdkdError
from sdkd.models.fused import recorded_loras
from sdkd.models.generation import Generation
from sdkd.models.resolve import resolve
from sdkd.targets.registry import environment

MB = 1e6
SHOWN = 12  # kinds of operators or layers in a table; the rest is counted


def examine(bundle: Bundle, hashes: bool = True, layers: bool = False) -> dict[str, Any]:
    """A JSON-ready account of a bundle; with `hashes`, every file is read and compared with the manifest.

    With `layers`, engines that run here are opened and asked for their layers.
    """
    manifest = bundle.manifest
    return {
        "path": str(bundle.path),
        "source": dict(manifest.source),
        "generation": None if (made := resolve(bundle.path).generation) is None else made.to_json(),
        "versions": dict(manifest.versions),
        "files": None if manifest.files is None else len(manifest.files),
        "components": [_component(bundle, record, hashes) for record in manifest.components.values()],
        "engines": [_engine(bundle, record, hashes, layers) for record in manifest.engines.values()],
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
        "contract": record.contract.to_json(),
        "details": dict(record.details),
        "problems": _damage(bundle, record, hashes),
    }


def _engine(bundle: Bundle, record: EngineRecord, hashes: bool, layers: bool) -> dict[str, Any]:
    problems = _damage(bundle, record, hashes) + bundle.stale_reasons(record, _here(record.target))
    return {
        "component": record.component,
        "slot": record.slot,
        "precision": record.precision,
        "ranges": record.ranges.to_json(),
        "profiles": [profile.to_json() for profile in record.profiles],
        "environment": dict(record.environment),
        "built_for": list(record.built_for),
        "flags": dict(record.flags),
        "quantized": rounding.decision(record.flags),
        "bytes": record.total_bytes,
        "memory_bytes": _memory(bundle, record),
        "build_seconds": record.seconds,
        "parity": record.parity,
        "layers": _layers(bundle, record) if layers and not problems else None,
        "problems": problems,
    }


def _memory(bundle: Bundle, record: EngineRecord) -> int | None:
    """About what the engine takes when it runs; None where the bundle's configs do not say enough."""
    try:
        return run_memory(bundle, record)
    except (SdkdError, KeyError):
        return None


def _layers(bundle: Bundle, record: EngineRecord) -> list[dict[str, Any]] | str:
    """Layers by type and precision, or why they cannot be had here."""
    from engines.pipelines.layers import count_layers

    try:
        found = count_layers(bundle, record.slot, record.component)
    except SdkdError as error:
        return str(error)
    return [{"type": kind, "precision": precision, "count": count} for kind, precision, count in found]


def _here(target: str) -> dict[str, str] | None:
    try:
        return environment(target)
    except MissingExtraError:
        return None


def _agreement(parity: Mapping[str, Any] | None) -> str:
    """The parity figure that says most in one cell."""
    if parity is None:
        return "-"
    for key in ("max_abs", "max_abs_error", "relative"):
        if key in parity:
            return f"{float(parity[key]):.1e}"
    return "checked"


def _megabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / MB:,.1f}"


def _state(problems: list[str]) -> str:
    return "repair" if problems else "fresh"


def _reasons(row: Mapping[str, Any], name: str) -> list[Any]:
    return [styled(f"  {name}: {problem}", "red") for problem in row["problems"]]


def _short(found: dict[str, Any]) -> list[Any]:
    """One table of components, one per slot; reasons below, in full."""
    components = [
        [
            row["component"],
            row["precision"],
            f"{row['parameters']:,}",
            _megabytes(row["bytes"]),
            _agreement(row["parity"]),
            _state(row["problems"]),
        ]
        for row in found["components"]
    ]
    columns = ["component", "precision", "parameters", "MB", "max error", "state"]
    slots = list(dict.fromkeys(row["slot"] for row in found["engines"]))
    return [
        table("ONNX, against PyTorch", columns, components),
        *(line for row in found["components"] for line in _reasons(row, row["component"])),
        *(part for slot in slots for part in _slot(found, slot)),
    ]


def _slot(found: dict[str, Any], slot: str) -> list[Any]:
    """The engines of a slot as a table, and what they were built for as lines below it."""
    rows = [row for row in found["engines"] if row["slot"] == slot]
    engines = [
        [
            row["component"],
            row["precision"],
            _megabytes(row["bytes"]),
            _megabytes(row["memory_bytes"]),
            f"{row['build_seconds']:.1f}",
            _agreement(row["parity"]),
            _state(row["problems"]),
        ]
        for row in rows
    ]
    columns = ["component", "precision", "MB", "MB to run", "built s", "error", "state"]
    shapes = dict.fromkeys(str(ShapeRanges.from_json(profile)) for row in rows for profile in row["profiles"])
    return [
        table(f"Engines for {slot}, against ONNX", columns, engines),
        *(f"  takes {text}" for text in shapes),
        f"  built for {_made_for(min(rows, key=lambda row: len(row['built_for'])))}",
        *(part for row in rows for part in rounding.short(row)),
        *(line for row in rows for line in _reasons(row, row["component"])),
    ]


def _made_for(row: Mapping[str, Any]) -> str:
    if row["built_for"]:
        return "compute capability " + ", ".join(row["built_for"])
    return str(row["environment"].get("gpu") or "this CPU")


def _details(found: dict[str, Any]) -> list[Any]:
    """Contracts and operators of each component; flags, environment and layers of each engine."""
    parts: list[Any] = []
    for row in found["components"]:
        contract = Contract.from_json(row["contract"])
        tensors = [
            [side, spec.name, spec.dtype, " x ".join(map(str, spec.axes)) or "one value"]
            for side, specs in (("in", contract.inputs), ("out", contract.outputs))
            for spec in specs
        ]
        parts.append(table(f"{row['component']}: opset {row['opset']}", ["", "tensor", "dtype", "axes"], tensors))
        if operators := row["details"].get("operators"):
            parts.append(f"  {row['details'].get('nodes', sum(operators.values()))} nodes: {_counted(operators)}")
    for row in found["engines"]:
        parts.append(styled(f"{row['slot']} {row['component']}", "bold"))
        flags = {key: value for key, value in row["flags"].items() if not (row["quantized"] and key in KEYS)}
        parts += [f"  {key}: {value}" for key, value in {**row["environment"], **flags}.items()]
        parts += rounding.details(row)
        parts.append(_layer_table(row["layers"]))
    return parts


def _counted(counts: Mapping[str, int]) -> str:
    first = [f"{name} {count}" for name, count in list(counts.items())[:SHOWN]]
    rest = sum(list(counts.values())[SHOWN:])
    return ", ".join(first) + (f", others {rest}" if rest else "")


def _layer_table(layers: list[dict[str, Any]] | str | None) -> Any:
    if not isinstance(layers, list):
        return f"  layers: {layers or 'not asked for, since the engine needs repair'}"
    rows = [[row["type"], row["precision"], row["count"]] for row in layers[:SHOWN]]
    rest = sum(row["count"] for row in layers[SHOWN:])
    return table("", ["layer", "precision", "number"], [*rows, ["others", "", rest]] if rest else rows)


def _examined(path: Path, hashes: bool, details: bool) -> dict[str, Any]:
    """As `examine`, once more when engines were built meanwhile."""
    while True:
        opened = Bundle.open(path)
        found = examine(opened, hashes, layers=details)
        if Bundle.open(path).manifest == opened.manifest:
            return found


def inspect(
    bundle: Annotated[Path, typer.Argument(help="A bundle folder.")],
    hashes: Annotated[bool, typer.Option(help="Read every file and compare its SHA-256 with the manifest.")] = True,
    details: Annotated[bool, typer.Option("--details", help="Contracts, operators, options, layers, too.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Say what is in a bundle, what is stale and why; status 1 when something is stale or damaged."""
    found = _examined(bundle, hashes, details)
    problems = [problem for row in found["components"] + found["engines"] for problem in row["problems"]]
    if json:
        show_json(found)
    else:
        source = found["source"]
        others = "".join(f", {part} {source[part]}" for part in REPLACEMENTS if part in source)
        random = ", random weights" if source.get("random_weights") else ""
        show(styled(f"{found['path']}: {source.get('model', 'unknown model')}{others}{random}", "bold"))
        for lora in recorded_loras(source):
            show(f"LoRA {lora.file}, scale {lora.scale:g}, fused (sha256 {lora.sha256[:12]})")
        if made := found["generation"]:
            show(f"made to be run with {Generation.from_json(made)}")
        show(*_short(found), *(_details(found) if details else []))
        if found["files"] is None:
            show(
                "Scheduler, tokenizer and configurations have no hashes here: bundles that are exported now have them."
            )
    if problems:
        row = next(row for row in found["components"] + found["engines"] if row["problems"])
        opened = Bundle.open(bundle)
        record = opened.engine(row["slot"], row["component"]) if "slot" in row else opened.component(row["component"])
        command = opened.repair(record)
        again = "" if problems[0].endswith(command) else f". Make it again with: {command}"
        raise BundleError(f"{len(problems)} of the parts need repair: {problems[0]}{again}")
