"""Our exporter against Optimum's on the same model: time, peak memory, file size, nodes.

    python tools/bench_export.py                                      # SD 1.5's shapes, tiny UNet, random weights
    python tools/bench_export.py --models random:sd15,random:sd15-small,random:sd15-tiny --rounds 5

A model is saved once as a diffusers folder, and every run starts from those files in a process of its own:
`sdkd export` here, Optimum's exporter in .venv-interop. One run of each way a round, in rotating order, so that drift
of the machine hits all alike. Writes benchmarks/<machine>/export.json (raw samples) and export.md. Run it on a quiet
machine; it needs about three times the model's size on disk, under artifacts/, and removes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench_kit.commands import Costs, Measured, memory_cells
from bench_kit.results import NONE, faster, ratio_cell

from sdkd.core.console import markdown_table
from sdkd.core.files import read_json

COMPONENTS = ("text_encoder", "unet", "vae_decoder", "vae_encoder")
OPTIMUM = (
    "import sys; from optimum.exporters.onnx import main_export; "
    "main_export(sys.argv[1], sys.argv[2], task='text-to-image', dtype=sys.argv[3], do_validation=False)"
)
# One of sdkd's is compared with Optimum's of the same precision that is checked, or is not, as well; Optimum's command
# line cannot leave its check out, its function can.
VARIANTS: dict[str, tuple[str, ...]] = {}
for _precision in ("fp32", "fp16"):
    _optimum = ("optimum-cli", "export", "onnx", "--model", "FOLDER", "--task", "text-to-image", "--dtype", _precision)
    _ours = ("sdkd", "export", "FOLDER", "OUT", "--precision", _precision)
    VARIANTS |= {
        f"optimum {_precision}": (*_optimum, "OUT"),
        f"optimum {_precision}, not checked": ("python", "-c", OPTIMUM, "FOLDER", "OUT", _precision),
        f"sdkd {_precision}": _ours,
        f"sdkd {_precision}, not checked": (*_ours, "--no-verify"),
    }


def describe(output: Path) -> dict[str, Any]:
    """Nodes, opset and bytes of every component that an exporter wrote; of ours also seconds, from weights to graph."""
    import onnx

    found, ours = {}, (output / "bundle.json").is_file()
    records = read_json(output / "bundle.json")["components"] if ours else {}
    for name in COMPONENTS:
        graph = onnx.load(str(output / name / "model.onnx"), load_external_data=False)
        files = [file for file in (output / name).iterdir() if ".onnx" in file.name]
        found[name] = {
            "nodes": _count(graph.graph) + sum(len(function.node) for function in graph.functions),
            "opset": next(entry.version for entry in graph.opset_import if not entry.domain),
            "bytes": sum(file.stat().st_size for file in files),
            "seconds": records[name]["details"]["export_seconds"] if ours else None,
        }
    return found


def _count(graph: Any) -> int:
    """Nodes of a graph and of the graphs inside its nodes."""
    inner = [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    return len(graph.node) + sum(_count(part) for part in inner)


def rows(found: Mapping[str, Measured]) -> list[dict[str, Any]]:
    """Rows of one model; `faster` is the ratio of medians of paired rounds with its bootstrap interval."""
    made = []
    for name, measured in found.items():
        against = name.replace("sdkd", "optimum")
        own, base = ([[run["seconds"]] for run in found[one].runs] if one in found else [] for one in (name, against))
        made.append({
            "way": name, "command": " ".join(VARIANTS[name]),
            "check_passed": None if "not checked" in name else all(run["passed"] for run in measured.runs),
            "against": against, "faster": faster(base, own) if base else None, **measured.figures(),
            "bytes": sum(part["bytes"] for part in measured.written.values()),
            "nodes": sum(part["nodes"] for part in measured.written.values()), "components": measured.written,
        })  # fmt: skip
    return made


def page(found: Mapping[str, Any]) -> list[str]:
    """The tables for people."""
    lines = [
        "# Export to ONNX, sdkd and Optimum", "",
        f"Measured on {found['machine']}, {found['date']}, commit {found['commit']}, medians of {found['rounds']} "
        f"round(s), Optimum {(found['optimum'] or {}).get('optimum-onnx', 'not measured')}.",
    ]  # fmt: skip
    heads = ("way", "s", "faster (95 % interval)", "peak memory, GB", "of it anonymous, GB", "files, MB", "nodes")
    for part in found["models"]:
        nodes = [[row["way"], *(_cell(row["components"][name]) for name in COMPONENTS)] for row in part["rows"]]
        lines += ["", f"## {part['model']}", "", *markdown_table(heads, [_row(row) for row in part["rows"]])]
        lines += ["", *markdown_table(("nodes (opset, seconds)", *COMPONENTS), nodes, left=2)]
    return [
        *lines,
        "",
        "Faster than Optimum's export of the same precision: checked against checked, not checked against not checked.",
        "Optimum's check is its own validation of one input, sdkd's parity of every graph at several batches, shapes",
        "and timesteps. Nodes are those of the last run's graphs, those inside other nodes included; seconds go from",
        "opening the weights to the written graph, PyTorch's answers for the check included where there is one. Peak",
        "memory counts mapped pages of weight files, anonymous memory does not.",
    ]


def _row(row: Mapping[str, Any]) -> list[str]:
    note = " (its check fails)" if row["check_passed"] is False else ""
    over = NONE if row["way"] == row["against"] else ratio_cell(row["faster"])
    return [
        f"{row['way']}{note}", f"{row['seconds']:.1f}", over, *memory_cells(row), f"{row['bytes'] / 1e6:,.0f}",
        f"{row['nodes']:,}",
    ]  # fmt: skip


def _cell(part: Mapping[str, Any]) -> str:
    seconds = "" if part.get("seconds") is None else f", {part['seconds']:.0f} s"
    return f"{part['nodes']:,} ({part['opset']}{seconds})"


COSTS = Costs("export", "ways", VARIANTS, "random:sd15-tiny", 5, describe, rows, page)

if __name__ == "__main__":
    COSTS.main(__doc__)
