"""The bundle folder and its manifest `bundle.json`: read, write, verify, and say why something is stale.

bundle/
  model_index.json, scheduler/, tokenizer/, <component>/config.json     as diffusers writes them
  <component>/model.onnx (+ model.onnx.data)                            Optimum's layout and names
  engines/<target>/[build-*/]<component>.*                              one folder per target; later builds below it
  bundle.json                                                           this module
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from sdkd.bundle import manifest_checks as checks
from sdkd.bundle.onnx_weights import check_external_data
from sdkd.bundle.quantized import CALIBRATION_FILE
from sdkd.core.contract import Contract, vae_scale
from sdkd.core.files import read_json, sha256, write_json
from sdkd.core.numbers import config_problem
from sdkd.core.profiles import ShapeRanges
from sdkd.core.schema import construct, problem
from sdkd.errors import BundleError, InputError, StaleEngineError
from sdkd.families import Family, family_of_pipeline, family_of_unet

MANIFEST = "bundle.json"
SCHEMA = 1
_verified: set[tuple[str, int, FileRecord]] = set()

REPLACEMENTS = ("vae", "controlnet")  # what `sdkd export` takes from elsewhere, as a manifest's source names it


@dataclass(frozen=True)
class FileRecord:
    """A file of the bundle: path relative to the bundle, size in bytes, SHA-256."""

    path: str
    bytes: int
    sha256: str

    @staticmethod
    def of(root: Path, file: Path) -> FileRecord:
        """Record an existing file below `root`."""
        return FileRecord(file.relative_to(root).as_posix(), file.stat().st_size, sha256(file))

    def problem(self, root: Path, once: bool = False) -> str | None:
        """Why the file below `root` is not what this says, bytes first, then SHA-256; None when it is.

        `once` per process as long as size and time of change stay the same.
        """
        path = root / self.path
        if not path.is_file():
            return f"{self.path} is missing"
        status = path.stat()
        if status.st_size != self.bytes:
            return f"{self.path} has {status.st_size} bytes instead of {self.bytes} (truncated or altered)"
        key = (str(path.resolve()), status.st_mtime_ns, self)
        if not (once and key in _verified):
            if sha256(path) != self.sha256:
                return f"{self.path} was altered: its SHA-256 differs from the manifest's"
            _verified.add(key)
        return None


@dataclass(frozen=True)
class ComponentRecord:
    """One exported component: its contract, ONNX files (the graph first), and how it agreed with PyTorch."""

    name: str
    contract: Contract
    precision: str
    opset: int
    files: tuple[FileRecord, ...]
    source_sha256: str
    parameters: int
    seconds: float
    parity: Mapping[str, Any] | None = None  # None: exported with --no-verify
    details: Mapping[str, Any] = field(default_factory=dict)
    program: FileRecord | None = None  # what the graph was made of (`sdkd.bundle.program`); None in bundles of before

    @property
    def onnx_sha256(self) -> str:
        """One digest over graph and weights: what an engine must have been built from."""
        return "-".join(file.sha256[:16] for file in self.files)

    @property
    def total_bytes(self) -> int:
        """Size of all files on disk."""
        return sum(file.bytes for file in self.files)


@dataclass(frozen=True)
class EngineRecord:
    """One engine of one component for one target, and everything it depends on."""

    component: str
    target: str
    precision: str
    files: tuple[FileRecord, ...]
    onnx_sha256: str
    ranges: ShapeRanges
    environment: Mapping[str, str]  # what must be equal where it runs: target version, platform, GPU, ...
    seconds: float
    flags: Mapping[str, Any] = field(default_factory=dict)
    parity: Mapping[str, Any] | None = None
    built_for: tuple[str, ...] = ()  # compute capabilities of an ahead-of-time build, e.g. ("8.6", "8.9")
    slot: str = ""  # the target, or target-precision where the engine's precision is not the ONNX's
    profiles: tuple[ShapeRanges, ...] = ()  # what it was built for; `ranges` covers all of them

    def __post_init__(self) -> None:
        if not self.profiles:  # as in bundles from before there were several
            object.__setattr__(self, "profiles", (self.ranges,))

    @property
    def total_bytes(self) -> int:
        """Size of all files on disk."""
        return sum(file.bytes for file in self.files)


@dataclass(frozen=True)
class Manifest:
    """What bundle.json holds."""

    source: Mapping[str, Any]  # model, revision, kind, random weights or not, sha256 per component
    versions: Mapping[str, str]
    components: Mapping[str, ComponentRecord] = field(default_factory=dict)
    engines: Mapping[str, EngineRecord] = field(default_factory=dict)  # key: "<slot>/<component>"
    schema: int = SCHEMA
    files: tuple[FileRecord, ...] | None = None  # configs, tokenizer, ...; None in bundles of before: unchecked

    def with_engine(self, record: EngineRecord) -> Manifest:
        """A copy that holds `record`, replacing any of the same slot and component."""
        return replace(self, engines={**self.engines, f"{record.slot}/{record.component}": record})

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        data = asdict(self)
        for key, engine in self.engines.items():
            data["engines"][key]["ranges"] = engine.ranges.to_json()
            data["engines"][key]["profiles"] = [profile.to_json() for profile in engine.profiles]
        return data

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Manifest:
        """The inverse of `to_json`; TypeError on foreign data, keys of later versions are left alone."""
        found: Manifest = construct(data, Manifest)
        return found


def _read_manifest(root: Path) -> Manifest:
    """The manifest of a bundle's folder; BundleError when it is damaged, foreign, or names what it may not."""
    try:
        data = read_json(root / MANIFEST, dict[str, Any], strict=True)
        if data.get("schema", SCHEMA) != SCHEMA:
            raise BundleError(
                f"{str(root)!r} has manifest schema {data['schema']!r}, this sdkd reads {SCHEMA}: export it again"
            )
        if wrong := problem({each.name: data[each.name] for each in fields(Manifest) if each.name in data}, Manifest):
            raise InputError(wrong)
        checks.check_places(root, data)
        if strange := next(checks.strange_values(data), None):
            raise InputError(strange)
        return Manifest.from_json(data)
    except (InputError, KeyError, TypeError) as error:
        raise BundleError(f"{MANIFEST} of {str(root)!r} is damaged ({error}): export the model again") from error


