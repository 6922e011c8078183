"""Our exporter against Optimum's on the same model: time, peak memory, file size, nodes.

    python tools/bench_export.py                                      # SD 1.5's shapes, tiny UNet, random weights
    python tools/bench_export.py --models random:sd15,random:sd15-small,random:sd15-tiny --rounds 5

A model is saved once as a diffusers folder, and every run starts from those files in a process of its own:
`sdkd export` here, Optimum's exporter in .venv-interop. One run of each way a round, in rotating order, so that drift
of the machine hits all alike. Writes benchmarks/<machine>/export.json (raw samples) and export.md. Run it on a quiet
machine; it needs about three times the model's size on disk, under artifacts/, and removes it.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from bench import ROOT, commit, machine

from sdkd.compare.measure.stats import speedup
from sdkd.core.files import read_json, write_bytes, write_json

SAMPLES_PER_SECOND = 20
COMPONENTS = ("text_encoder", "unet", "vae_decoder", "vae_encoder")
INTEROP = ROOT / "tests" / "interop" / "interop_environment.py"
OPTIMUM = (
    "import sys; from optimum.exporters.onnx import main_export; "
    "main_export(sys.argv[1], sys.argv[2], task='text-to-image', dtype=sys.argv[3], do_validation=False)"
)
# In a child, so that this process stays small.
_SAVE = """
import sys
from pathlib import Path
from sdkd.models.resolve import load_eager
from sdkd.models.diffusers_folder import write_pipeline
write_pipeline(load_eager(sys.argv[1]), Path(sys.argv[2]))
"""


# FOLDER stands for the model, OUT for the output. A way of sdkd's is compared with Optimum's of the same precision that
# is checked, or is not, as well; Optimum's command line cannot leave its check out, its function can.
WAYS: dict[str, tuple[str, ...]] = {}
for _precision in ("fp32", "fp16"):
    _optimum = ("optimum-cli", "export", "onnx", "--model", "FOLDER", "--task", "text-to-image", "--dtype", _precision)
    _ours = ("sdkd", "export", "FOLDER", "OUT", "--precision", _precision)
    WAYS |= {
        f"optimum {_precision}": (*_optimum, "OUT"),
        f"optimum {_precision}, not checked": ("python", "-c", OPTIMUM, "FOLDER", "OUT", _precision),
        f"sdkd {_precision}": _ours,
        f"sdkd {_precision}, not checked": (*_ours, "--no-verify"),
    }
FAILED_CHECK = "the model was saved nonetheless"  # what Optimum says then, and exits with status 1


@dataclass
class Run:
    """What one export took: seconds, the highest memory of its processes together, and whether its check passed."""

    seconds: float
    peak_rss: int
    peak_anonymous: int
    passed: bool


@dataclass
class Measured:
    """All runs of one way, and what its last run wrote."""

    runs: list[Run] = field(default_factory=list)
    components: dict[str, Any] = field(default_factory=dict)


class Memory(threading.Thread):
    """Watches a process and its children, since Optimum checks graphs in a child.

    Pages of the weight files count as resident though they can go at any time; anonymous memory leaves them out. The
    kernel's own high-water mark (`ru_maxrss`) is not used: it begins with the size of the process that forked.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.root = psutil.Process(pid)
        self.done = threading.Event()
        self.peak_rss = self.peak_anonymous = 0

    def run(self) -> None:
        """Sample until told to stop."""
        while not self.done.wait(1 / SAMPLES_PER_SECOND):
            with contextlib.suppress(psutil.NoSuchProcess):
                rows = [_status(process.pid) for process in (self.root, *self.root.children(recursive=True))]
                marked = _status(self.root.pid).get("VmHWM", 0)  # between two samples, too
                self.peak_rss = max(self.peak_rss, marked, sum(row.get("VmRSS", 0) for row in rows))
                self.peak_anonymous = max(self.peak_anonymous, sum(row.get("RssAnon", 0) for row in rows))


