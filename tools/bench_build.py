"""From safetensors to engines: seconds, peak memory and size for each model and target that builds here.

    python tools/bench_build.py                                       # SD 1.5's shapes: teacher, small, tiny
    python tools/bench_build.py --models random:sd15-tiny --targets onnxruntime,openvino-bf16 --rounds 3

A model with random weights is saved once as a diffusers folder; every run is `sdkd build-engine` on that folder in a
process of its own, export and both checks included, beside Optimum's export to ONNX, which ends where its runtime
begins. One run of each way a round, in rotating order. Writes benchmarks/<machine>/build.json (raw samples) and
build.md. Run it on a quiet machine; it removes what it wrote to disk.
"""

from __future__ import annotations

import argparse
import datetime
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from bench import ROOT, commit, machine
from bench_export import Run, check_private, interop_python, optimum_versions, run, save, scratch

from sdkd.bundle.manifest import Bundle
from sdkd.core.files import write_bytes, write_json

# FOLDER stands for the model, OUT for the bundle.
_BUILD = ("sdkd", "build-engine", "FOLDER", "--size", "512", "--batch", "1..4", "--output", "OUT")
TARGETS: dict[str, tuple[str, ...]] = {
    "onnxruntime": (*_BUILD, "--target", "onnxruntime"),
    "openvino": (*_BUILD, "--target", "openvino"),
    "openvino-bf16": (*_BUILD, "--target", "openvino", "--precision", "bf16"),
    "tensorrt-rtx": (*_BUILD, "--target", "tensorrt-rtx", "--precision", "fp16"),
    "optimum": ("optimum-cli", "export", "onnx", "--model", "FOLDER", "--task", "text-to-image", "OUT"),
}


def measure(folder: Path, work: Path, targets: list[str], rounds: int, interop: Path | None) -> list[dict[str, Any]]:
    """Every target once a round, in rotating order; one row each."""
    runs: dict[str, list[Run]] = {name: [] for name in targets}
    found: dict[str, dict[str, Any]] = {}
    for turn in range(rounds):
        for name in targets[turn % len(targets) :] + targets[: turn % len(targets)]:
            output = work / "out"
            runs[name].append(run(command(name, folder, output, interop), work / "log.txt"))
            found[name] = describe(output)
            shutil.rmtree(output)
            last = runs[name][-1]
            print(f"round {turn + 1}, {name}: {last.seconds:.1f} s, {last.peak_rss / 1e9:.2f} GB", flush=True)
    return [row(name, runs[name], found[name]) for name in targets]


def command(name: str, folder: Path, output: Path, interop: Path | None) -> list[str]:
    """The words of a target's command with its program's and the folders' places."""
    places = {"FOLDER": str(folder), "OUT": str(output)}
    program, *words = (places.get(word, word) for word in TARGETS[name])
    home = Path(sys.executable) if program == "sdkd" else interop
    assert home is not None
    return [str(home.with_name(program)), *words]


def describe(output: Path) -> dict[str, Any]:
    """Seconds and bytes of every component's export and engine; of Optimum's export the files alone."""
    if not (output / "bundle.json").is_file():
        files = [file for file in output.rglob("*") if ".onnx" in file.name]
        return {"engine_bytes": sum(file.stat().st_size for file in files), "components": {}}
    manifest = Bundle.open(output).manifest
    engines = {engine.component: engine for engine in manifest.engines.values()}
    return {
        "engine_bytes": sum(engine.total_bytes for engine in engines.values()),
        "components": {
            name: {
                "export_seconds": record.seconds,
                "build_seconds": engines[name].seconds,
                "engine_bytes": engines[name].total_bytes,
            }
            for name, record in manifest.components.items()
        },
    }


def row(name: str, runs: list[Run], found: dict[str, Any]) -> dict[str, Any]:
    """Medians and raw samples of one target."""
    samples = {
        "seconds": [each.seconds for each in runs],
        "peak_rss_bytes": [each.peak_rss for each in runs],
        "peak_anonymous_bytes": [each.peak_anonymous for each in runs],
    }
    middles = {key: statistics.median(values) for key, values in samples.items()}
    return {"target": name, "command": " ".join(TARGETS[name]), **middles, **found, "samples": samples}


def markdown(found: dict[str, Any]) -> str:
    """The tables for people."""
    lines = [
        "# From safetensors to engines",
        "",
        f"Measured on {found['machine']}, {found['date']}, commit {found['commit']}, rounds: {found['rounds']}; models "
        "with random weights, 512 px, 1 to 4 images. Export, parity with PyTorch, build and parity of the engine (on "
        "targets that run here) included.",
    ]
    for part in found["models"]:
        lines += ["", f"## {part['model']}", ""]
        lines += [
            "| target | s | UNet: export, s | UNet: build, s | peak memory, GB | of it anonymous, GB | engines, MB |"
        ]
        lines += ["|---|---:|---:|---:|---:|---:|---:|", *(_line(each) for each in part["rows"])]
    lines += [
        "",
        "`optimum` is Optimum's export in float32 with its own check: ONNX files, as its runtime opens them.",
        "Peak memory is that of all processes together and counts mapped pages of weight files; anonymous memory",
        "does not.",
        "",
        "Made again by:",
    ]
    return "\n".join([*lines, "", f"    {found['command']}", ""])


def _line(each: dict[str, Any]) -> str:
    unet = each["components"].get("unet")
    parts = f"{unet['export_seconds']:.1f} | {unet['build_seconds']:.1f}" if unet else "- | -"
    memory = f"{each['peak_rss_bytes'] / 1e9:.2f} | {each['peak_anonymous_bytes'] / 1e9:.2f}"
    return f"| {each['target']} | {each['seconds']:.1f} | {parts} | {memory} | {each['engine_bytes'] / 1e6:,.0f} |"


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="random:sd15,random:sd15-small,random:sd15-tiny")
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks")
    asked = parser.parse_args()
    targets = asked.targets.split(",")
    if unknown := [name for name in targets if name not in TARGETS]:
        parser.error(f"target {unknown[0]!r} is unknown: choose from {', '.join(TARGETS)}")
    interop, parts = interop_python() if "optimum" in targets else None, []
    for model in asked.models.split(","):
        with scratch() as work:
            save(model, work / "model")
            parts.append({"model": model, "rows": measure(work / "model", work, targets, asked.rounds, interop)})
    from sdkd.compare.measure.environment import environment  # only now: it loads torch, and memory was measured

    found = {
        "schema": 1,
        "machine": machine(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": commit(),
        "rounds": asked.rounds,
        "command": f"python tools/bench_build.py --models {asked.models} --targets {asked.targets} "
        f"--rounds {asked.rounds}",
        "environment": environment("cpu"),
        "optimum": optimum_versions(interop) if interop else None,
        "models": parts,
    }
    check_private(found)
    folder = asked.output / machine()
    write_json(folder / "build.json", found)
    write_bytes(folder / "build.md", markdown(found).encode())


if __name__ == "__main__":
    main()
