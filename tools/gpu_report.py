"""Everything that only a CUDA machine can show, in one call: what runs, how fast, how far from the machine's limit.

    python tools/gpu_report.py                                    # all pieces within 9 minutes
    python tools/gpu_report.py                                    # again: goes on with what is missing
    python tools/gpu_report.py --pieces doctor,eager,train/small --budget 300
    python tools/gpu_report.py --wheels KIT --out OUT             # packages from tools/gpu_kit.py, no network
    python tools/gpu_report.py --dry-run --out OUT                # the same on a CPU, with tiny models

Pieces run one after the other, the most telling first, each in a process of its own. Finished ones are kept in
<out>/<device>/<date>.json and not run again; one that fails is recorded in the library's own words, and the rest goes
on. Beside the JSON (raw samples, versions, driver, clocks, commit) lies the same as Markdown. docs/gpu.md says more.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
if str(ROOT) not in sys.path:  # where sdkd is not installed
    sys.path.insert(0, str(ROOT))

from gpu_bench.page import add_limits, markdown  # noqa: E402
from gpu_bench.runner import child, run_all  # noqa: E402
from gpu_bench.settings import Settings, chosen, dry  # noqa: E402

from sdkd.errors import InputError, SdkdError  # noqa: E402
from sdkd.files import read_json, write_bytes, write_json  # noqa: E402

SCHEMA = 1
BUDGET_S = 540.0  # all of it: ten minutes are a usual limit of one command
IDENTIFY = """
import json, sys
from sdkd.compare.environment import environment
from sdkd.targets import cpu_name, gpu
found = environment(sys.argv[1])
print(json.dumps({"environment": found, "name": (found["gpu"] or {}).get("gpu") or f"{cpu_name()} cpu"}))
"""


def identify(device: str, environment: Mapping[str, str]) -> dict[str, Any]:
    """The machine, asked in a process of its own: this one must not hold the GPU. SystemExit where that fails."""
    asked = subprocess.run(
        [sys.executable, "-c", IDENTIFY, device], capture_output=True, text=True, env={**os.environ, **environment}
    )
    if asked.returncode:
        raise SystemExit(f"error: this machine could not be asked what it is:\n{asked.stderr.strip()[-2000:]}")
    found: dict[str, Any] = json.loads(asked.stdout.splitlines()[-1])
    if device == "cuda" and not found["environment"]["gpu"]:
        raise SystemExit("error: torch sees no CUDA device here (`sdkd doctor` says why): --dry-run runs on the CPU")
    return found


def slug(name: str) -> str:
    """A folder's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def commit_of(asked: str | None) -> str:
    """The commit that is measured: the one given, the checkout's, or `unknown` for a copy without its history."""
    if asked:
        return asked
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def install(wheels: Path, work: Path) -> Path:
    """The wheels of a kit, or of a plain folder, in a folder of their own; SystemExit in pip's words."""
    site = work / "site"
    if (wheels / "kit.json").is_file():
        command = [sys.executable, str(wheels / "install.py"), str(site)]
    elif found := sorted(map(str, wheels.glob("*.whl"))):
        options = ["--quiet", "--no-index", "--no-deps", "--upgrade", "--target", str(site)]
        command = [sys.executable, "-m", "pip", "install", *options, *found]
    else:
        raise SystemExit(f"error: {wheels} holds neither a kit.json nor a wheel: name the folder of a kit")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: the wheels could not be installed: {(done.stderr or done.stdout).strip()[-2000:]}")
    return site


def opened(path: Path, fresh: Mapping[str, Any]) -> dict[str, Any]:
    """The report that is there, or a new one; InputError for one of another machine or other settings."""
    if not path.is_file():
        return {**fresh, "pieces": {}}
    found: dict[str, Any] = read_json(path)
    places = {
        "GPU": ("environment", "gpu"), "driver": ("environment", "gpu_driver"), "CPU": ("environment", "cpu"),
        "settings": ("settings",),
    }  # fmt: skip
    for what, keys in places.items():
        before, now = _at(found, keys), _at(fresh, keys)
        if before != now:
            raise InputError(
                f"report {str(path)!r} was begun with another {what} ({before}, here {now}): give another --out, or "
                "move it away"
            )
    return {**found, "command": fresh["command"]}


