"""What a bundle's manifest may not say, whoever wrote it: looked at before anything that it names is opened."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from sdkd.bundle.quantized import flags_problem
from sdkd.core.contract import ENGINE_PRECISIONS, PRECISIONS
from sdkd.errors import BundleError

# Options of OpenVINO that an engine's build writes down; any other could name files to write or libraries to load.
OPENVINO_CONFIG = ("INFERENCE_PRECISION_HINT", "PERFORMANCE_HINT")
# What an engine's record can say of its build, as `sdkd build-engine` takes it.
BUILD_OPTIONS = {
    name: f"--{name.replace('_', '-')}"
    for name in ("optimization_level", "workspace_gb", "refit", "hardware_compatible", "memory_cap_gb")
} | {"compute_capabilities": "--compute-capability"}
DTYPES = ("float32", "float16", "bfloat16", "int64", "int32")
_AXIS = re.compile(r"(batch|sequence|images|(image_)?(height|width))(_\d{1,2})?( [*/] [1-9]\d?)?")
_LARGEST_AXIS = 1 << 20


def check_places(root: Path, manifest: Mapping[str, Any]) -> None:
    """BundleError unless every name in a manifest (as JSON) that becomes a path stays inside the bundle's folder."""
    components, engines = manifest["components"], manifest["engines"]
    names = [*components, *(row["name"] for row in components.values())]
    names += [row.get(key, "") for row in engines.values() for key in ("component", "target", "slot")]
    strange = [name for name in names if not name or name in (".", "..") or set(name) & set("/\\\0:")]
    rows = [*components.values(), *engines.values(), {"files": manifest.get("files") or ()}]
    files = [file for row in rows for file in (*row["files"], row.get("program")) if file]
    outside = [file["path"] for file in files if _leaves(root, file["path"])]
    if strange or outside:
        raise BundleError(
            f"bundle.json of {str(root)!r} names {(strange + outside)[0]!r}, which does not stay inside the "
            "bundle's folder: do not trust it; if it is a download that consists of links, make it again "
            "without them (hf download --local-dir)"
        )


def _leaves(root: Path, path: str) -> bool:
    """Whether a path of the manifest is absolute, goes up, or leads out of the bundle through a link."""
    if PurePosixPath(path).is_absolute() or {"..", ""} & set(path.replace("\\", "/").split("/")) or "\0" in path:
        return True
    try:
        return not (root / path).resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError):  # a circle of links
        return True


def strange_values(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Values of a manifest (as JSON, of the right types) that nothing could have written, with their keys."""
    for name, row in manifest["components"].items():
        yield from _strange_record(f"components.{name}", row)
        for side in ("inputs", "outputs"):
            for spec in row["contract"][side]:
                yield from _strange_tensor(f"components.{name}.contract.{side}", spec)
    for name, row in manifest["engines"].items():
        yield from _strange_record(f"engines.{name}", row, ENGINE_PRECISIONS)
        config = row.get("flags", {}).get("config", {})
        if not isinstance(config, dict) or not set(config) <= set(OPENVINO_CONFIG):
            yield f"engines.{name}.flags.config is {config!r}, it can have {' and '.join(OPENVINO_CONFIG)} alone"
        if not isinstance(options := row.get("flags", {}).get("options", {}), dict):
            yield f"engines.{name}.flags.options is {options!r}, it can be options by name alone"
        if wrong := flags_problem(row.get("flags", {})):
            yield f"engines.{name}.{wrong}"


def _strange_record(where: str, row: Mapping[str, Any], precisions: Sequence[str] = PRECISIONS) -> Iterator[str]:
    if row["precision"] not in precisions:
        yield f"{where}.precision is {row['precision']!r}, not one of {', '.join(precisions)}"
    if not row["files"]:
        yield f"{where}.files is empty"


def _strange_tensor(where: str, spec: Mapping[str, Any]) -> Iterator[str]:
    if spec["dtype"] not in DTYPES:
        yield f"{where}: dtype of {spec['name']} is {spec['dtype']!r}, not one of {', '.join(DTYPES)}"
    for axis in spec["axes"]:
        known = _AXIS.fullmatch(axis) if isinstance(axis, str) else 1 <= axis <= _LARGEST_AXIS
        if not known:
            yield f"{where}: {spec['name']} has the axis {axis!r}, which is neither a size nor a known name"


def unknown_options(flags: Mapping[str, Any]) -> list[str]:
    """What an engine's record says of its build and this version does not know: the engine may lack weights."""
    unknown = [name for name in flags.get("options", {}) if name not in BUILD_OPTIONS]
    return [f"built with the option {name}, which this version of sdkd does not have" for name in unknown]


def rebuild_command(root: Path, engine: Mapping[str, Any], onnx: str, shapes: Sequence[Mapping[str, str]]) -> str:
    """The command that builds an engine (its record as JSON) again, from a graph of precision `onnx`, as it was built.

    `shapes`: its profiles as the command's options.
    """
    one, several = (shapes[0], []) if len(shapes) == 1 else ({}, shapes)
    wanted = ["--precision", onnx] if engine["slot"] == engine["target"] else []
    wanted += [word for name, value in one.items() for word in (f"--{name}", value)]
    wanted += [word for each in several for word in ("--profile", ",".join(f"{k}={v}" for k, v in each.items()))]
    for option, value in engine.get("flags", {}).get("options", {}).items():
        if option in BUILD_OPTIONS:
            wanted += [BUILD_OPTIONS[option], ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    return shlex.join(["sdkd", "build-engine", str(root), "--target", engine["slot"], *wanted])


def made_by_command(root: Path, source: Mapping[str, Any], replaced: Mapping[str, str], precision: str) -> str:
    """The command that exports a bundle again from what its manifest says of its source."""
    rows = source.get("loras")
    loras = [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else []
    given = [*((f"--{part}", name) for part, name in replaced.items())]
    given += [("--lora", f"{row.get('file')}:{row.get('scale')}") for row in loras]
    others = [word for option, name in given for word in (option, name if name.isprintable() else "FOLDER")]
    others += [] if precision == "fp32" else ["--precision", precision]
    model = str(source.get("model", "MODEL"))
    return shlex.join(["sdkd", "export", model if model.isprintable() else "MODEL", str(root), *others, "--overwrite"])


def export_command(root: Path) -> str:
    """The command that makes a bundle where there is none: at `root`, or of the model that lies there."""
    if not root.exists():
        return shlex.join(["sdkd", "export", "MODEL", str(root)])
    model = str(root) if (root / "model_index.json").is_file() else "MODEL"
    return f"{shlex.join(['sdkd', 'export', model, 'artifacts/bundle'])}, and give that folder"
