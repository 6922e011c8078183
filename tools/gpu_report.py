"""Everything that only a CUDA machine can show, in one call: what runs, how fast, how far from the machine's limit.

    python tools/gpu_report.py                                    # all pieces within 9 minutes
    python tools/gpu_report.py                                    # again: goes on with what is missing
    python tools/gpu_report.py --pieces doctor,compare/tiny,train/small --budget 300
    python tools/gpu_report.py --wheels KIT --out OUT             # packages from tools/gpu_kit.py, no network
    python tools/gpu_report.py --resume EARLIER.json --out OUT    # where OUT is empty: goes on with that report
    python tools/gpu_report.py --dry-run --out OUT                # the same on a CPU, with tiny models

Pieces run one after the other, the most telling first, each in a process of its own. Finished ones are kept in
<out>/<device>/<date>.json and not run again; one that fails is recorded in the library's own words, and the rest goes
on. Beside the JSON (raw samples, versions, driver, clocks, commit) lies the same as Markdown. docs/gpu.md says more.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
if str(ROOT) not in sys.path:  # where sdkd is not installed
    sys.path.insert(0, str(ROOT))

from bench_kit.results import commit, keep, slug, today  # noqa: E402
from bench_kit.runner import Place, python_path, run_all  # noqa: E402
from gpu_bench.page import page  # noqa: E402
from gpu_bench.settings import TARGETS, Settings, all_pieces, chosen  # noqa: E402

from sdkd.core.files import read_json  # noqa: E402
from sdkd.errors import InputError, SdkdError  # noqa: E402

BUDGET_S = 540.0  # all of it: ten minutes are a usual limit of one command
IDENTIFY = """
import json, sys
from sdkd.compare.measure.environment import environment
from sdkd.targets.registry import cpu_name
found = environment(sys.argv[1])
name = (found["gpu"] or {}).get("gpu") or f"{cpu_name()} cpu"
print(json.dumps({"environment": found, "name": name}))
"""
NAME = re.compile(r"(\d{4}-\d\d-\d\d)(?:-(\d+))?\.json")
SAME = {
    "GPU": ("environment", "gpu"), "driver": ("environment", "gpu_driver"), "CPU": ("environment", "cpu"),
    "settings": ("settings",),
}  # fmt: skip
FOLDERS = ("--out", "--work", "--wheels", "--models", "--resume")  # words of this machine, with their values


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


def install(wheels: Sequence[Path], work: Path) -> Path:
    """The wheels of a kit, in one or several folders, or of plain ones, in a folder of their own.

    Nothing is done where they are installed already; SystemExit in pip's words.
    """
    site, mark = work / "site", work / "site.txt"
    kits = [folder for folder in wheels if (folder / "kit.json").is_file()]
    found = sorted(str(path) for folder in wheels for path in folder.glob("*.whl"))
    options = ["--no-compile", "--no-cache-dir", "--quiet", "--no-index", "--no-deps", "--upgrade", "--target"]
    if kits:
        others = [str(folder) for folder in wheels if folder != kits[0]]
        command = [sys.executable, str(kits[0] / "install.py"), str(site)]
        command += [word for folder in others for word in ("--from", folder)]
        of = (kits[0] / "kit.json").read_bytes()
    elif found:
        command = [sys.executable, "-m", "pip", "install", *options, str(site), *found]
        of = json.dumps([(Path(path).name, Path(path).stat().st_size) for path in found]).encode()
    else:
        names = ", ".join(map(str, wheels))
        raise SystemExit(f"error: {names} holds neither a kit.json nor a wheel: name the folder of a kit")
    digest = hashlib.sha256(of).hexdigest()
    if site.is_dir() and mark.is_file() and mark.read_text() == digest:
        return site
    mark.unlink(missing_ok=True)
    shutil.rmtree(site, ignore_errors=True)  # of another kit, or left in part
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: the wheels could not be installed: {(done.stderr or done.stdout).strip()[-2000:]}")
    work.mkdir(parents=True, exist_ok=True)
    mark.write_text(digest)
    return site


# Which report a call goes on with


def differences(found: Mapping[str, Any], fresh: Mapping[str, Any]) -> Iterator[str]:
    """In what a report is of something else than another one."""
    for what, keys in SAME.items():
        before, now = found, fresh
        for key in keys:
            before, now = before.get(key, {}), now.get(key, {})
        if before != now:
            yield f"another {what} ({before}, here {now})"


def check_same(path: Path, fresh: Mapping[str, Any], advice: str) -> dict[str, Any]:
    """The report in a file; InputError for one of another machine or other settings."""
    found: dict[str, Any] = read_json(path)
    if other := next(differences(found, fresh), None):
        raise InputError(f"report {str(path)!r} was begun with {other}: {advice}")
    return found


def place(folder: Path, fresh: Mapping[str, Any], names: Sequence[str]) -> Path:
    """Where a report goes on: today's, or the newest unfinished one, of the same machine and settings; or a new one."""
    there = [(match, path) for path in folder.glob("*.json") if (match := NAME.fullmatch(path.name))]
    for match, path in sorted(there, key=lambda one: (one[0][1], int(one[0][2] or 1)), reverse=True):
        found = read_json(path)
        if found.get("kind") != fresh["kind"] or any(differences(found, fresh)):
            continue
        states = {found["pieces"].get(name, {}).get("state", "not started") for name in names}
        if match[1] == fresh["date"] or states & {"not started", "out of budget"}:
            return path
        break  # the newest one is finished
    number = 1
    while (path := folder / f"{fresh['date']}{'' if number == 1 else f'-{number}'}.json").exists():
        number += 1
    return path


