"""Components that another bundle already holds: a student's text encoder and VAE are its teacher's."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sdkd.bundle.manifest import Bundle, ComponentRecord
from sdkd.errors import BundleError


@dataclass(frozen=True)
class Wanted:
    """What must be equal for an exported component to be taken over."""

    name: str
    source_sha256: str
    precision: str
    opset: int
    versions: Mapping[str, str]
    verify: bool
    # That change the graph: hidden states, residuals, islands asked for, static shapes; what is off may be left out.
    options: Mapping[str, Any] = field(default_factory=dict)


def find(bundles: Sequence[str | Path], wanted: Wanted) -> tuple[Bundle, ComponentRecord] | None:
    """The first bundle with the same component: same weights, precision, opset and library versions, checked if that
    is wanted, and undamaged. A path that holds no bundle is passed over.
    """
    for path in bundles:
        try:
            bundle = Bundle.open(path)
            record = bundle.component(wanted.name)
            if _same(bundle, record, wanted):
                bundle.verify_files(record)
                return bundle, record
        except BundleError:
            continue
    return None


def _same(bundle: Bundle, record: ComponentRecord, wanted: Wanted) -> bool:
    return (
        (record.source_sha256, record.precision, record.opset) == (wanted.source_sha256, wanted.precision, wanted.opset)
        and dict(bundle.manifest.versions) == dict(wanted.versions)
        and (record.parity is not None or not wanted.verify)
        and _on(record.details.get("options", {})) == _on(wanted.options)
    )


def _on(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value}


def take(bundle: Bundle, record: ComponentRecord, folder: Path) -> ComponentRecord:
    """Copy a component's folder (graph, weights, config, initializers) into a new bundle; its record there.

    Copied, not linked: a later weight swap in one bundle must not reach the other.
    """
    shutil.copytree(bundle.path / record.name, folder / record.name)
    return replace(record, details={**record.details, "reused": True})