def _status(pid: int) -> dict[str, int]:
    """Sizes in bytes that /proc gives for a process; empty when it has gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    fields = [line.split() for line in lines if line.endswith(" kB")]
    return {name.rstrip(":"): int(value) * 1024 for name, value, _ in fields}


def run(command: list[str], log: Path) -> Run:
    """One export in a fresh process."""
    os.sync()  # what an earlier run wrote must not be paid for by this one
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with log.open("w") as stream:
        start = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT)
        memory = Memory(process.pid)
        memory.start()
        try:
            status = process.wait()
        except BaseException:
            process.kill()
            raise
        seconds = time.perf_counter() - start
    memory.done.set()
    memory.join()
    said = log.read_text(errors="replace")
    passed = status == 0
    if not (passed or FAILED_CHECK in said) or "newly initialized" in said:  # the latter: other weights than ours
        raise SystemExit(f"{said[-3000:]}\n{' '.join(command[:3])} ... failed with status {status}")
    return Run(seconds, memory.peak_rss, memory.peak_anonymous, passed)


def command_of(way: str, folder: Path, output: Path, interop: Path) -> list[str]:
    """The way's words with its program's and the folders' places."""
    places = {"FOLDER": str(folder), "OUT": str(output)}
    words = [places.get(word, word) for word in WAYS[way]]
    program = Path(sys.executable).with_name("sdkd") if words[0] == "sdkd" else interop.with_name(words[0])
    return [str(program), *words[1:]]


def inspect(output: Path) -> dict[str, Any]:
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


def measure(folder: Path, interop: Path, rounds: int, work: Path, names: list[str]) -> dict[str, Measured]:
    """Every way once a round, in rotating order."""
    found = {name: Measured() for name in names}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            for file in folder.rglob("*.safetensors"):
                with file.open("rb") as stream:  # every run finds the weights in memory
                    while stream.read(1 << 24):
                        pass
            output = work / "out"
            found[name].runs.append(run(command_of(name, folder, output, interop), work / "log.txt"))
            found[name].components = inspect(output)
            shutil.rmtree(output)
            last = found[name].runs[-1]
            print(
                f"round {turn + 1} of {rounds}, {name}: {last.seconds:.1f} s, {last.peak_rss / 1e9:.2f} GB", flush=True
            )
    return found


def result(model: str, found: dict[str, Measured]) -> dict[str, Any]:
    """Rows of one model; `faster` is the ratio of medians of paired rounds with its bootstrap interval."""
    rows = []
    for name, measured in found.items():
        seconds = [run.seconds for run in measured.runs]
        against = name.replace("sdkd", "optimum")
        base = [run.seconds for run in found[against].runs] if against in found else []
        ratio = speedup([[value] for value in base], [[value] for value in seconds]) if base else None
        rows.append(
            {
                "way": name,
                "command": " ".join(WAYS[name]),
                "check_passed": None if "not checked" in name else all(run.passed for run in measured.runs),
                "against": against,
                "faster": ratio and [ratio.value, ratio.low, ratio.high],
                "seconds": _middle(seconds),
                "peak_rss_bytes": int(_middle([run.peak_rss for run in measured.runs])),
                "peak_anonymous_bytes": int(_middle([run.peak_anonymous for run in measured.runs])),
                "bytes": sum(part["bytes"] for part in measured.components.values()),
                "nodes": sum(part["nodes"] for part in measured.components.values()),
                "components": measured.components,
                "samples": {
                    "seconds": seconds,
                    "peak_rss_bytes": [run.peak_rss for run in measured.runs],
                    "peak_anonymous_bytes": [run.peak_anonymous for run in measured.runs],
                },
            }
        )
    return {"model": model, "rows": rows}


def _middle(values: list[Any]) -> float:
    return float(statistics.median(values))


def markdown(found: dict[str, Any]) -> str:
    """The tables for people."""
    lines = ["# Export to ONNX, sdkd and Optimum", "", f"Measured on {found['machine']}, {found['date']}, "]
    how = f"medians of {found['rounds']} round(s), Optimum {found['optimum']['optimum-onnx']}"
    lines[-1] += f"commit {found['commit']}, {how}."
    for part in found["models"]:
        lines += ["", f"## {part['model']}", ""]
        lines += ["| way | s | faster (95 % interval) | peak memory, GB | of it anonymous, GB | files, MB | nodes |"]
        lines += ["|---|---:|---:|---:|---:|---:|---:|", *(_row(row) for row in part["rows"])]
        lines += ["", "| nodes (opset, seconds) |" + "".join(f" {name} |" for name in COMPONENTS), "|---" * 5 + "|"]
        lines += [_nodes(row) for row in part["rows"]]
    lines += [
        "",
        "Faster than Optimum's export of the same precision: checked against checked, not checked against not checked.",
        "Optimum's check is its own validation of one input, sdkd's parity of every graph at several batches, shapes",
        "and timesteps. Nodes are those of the last run's graphs, those inside other nodes included; seconds go from",
        "opening the weights to the written graph, PyTorch's answers for the check included where there is one. Peak",
        "memory counts mapped pages of weight files, anonymous memory does not.",
        "",
        "Made again by:",
    ]
    return "\n".join([*lines, "", f"    {found['command']}", ""])


