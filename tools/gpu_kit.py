r"""Gather the wheels that a machine without a network lacks, in pieces of a given size, with a script to install them.

    python -m pip freeze > there.txt        # on the machine that lacks them; bring the file here
    python tools/gpu_kit.py KIT --python 3.12 --present there.txt --part-mb 60 \
        --packages 'diffusers,typer,polygraphy,tensorrt_rtx_cu{cuda}_bindings,tensorrt_rtx_cu{cuda}_libs' \
        --build 'tensorrt_rtx_cu{cuda},tensorrt_rtx'
    python KIT/install.py FOLDER            # there; with the pieces in several folders: --from KIT2 --from KIT3
    PYTHONPATH=FOLDER python ...

Versions come from constraints.txt, dependencies from pip's own resolver for that Python and platform. `--present` takes
files of `pip freeze`, NAME==VERSION and bare names: all of them are left out, and what is gathered fits those versions.
A bare name fits any version; the last entry of a name counts. pip chooses wheels for `--python`, but reads markers such
as `python_version < "3.12"` with the Python that runs it: run this with that Python where a package has such ones.
Packages that are published as source alone (`--build`) become wheels here, if they are pure Python. `{cuda}` in a
package's name stands for `--cuda`. A wheel above `--part-mb` becomes numbered parts. kit.json holds size and SHA-256 of
every file; install.py needs nothing but Python and pip, checks all of it, and writes into FOLDER alone.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdkd.bundle.manifest import FileRecord
from sdkd.core.files import write_bytes, write_json

ROOT = Path(__file__).parent.parent
INSTALLER = Path(__file__).with_name("gpu_kit_install.py")
MB = 1_000_000


@dataclass(frozen=True)
class Wheel:
    """One wheel of a kit and the pieces that it travels in: itself, or numbered parts."""

    file: str
    bytes: int
    sha256: str
    pieces: tuple[FileRecord, ...]


def canonical(name: str) -> str:
    """A project's name as package indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pip(*arguments: str) -> str:
    """Run pip; SystemExit with its last words when it fails."""
    asked = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True, check=False)
    if asked.returncode:
        said = [line for line in f"{asked.stdout}\n{asked.stderr}".splitlines() if line and "WARNING" not in line]
        raise SystemExit(f"pip {arguments[0]} failed: " + "\n".join(said[-20:]))
    return asked.stdout


def resolve(packages: Sequence[str], present: Collection[str], options: Sequence[str]) -> list[str]:
    """`name==version` of the packages and all they need, without what is present."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        report = place / "report.json"
        # Whatever `--python-version` says, `install` asks what a package says of the running Python; `download`, which
        # comes next, what it says of the other machine's.
        pip("install", "--dry-run", "--ignore-installed", "--ignore-requires-python", "--quiet",
            "--report", str(report), "--target", str(place / "target"), *options, *packages)  # fmt: skip
        found = json.loads(report.read_text())["install"]
    pins = {canonical(row["metadata"]["name"]): row["metadata"]["version"] for row in found}
    return [f"{name}=={version}" for name, version in sorted(pins.items()) if name not in present]


def split(path: Path, limit: int) -> Iterator[FileRecord]:
    """Parts of a file of at most `limit` bytes beside it, the file itself removed; the file when it is small enough."""
    if path.stat().st_size <= limit:
        yield FileRecord.of(path.parent, path)
        return
    with path.open("rb") as stream:
        number = 0
        while block := stream.read(limit):
            number += 1
            part = path.with_name(f"{path.name}.part{number:02d}")
            write_bytes(part, block)
            yield FileRecord.of(part.parent, part)
    path.unlink()


def build(kit: Path, names: Sequence[str], options: Sequence[str]) -> None:
    """Wheels of packages that are published as source; SystemExit for one that is not for every Python and machine."""
    if not names:
        return
    pip("wheel", "--quiet", "--no-deps", "--wheel-dir", str(kit), *options, *names)
    for path in kit.glob("*.whl"):
        if not path.name.endswith("-none-any.whl"):
            raise SystemExit(f"{path.name} is for this machine alone: only pure Python can be built for another one")


def gather(kit: Path, pins: Sequence[str], options: Sequence[str], limit: int) -> list[Wheel]:
    """Download wheels into a kit's folder and split those that are too large."""
    pip("download", "--quiet", "--no-deps", "--dest", str(kit), *options, *pins)
    wheels = []
    for path in sorted(kit.glob("*.whl")):
        whole = FileRecord.of(kit, path)
        wheels.append(Wheel(whole.path, whole.bytes, whole.sha256, tuple(split(path, limit))))
    return wheels