@dataclass(frozen=True)
class Bundle:
    """An opened bundle folder."""

    path: Path
    manifest: Manifest

    @staticmethod
    def open(path: str | Path) -> Bundle:
        """Read a bundle's manifest and check its small files; BundleError says what is missing, altered or foreign.

        Graphs and engines are hashed when they are used (`verify_files`).
        """
        root = Path(path)
        if not (root / MANIFEST).is_file():
            if any(root.glob("unet/model.onnx")) or any(root.glob("unet/openvino_model.xml")):
                raise BundleError(
                    f"{str(root)!r} is an export by Optimum or another tool, not a bundle (no {MANIFEST}): make one "
                    "from the model that it was made from, with: sdkd export MODEL BUNDLE"
                )
            raise BundleError(
                f"{str(root)!r} is not a bundle (no {MANIFEST}): make one with: {checks.export_command(root)}"
            )
        bundle = Bundle(root, _read_manifest(root))
        bundle.verify_rest()
        return bundle

    def save(self) -> None:
        """Write the manifest atomically."""
        write_json(self.path / MANIFEST, self.manifest.to_json())

    def with_rest(self) -> Bundle:
        """A fresh bundle with the hashes of all files that belong to no graph: configs, scheduler, tokenizer; without
        a calibration, which may be recorded again.
        """
        components = self.manifest.components.values()
        known = {file.path for record in components for file in (*record.files, record.program) if file}
        known |= {MANIFEST, CALIBRATION_FILE}
        there = (FileRecord.of(self.path, file) for file in sorted(self.path.rglob("*")) if file.is_file())
        return replace(self, manifest=replace(self.manifest, files=tuple(f for f in there if f.path not in known)))

    def config(self, component: str, name: str = "config.json") -> dict[str, Any]:
        """A component's configuration; BundleError when it is missing, damaged, or has numbers that no model has."""
        found = self.json(f"{component}/{name}")
        if wrong := config_problem(found, component):
            raise BundleError(f"bundle {str(self.path)!r}: {component}/{name}: {wrong}; export the model again")
        return found

    def json(self, name: str) -> dict[str, Any]:
        """An object in a JSON file of the bundle; BundleError when it is missing or damaged."""
        try:
            return dict(read_json(self.path / name, dict[str, Any]))
        except InputError as error:
            advice = "" if (self.path / name).exists() else ": export the model again, with all its components"
            raise BundleError(f"bundle {str(self.path)!r}: {error}{advice}") from error

    def vae_config(self) -> dict[str, Any]:
        """The VAE's config, from whichever half was exported; BundleError without one."""
        halves = [name for name in ("vae_decoder", "vae_encoder") if (self.path / name / "config.json").is_file()]
        return self.config(halves[0] if halves else "vae_decoder")

    def scale(self) -> int:
        """Pixels per latent of the VAE."""
        return vae_scale(self.vae_config())

    @cached_property
    def family(self) -> Family:
        """The family of its model, by the class of its pipeline; where it names none, by its UNet."""
        index = self.json("model_index.json") if (self.path / "model_index.json").is_file() else {}
        named = family_of_pipeline(str(index.get("_class_name")))
        return named or family_of_unet(self.config("unet") if "unet" in self.manifest.components else {})

    def positions(self) -> int | None:
        """Tokens that a text encoder takes at once; None for a bundle without one."""
        if not (self.path / "text_encoder" / "config.json").is_file():
            return None
        return int(self.config("text_encoder")["max_position_embeddings"])

    def component(self, name: str) -> ComponentRecord:
        """Record of an exported component; BundleError lists what the bundle has."""
        if name not in self.manifest.components:
            have = ", ".join(self.manifest.components) or "nothing"
            raise BundleError(f"bundle {str(self.path)!r} has no component {name!r} (it has {have}): export it again")
        return self.manifest.components[name]

    def engine(self, slot: str, component: str) -> EngineRecord:
        """Record of a built engine; BundleError names the command that builds it."""
        key = f"{slot}/{component}"
        if key not in self.manifest.engines:
            have = ", ".join(self.slots()) or "none"
            raise BundleError(
                f"bundle {str(self.path)!r} has no {slot} engine for {component} (built so far: {have}): "
                f"build it with: {self.build_command(slot)}"
            )
        return self.manifest.engines[key]

    def slots(self) -> tuple[str, ...]:
        """Slots (`openvino`, `openvino-bf16`, ...) with at least one engine, in manifest order."""
        return tuple(dict.fromkeys(engine.slot for engine in self.manifest.engines.values()))

    def verify_files(self, record: ComponentRecord | EngineRecord) -> None:
        """BundleError when a file of the record is missing, truncated or altered (sizes first, then SHA-256)."""
        found = next((found for file in record.files if (found := file.problem(self.path))), None)
        if found:
            raise BundleError(f"bundle {str(self.path)!r}: {found}; make it again: {self.repair(record)}")

    def verify_weights(self, record: ComponentRecord | EngineRecord) -> None:
        """BundleError when a graph of the record takes weights from a file that the record does not list."""
        listed = [self.path / file.path for file in record.files]
        for graph in (path for path in listed if path.suffix == ".onnx"):
            check_external_data(graph, listed, engine=isinstance(record, EngineRecord))

    def verify_rest(self) -> None:
        """BundleError when a file beside the graphs (`Manifest.files`) is missing or altered, or not all are listed."""
        listed = self.manifest.files
        there = [file for folder in ("scheduler", "tokenizer") for file in (self.path / folder).glob("[!.]*")]
        names = [file.relative_to(self.path).as_posix() for file in there if listed is not None or not file.is_file()]
        known = {file.path for file in listed or ()}
        found = next((found for file in listed or () if (found := file.problem(self.path, once=True))), None)
        found = found or next((f"{name} is not in the manifest" for name in names if name not in known), None)
        if found:
            raise BundleError(f"bundle {str(self.path)!r}: {found}; restore it, or make all again: {self._made_by()}")

    def repair(self, record: ComponentRecord | EngineRecord) -> str:
        """The command that makes a graph or an engine again, as a shell reads it."""
        if isinstance(record, ComponentRecord):
            return self._made_by()
        onnx = self.manifest.components.get("unet", record).precision
        return checks.rebuild_command(self.path, asdict(record), onnx, [one.options() for one in record.profiles])

    def build_command(self, slot: str) -> str:
        """The command that builds the engines of a slot into this bundle, as a shell reads it."""
        return shlex.join(["sdkd", "build-engine", str(self.path), "--target", slot])

    def _made_by(self) -> str:
        precision = next((record.precision for record in self.manifest.components.values()), "fp32")
        source = self.manifest.source
        replaced = {part: str(source[part]) for part in REPLACEMENTS if source.get(part) is not None}
        return checks.made_by_command(self.path, source, replaced, precision)

    def stale_reasons(self, record: EngineRecord, environment: Mapping[str, str] | None = None) -> list[str]:
        """Why an engine must be rebuilt, in words: other weights, or an environment value that differs.

        `environment` is what the running target reports; None checks the weights only.
        """
        reasons = []
        if record.onnx_sha256 != self.component(record.component).onnx_sha256:
            reasons.append(f"{record.component} was exported again after the engine was built")
        for key, built in record.environment.items():
            if (here := (environment or {}).get(key)) not in (None, built):
                reasons.append(f"built with {key.replace('_', ' ')} {built}, here it is {here}")
        gpu = (environment or {}).get("compute_capability")
        if gpu and record.built_for and gpu not in record.built_for:
            names = ", ".join(record.built_for)
            reasons.append(f"built for compute capability {names}, here it is {gpu} (sdkd doctor --try tries that one)")
        return reasons + checks.unknown_options(record.flags)

    def check_fresh(self, record: EngineRecord, environment: Mapping[str, str]) -> None:
        """StaleEngineError, in one sentence with the repairing command, when `stale_reasons` finds any."""
        if reasons := self.stale_reasons(record, environment):
            raise StaleEngineError(
                f"the {record.slot} engine of {record.component} in {str(self.path)!r} does not fit: "
                f"{'; '.join(reasons)}. Rebuild it with: {self.repair(record)}"
            )
