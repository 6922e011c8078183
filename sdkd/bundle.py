"""The bundle folder and its manifest `bundle.json`: read, write, verify, and say why something is stale.

bundle/
  model_index.json, scheduler/, tokenizer/, <component>/config.json     as diffusers writes them
  <component>/model.onnx (+ model.onnx.data)                            Optimum's layout and names
  engines/<target>/<component>.*                                        one folder per target
  bundle.json                                                           this module
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from sdkd.contract import Contract, vae_scale
from sdkd.errors import BundleError, InputError, StaleEngineError
from sdkd.files import read_json, sha256, write_json
from sdkd.profiles import ShapeRanges

MANIFEST = "bundle.json"
SCHEMA = 1


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
        """The inverse of `to_json`; KeyError or TypeError on foreign data."""
        return Manifest(
            source=data["source"],
            versions=data["versions"],
            components={key: _component(row) for key, row in data["components"].items()},
            engines={key: _engine(row) for key, row in data["engines"].items()},
            schema=data["schema"],
        )


def _files(rows: list[Mapping[str, Any]]) -> tuple[FileRecord, ...]:
    return tuple(FileRecord(**row) for row in rows)


def _component(row: Mapping[str, Any]) -> ComponentRecord:
    return ComponentRecord(**{**row, "contract": Contract.from_json(row["contract"]), "files": _files(row["files"])})


def _engine(row: Mapping[str, Any]) -> EngineRecord:
    return EngineRecord(
        **{
            **row,
            "files": _files(row["files"]),
            "ranges": ShapeRanges.from_json(row["ranges"]),
            "built_for": tuple(row["built_for"]),
            "profiles": tuple(ShapeRanges.from_json(profile) for profile in row.get("profiles", ())),
        }
    )


def _check_places(bundle: Bundle) -> None:
    """BundleError unless every name in the manifest that becomes a path stays inside the bundle's folder."""
    records: list[ComponentRecord | EngineRecord] = [
        *bundle.manifest.components.values(),
        *bundle.manifest.engines.values(),
    ]
    names = [*bundle.manifest.components]
    for record in records:
        own = (record.name,) if isinstance(record, ComponentRecord) else (record.component, record.target, record.slot)
        names += own
    strange = [name for name in names if not name or name in (".", "..") or set(name) & set("/\\\0:")]
    outside = [file.path for record in records for file in record.files if _leaves(bundle.path, file.path)]
    if strange or outside:
        raise BundleError(
            f"{MANIFEST} of {str(bundle.path)!r} names {(strange + outside)[0]!r}, which does not stay inside the "
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


def _export_command(root: Path) -> str:
    """The command that makes a bundle where there is none: at `root`, or of the model that lies there."""
    if not root.exists():
        return f"sdkd export MODEL {root}"
    model = root if (root / "model_index.json").is_file() else "MODEL"
    return f"sdkd export {model} artifacts/bundle, and give that folder"


@dataclass(frozen=True)
class Bundle:
    """An opened bundle folder."""

    path: Path
    manifest: Manifest

    @staticmethod
    def open(path: str | Path) -> Bundle:
        """Read a bundle's manifest (files are not hashed here); BundleError says what is missing or foreign."""
        root = Path(path)
        if not (root / MANIFEST).is_file():
            raise BundleError(f"{str(root)!r} is not a bundle (no {MANIFEST}): make one with: {_export_command(root)}")
        try:
            data = read_json(root / MANIFEST)
            if data["schema"] != SCHEMA:
                raise BundleError(
                    f"{str(root)!r} has manifest schema {data['schema']}, this sdkd reads {SCHEMA}: export it again"
                )
            bundle = Bundle(root, Manifest.from_json(data))
            _check_places(bundle)
        except (InputError, KeyError, TypeError, AttributeError) as error:
            raise BundleError(f"{MANIFEST} of {str(root)!r} is damaged ({error}): export the model again") from error
        return bundle

    def save(self) -> None:
        """Write the manifest atomically."""
        write_json(self.path / MANIFEST, self.manifest.to_json())

    def config(self, component: str) -> dict[str, Any]:
        """The component's config.json; BundleError when it is missing or damaged."""
        try:
            return dict(read_json(self.path / component / "config.json"))
        except InputError as error:
            raise BundleError(f"bundle {str(self.path)!r}: {error}") from error

    def vae_config(self) -> dict[str, Any]:
        """The VAE's config, from whichever half was exported; BundleError without one."""
        halves = [name for name in ("vae_decoder", "vae_encoder") if (self.path / name / "config.json").is_file()]
        return self.config(halves[0] if halves else "vae_decoder")

    def scale(self) -> int:
        """Pixels per latent of the VAE."""
        return vae_scale(self.vae_config())

    def positions(self) -> int | None:
        """Tokens that the text encoder takes at once; None for a bundle without one."""
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
                f"build it with: sdkd build-engine {self.path} --target {slot}"
            )
        return self.manifest.engines[key]

    def slots(self) -> tuple[str, ...]:
        """Slots (`openvino`, `openvino-bf16`, ...) with at least one engine, in manifest order."""
        return tuple(dict.fromkeys(engine.slot for engine in self.manifest.engines.values()))

    def verify_files(self, record: ComponentRecord | EngineRecord) -> None:
        """BundleError when a file of the record is missing, truncated or altered (sizes first, then SHA-256)."""
        problem = next((found for file in record.files if (found := self._file_problem(file))), None)
        if problem:
            raise BundleError(f"bundle {str(self.path)!r}: {problem}; make it again: {self._repair(record)}")

    def _file_problem(self, file: FileRecord) -> str | None:
        path = self.path / file.path
        if not path.is_file():
            return f"{file.path} is missing"
        size = path.stat().st_size
        if size != file.bytes:
            return f"{file.path} has {size} bytes instead of {file.bytes} (truncated or altered)"
        if sha256(path) != file.sha256:
            return f"{file.path} was altered: its SHA-256 differs from the manifest's"
        return None

    def _repair(self, record: ComponentRecord | EngineRecord) -> str:
        if isinstance(record, ComponentRecord):
            return f"sdkd export {self.manifest.source.get('model', 'MODEL')} {self.path} --overwrite"
        return f"sdkd build-engine {self.path} --target {record.slot}"

    def stale_reasons(self, record: EngineRecord, environment: Mapping[str, str] | None = None) -> list[str]:
        """Why an engine must be rebuilt, in words: other weights, or an environment value that differs.

        `environment` is what the running target reports; None checks the weights only.
        """
        reasons = []
        if record.onnx_sha256 != self.component(record.component).onnx_sha256:
            reasons.append(f"{record.component} was exported again after the engine was built")
        for key, built in record.environment.items():
            here = None if environment is None else environment.get(key)
            if here is not None and here != built:
                reasons.append(f"built with {key.replace('_', ' ')} {built}, here it is {here}")
        gpu = (environment or {}).get("compute_capability")
        if gpu and record.built_for and gpu not in record.built_for:
            names = ", ".join(record.built_for)
            reasons.append(f"built for compute capability {names}, here it is {gpu} (sdkd doctor --try tries that one)")
        return reasons

    def check_fresh(self, record: EngineRecord, environment: Mapping[str, str]) -> None:
        """StaleEngineError, in one sentence with the repairing command, when `stale_reasons` finds any."""
        if reasons := self.stale_reasons(record, environment):
            raise StaleEngineError(
                f"the {record.slot} engine of {record.component} in {str(self.path)!r} does not fit: "
                f"{'; '.join(reasons)}. Rebuild it with: {self._repair(record)}"
            )