def _at(data: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        data = data.get(key)
    return data


def python_path(*folders: Path | None) -> dict[str, str]:
    """The environment of the pieces' processes, which find these folders, then the checkout and its tools."""
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    every = [*(str(folder) for folder in folders if folder), str(ROOT), str(ROOT / "tools"), *given]
    return {"PYTHONPATH": os.pathsep.join(one for one in every if one), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def settings_of(asked: argparse.Namespace) -> Settings:
    """What the command line asks for; InputError for models or numbers that cannot be read."""
    models = None
    if asked.models:
        pairs = [word.partition("=") for word in asked.models.split(",")]
        if not all(label and model for label, _, model in pairs):
            raise InputError(f"models {asked.models!r} are not understood: give LABEL=MODEL,LABEL=MODEL")
        models = {label: model for label, _, model in pairs}
    given: dict[str, Any] = {"models": models, "work": str(asked.work), "steps": asked.steps, "seconds": asked.seconds}
    for name in ("sizes", "batches", "train_batches"):
        words = getattr(asked, name)
        given[name] = tuple(int(word) for word in words.split(",")) if words else None
    given["targets"] = tuple(asked.targets.split(",")) if asked.targets else None
    if asked.dry_run:
        return dry(given)
    return Settings(**{name: value for name, value in given.items() if value is not None})


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pieces", default="", help="kinds or names, with commas; default: all")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds for this call")
    parser.add_argument("--again", action="store_true", help="run pieces that are done once more, too")
    parser.add_argument("--models", help="LABEL=MODEL,...; default: SD 1.5's teacher, small, tiny, random weights")
    parser.add_argument("--targets", help="of the engines, with commas; default: both TensorRT kinds, onnxruntime")
    parser.add_argument("--sizes", help="pixels, with commas, the first for most rows; default: 512,768")
    parser.add_argument("--batches", help="latents per UNet call, with commas; default: 2,8,16")
    parser.add_argument("--train-batches", help="images per training step, with commas; default: 8,16,32")
    parser.add_argument("--steps", type=int, help="of a whole image; default: 25")
    parser.add_argument("--seconds", type=float, help="of timed calls for each row; default: 1.5")
    parser.add_argument("--wheels", type=Path, help="a kit of tools/gpu_kit.py, or a folder of wheels")
    parser.add_argument("--out", type=Path, help="a folder, or the .json file itself; default: benchmarks/")
    parser.add_argument("--work", type=Path, default=ROOT / "artifacts" / "gpu-report", help="bundles, engines, logs")
    parser.add_argument("--commit", help="what is measured, where the checkout has no history")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU with tiny models; measures nothing")
    parser.add_argument("--child", nargs=3, metavar=("PIECE", "SETTINGS", "RESULT"), help=argparse.SUPPRESS)
    return parser.parse_args(words)


def report(asked: argparse.Namespace, words: Sequence[str]) -> Path:
    """Run what is missing and write it; the JSON's path."""
    deadline = time.monotonic() + asked.budget
    settings = settings_of(asked)
    pieces = chosen(settings, asked.pieces)
    environment = python_path(install(asked.wheels, asked.work) if asked.wheels else None)
    machine = identify(settings.device, environment)
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    out: Path = asked.out or (ROOT / "artifacts" / "gpu-dry-run" if asked.dry_run else ROOT / "benchmarks")
    path = out if out.suffix == ".json" else out / slug(machine["name"]) / f"{date}.json"
    fresh = {
        "schema": SCHEMA, "kind": "gpu-report", "dry_run": asked.dry_run, "machine": slug(machine["name"]),
        "date": date, "command": command_line(words), "settings": public(settings),
        "environment": machine["environment"],
    }  # fmt: skip
    found = opened(path, json.loads(json.dumps(fresh)))
    commit = commit_of(asked.commit)

    def save() -> None:
        found["commit"] = ", ".join(sorted({one["commit"] for one in found["pieces"].values() if "commit" in one}))
        add_limits(found)
        write_json(path, found)
        write_bytes(path.with_suffix(".md"), markdown(found).encode())

    run_all(
        pieces, settings, found["pieces"], save, deadline=deadline, again=asked.again, said={"commit": commit},
        environment=environment,
    )  # fmt: skip
    return path


def public(settings: Settings) -> dict[str, Any]:
    """The settings without this machine's folders: models by their last name."""
    models = {label: model if ":" in model else Path(model).name for label, model in settings.models.items()}
    return {name: value for name, value in settings.to_json().items() if name != "work"} | {"models": models}


def command_line(words: Sequence[str]) -> str:
    """What makes a report again, without the folders of this machine."""
    kept, skip = [], False
    for word in words:
        if not skip and not word.startswith(("--out", "--work", "--wheels", "--models")):
            kept.append(word)
        skip = word in ("--out", "--work", "--wheels", "--models")
    return " ".join(["python tools/gpu_report.py", *kept])


def main(words: Sequence[str] | None = None) -> int:
    """Command line."""
    asked = parse(words)
    if asked.child:
        child(asked.child[0], Path(asked.child[1]), Path(asked.child[2]))
        return 0
    try:
        path = report(asked, sys.argv[1:] if words is None else words)
    except SdkdError as error:
        raise SystemExit(f"error: {error}") from error
    print(f"written: {path} and {path.with_suffix('.md').name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
