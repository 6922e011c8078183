"""A comparison as a piece of a benchmark: what it found, what was exported and built for it, and both in words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench_kit.record import Record
from sdkd.bundle.manifest import Bundle
from sdkd.core.console import markdown_table

if TYPE_CHECKING:
    from sdkd.compare import Report


def keep_comparison(record: Record, report: Report, folders: Iterable[Path]) -> None:
    """Keep a report as facts, with its page and the builds of all bundles in some folders."""
    from sdkd.compare.report.tables import markdown

    found = [file for folder in folders for file in sorted(folder.rglob("bundle.json"))]
    record.fact(comparison=report.to_json(), builds=list(builds(found)), markdown=markdown(report))


def builds(manifests: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """What was exported and built, how long it took, how large it is."""
    for path in manifests:
        found = Bundle.open(path.parent).manifest
        model = str(found.source.get("model", ""))
        model = model if ":" in model or model == "demo" else Path(model).name
        made = [(part.name, f"onnx-{part.precision}", part) for part in found.components.values()]
        made += [(engine.component, engine.slot, engine) for engine in found.engines.values()]
        for component, what, one in made:
            size = {"seconds": round(one.seconds, 2), "bytes": one.total_bytes}
            yield {"model": model, "component": component, "made": what, **size}


def builds_table(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Builds in words."""
    cells = [
        [row["model"], row["component"], row["made"], f"{row['seconds']:.1f}", f"{row['bytes'] / 1e6:.1f}"]
        for row in rows
    ]
    return markdown_table(("model", "component", "made", "seconds", "MB"), cells, left=3)


def comparison_lines(markdown: str, head: Sequence[str] = ()) -> list[str]:
    """A comparison's page without its mark of a title, below other lines."""
    return [*head, *markdown.removeprefix("# ").rstrip("\n").splitlines()]