def target_options(asked: argparse.Namespace) -> list[str]:
    """What pip is told of the other machine."""
    options = ["--python-version", asked.python, "--only-binary", ":all:", "--implementation", "cp"]
    return options + [word for name in asked.platform.split(",") for word in ("--platform", name)]


def source_options(asked: argparse.Namespace) -> list[str]:
    """Where packages come from, and in which versions."""
    options = ["--constraint", str(asked.constraints)] if asked.constraints else []
    return options + (["--no-index", "--find-links", str(asked.find_links)] if asked.find_links else [])


def present_of(words: str) -> dict[str, str]:
    """Versions by project name, empty where none is known, of names, NAME==VERSION and files of `pip freeze`."""
    found = {}
    for word in filter(None, words.split(",")):
        for line in Path(word).read_text().splitlines() if Path(word).is_file() else [word]:
            entry = line.partition(" #")[0].partition(";")[0].strip()
            match = re.fullmatch(r"([A-Za-z0-9][\w.-]*)(?:\s*==\s*([\w.!+-]+)|\s*@.*)?", entry)
            if match:
                # A local version (2.11.0+cu130) is on no index, and the public one has the same needs.
                found[canonical(match[1])] = (match[2] or "").partition("+")[0]
            elif entry and not entry.startswith(("#", "-")):
                raise SystemExit(
                    f"--present: {entry!r} is no file, name or NAME==VERSION: give a file of `pip freeze`, or names"
                )
    return found


def fitting(constraints: Path | None, folder: Path, present: Mapping[str, str]) -> Path:
    """The constraints with the other machine's versions in place of ours."""
    lines = constraints.read_text().splitlines() if constraints else []
    kept = [line for line in lines if canonical(re.split(r"[=<>!~;\[ ]", line, maxsplit=1)[0]) not in present]
    pins = [f"{name}=={version}" for name, version in present.items() if version]
    path = folder / "constraints.txt"
    path.write_text("\n".join([*kept, *pins]) + "\n")
    return path


def main(words: Sequence[str] | None = None) -> None:
    """Resolve, download, split, write kit.json and install.py."""
    asked = parse(words)
    if asked.kit.exists() and any(asked.kit.iterdir()):
        raise SystemExit(f"{asked.kit} is there and not empty: name another folder, or remove it")
    packages, built = (
        [name.replace("{cuda}", asked.cuda) for name in words.split(",") if name]
        for words in (asked.packages, asked.build)
    )
    present = present_of(asked.present)
    asked.kit.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        asked.constraints = fitting(asked.constraints, Path(folder), present)
        sources = source_options(asked)
        build(asked.kit, built, sources)
        options = [*target_options(asked), *sources]
        wheels = gather(asked.kit, resolve(packages, present, options), options, int(asked.part_mb * MB))
    described: dict[str, Any] = {"schema": 1, "python": asked.python, "wheels": [asdict(wheel) for wheel in wheels]}
    shutil.copy(INSTALLER, asked.kit / "install.py")
    write_json(asked.kit / "kit.json", described)
    for wheel in wheels:
        parts = f" in {len(wheel.pieces)} parts" if len(wheel.pieces) > 1 else ""
        print(f"{wheel.bytes / MB:8.1f} MB  {wheel.file}{parts}")
    print(f"{sum(wheel.bytes for wheel in wheels) / MB:8.1f} MB in {asked.kit}")


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kit", type=Path, help="the folder to write")
    parser.add_argument("--packages", required=True, help="names, separated by commas")
    parser.add_argument("--present", default="", help="what is there: pip freeze's file, names; with commas")
    parser.add_argument("--build", default="", help="pure-Python packages without wheels, separated by commas")
    parser.add_argument("--python", default="3.12")
    parser.add_argument("--cuda", default="13", help="for {cuda} in package names")
    parser.add_argument("--platform", default="manylinux_2_28_x86_64,manylinux_2_17_x86_64,manylinux2014_x86_64")
    parser.add_argument("--part-mb", type=float, default=60.0)
    parser.add_argument("--constraints", type=Path, default=ROOT / "constraints.txt")
    parser.add_argument("--find-links", type=Path, help="take wheels from this folder instead of the package index")
    return parser.parse_args(words)


if __name__ == "__main__":
    main()