def begun(asked: argparse.Namespace, fresh: Mapping[str, Any], names: Sequence[str]) -> tuple[Path, dict[str, Any]]:
    """The report that a call goes on with, and its path: one that is there, or a new one, with what `--resume` has.

    InputError where either is of another machine or of other settings.
    """
    out = folder_of(asked)
    path = out if out.suffix == ".json" else place(out / fresh["machine"], fresh, names)
    if asked.resume and path != out and NAME.fullmatch(asked.resume.name):  # a new report goes on under its name
        named = path.with_name(asked.resume.name)
        path = path if path.exists() or named.exists() else named
    found = {**fresh, "pieces": {}}
    if path.is_file():
        found = {**check_same(path, fresh, "give another --out, or move it away"), "command": fresh["command"]}
    if asked.resume:
        before = check_same(asked.resume, fresh, "leave out --resume, which would mix them")
        own = {name: piece for name, piece in found["pieces"].items() if piece["state"] != "not started"}
        found |= {"date": min(found["date"], before["date"]), "pieces": {**before["pieces"], **own}}
    return path, found


def folder_of(asked: argparse.Namespace) -> Path:
    """Where reports go: what was asked for, or a folder of this repository."""
    default = ROOT / "artifacts" / "gpu-dry-run" if asked.dry_run else ROOT / "benchmarks"
    return Path(asked.out or default)


def check_settings(asked: argparse.Namespace, settings: Mapping[str, Any]) -> None:
    """InputError for a file that is named and has other settings, before anything is installed."""
    advice = ("leave out --resume, which would mix them", "give another --out, or move it away")
    for path, words in zip((asked.resume, folder_of(asked)), advice, strict=True):
        if path and path.suffix == ".json" and path.is_file():
            check_same(path, {**read_json(path), "settings": settings}, words)


def command_line(words: Sequence[str]) -> str:
    """What makes a report again, without the folders of this machine."""
    kept, skip = [], False
    for word in words:
        if not skip and not word.startswith(FOLDERS):
            kept.append(word)
        skip = word in FOLDERS
    return " ".join(["python tools/gpu_report.py", *kept])


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pieces", default="", help="kinds or names, with commas; default: all")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds for this call")
    parser.add_argument("--again", action="store_true", help="run pieces that are done once more, too")
    parser.add_argument("--models", help="LABEL=MODEL,...; default: SD 1.5's teacher, small, tiny, random weights")
    parser.add_argument("--targets", help=f"of the comparisons, with commas; default: {','.join(TARGETS)}")
    parser.add_argument("--sizes", help="pixels, with commas, the first for most pieces; default: 512,768")
    parser.add_argument("--batches", help="images per call, with commas, the first for most pieces; default: 1,8")
    parser.add_argument("--train-batches", help="images per training step, with commas; default: 8,16,32")
    parser.add_argument("--steps", type=int, help="of a whole image; default: 25")
    parser.add_argument("--seconds", type=float, help="of timed UNet calls for each subject; default: 1")
    parser.add_argument(
        "--wheels", action="append", default=[], help="a kit of tools/gpu_kit.py, or wheels; its folders with commas"
    )
    parser.add_argument("--resume", type=Path, help="an earlier report's .json, to go on where --out is empty")
    parser.add_argument("--out", type=Path, help="a folder, or the .json file itself; default: benchmarks/")
    parser.add_argument("--work", type=Path, default=ROOT / "artifacts" / "gpu-report", help="bundles, engines, logs")
    parser.add_argument("--commit", help="what is measured, where the checkout has no history")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU with tiny models; measures nothing")
    return parser.parse_args(words)


def report(asked: argparse.Namespace, words: Sequence[str]) -> Path:
    """Run what is missing and write it; the JSON's path."""
    deadline = time.monotonic() + asked.budget
    settings = Settings.of(asked)
    pieces, public = chosen(settings, asked.pieces), json.loads(json.dumps(settings.public()))
    check_settings(asked, public)
    wheels = [Path(folder) for word in asked.wheels for folder in word.split(",") if folder]
    environment = python_path(install(wheels, asked.work) if wheels else None)
    machine = identify(settings.device, environment)
    fresh = {
        "schema": 1, "kind": "gpu-report", "dry_run": asked.dry_run, "machine": slug(machine["name"]), "date": today(),
        "command": command_line(words), "settings": public, "environment": machine["environment"],
    }  # fmt: skip
    path, found = begun(asked, fresh, [one.name for one in all_pieces(settings)])

    def save() -> None:
        every = [one for piece in found["pieces"].values() for one in (piece, *piece["rows"])]
        found["commit"] = ", ".join(sorted({one["commit"] for one in every if "commit" in one}))
        keep(path, found, page(found))

    run_all(
        pieces, Place(asked.work, environment), found["pieces"], save, deadline=deadline, again=asked.again,
        said={"commit": asked.commit or commit()},
    )  # fmt: skip
    return path


def main(words: Sequence[str] | None = None) -> int:
    """Command line."""
    asked = parse(words)
    try:
        path = report(asked, sys.argv[1:] if words is None else words)
    except SdkdError as error:
        raise SystemExit(f"error: {error}") from error
    print(f"written: {path} and {path.with_suffix('.md').name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