def _row(row: dict[str, Any]) -> str:
    faster = "-"
    if row["faster"] and row["way"] != row["against"]:
        faster = "{:.2f}x ({:.2f} to {:.2f})".format(*row["faster"])
    sizes = f"{row['peak_rss_bytes'] / 1e9:.2f} | {row['peak_anonymous_bytes'] / 1e9:.2f} | {row['bytes'] / 1e6:,.0f}"
    note = " (its check fails)" if row["check_passed"] is False else ""
    return f"| {row['way']}{note} | {row['seconds']:.1f} | {faster} | {sizes} | {row['nodes']:,} |"


def _nodes(row: dict[str, Any]) -> str:
    return f"| {row['way']} | " + " | ".join(_cell(row["components"][name]) for name in COMPONENTS) + " |"


def _cell(part: dict[str, Any]) -> str:
    seconds = "" if part.get("seconds") is None else f", {part['seconds']:.0f} s"
    return f"{part['nodes']:,} ({part['opset']}{seconds})"


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder on the disk of the checkout, gone afterwards."""
    place = ROOT / "artifacts"
    place.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place, prefix="bench-export-") as name:
        yield Path(name)


def save(model: str, folder: Path) -> None:
    """The model as a diffusers folder that both environments read alike."""
    subprocess.run([sys.executable, "-c", _SAVE, model, str(folder)], check=True)


def interop_python() -> Path:
    """Python of Optimum's environment, made when it is missing."""
    asked = subprocess.run([sys.executable, str(INTEROP)], stdout=subprocess.PIPE, text=True, check=True)
    return Path(asked.stdout.strip())


def optimum_versions(interop: Path) -> dict[str, str]:
    """Versions in Optimum's environment."""
    names = ("optimum-onnx", "optimum", "torch", "diffusers", "transformers", "onnx", "onnxruntime")
    code = f"from importlib.metadata import version; print(*(version(name) for name in {names}))"
    asked = subprocess.run([interop, "-c", code], capture_output=True, text=True, check=True)
    return dict(zip(names, asked.stdout.split(), strict=True))


def check_private(found: dict[str, Any]) -> None:
    """Refuse a result that bears a path of this machine."""
    text = json.dumps(found)
    leaks = [str(place) for place in (ROOT, Path.home(), tempfile.gettempdir()) if str(place) in text]
    if leaks:
        raise SystemExit(f"the result holds paths of this machine ({', '.join(leaks)}): it was not written")


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="random:sd15-tiny", help="names that sdkd knows, separated by commas")
    parser.add_argument("--model", help=argparse.SUPPRESS)  # any one name, a folder included, to try this tool
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ways", default=",".join(f'"{name}"' if "," in name else name for name in WAYS))
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks")
    asked = parser.parse_args()
    ways = next(csv.reader([asked.ways]))
    if unknown := [name for name in ways if name not in WAYS]:
        parser.error(f"way {unknown[0]!r} is unknown: choose from {', '.join(map(repr, WAYS))}")
    interop, parts = interop_python(), []
    for model in [asked.model] if asked.model else asked.models.split(","):
        with scratch() as work:
            save(model, work / "model")
            measured = measure(work / "model", interop, asked.rounds, work, ways)
        parts.append(result(Path(model).name if asked.model else model, measured))
    from sdkd.compare.measure.environment import environment  # only now: it loads torch, and memory was measured

    chosen = f"--model {Path(asked.model).name}" if asked.model else f"--models {asked.models}"
    found = {
        "schema": 1,
        "machine": machine(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": commit(),
        "rounds": asked.rounds,
        "command": f"python tools/bench_export.py {chosen} --rounds {asked.rounds}"
        + ("" if ways == list(WAYS) else f" --ways {shlex.quote(asked.ways)}"),
        "environment": environment("cpu"),
        "optimum": optimum_versions(interop),
        "models": parts,
    }
    check_private(found)
    folder = asked.output / machine()
    write_json(folder / "export.json", found)
    write_bytes(folder / "export.md", markdown(found).encode())


if __name__ == "__main__":
    main()
