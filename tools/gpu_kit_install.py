"""Install a kit of wheels into a folder: python install.py FOLDER [--from OTHER_KIT_FOLDER ...]

Joins wheels that travel in parts, checks size and SHA-256 of every piece, and gives them to pip with --target: nothing
else is touched. Standard library and pip only.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def find(name: str, folders: list[Path]) -> Path:
    """A piece in one of the folders."""
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    raise SystemExit(f"{name} is in none of {', '.join(map(str, folders))}: bring it, or name its folder with --from")


def join(wheel: dict[str, Any], folders: list[Path], work: Path) -> Path:
    """The whole wheel, checked."""
    target = work / str(wheel["file"])
    digest = hashlib.sha256()
    with target.open("wb") as out:
        for piece in wheel["pieces"]:
            block = find(piece["path"], folders).read_bytes()
            if len(block) != piece["bytes"]:
                size = f"{len(block)} bytes, not {piece['bytes']}"
                raise SystemExit(f"{piece['path']} has {size}: it was copied in part, bring it again")
            if hashlib.sha256(block).hexdigest() != piece["sha256"]:
                raise SystemExit(f"{piece['path']} is damaged: bring it again")
            digest.update(block)
            out.write(block)
    if digest.hexdigest() != wheel["sha256"]:
        raise SystemExit(f"{wheel['file']} is not what its parts should make: bring all of them again")
    return target


def main() -> None:
    """Join, check, install."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the packages go")
    parser.add_argument("--from", dest="others", type=Path, action="append", default=[], help="more pieces")
    asked = parser.parse_args()
    here = Path(__file__).parent
    kit = json.loads((here / "kit.json").read_text())
    running = f"{sys.version_info.major}.{sys.version_info.minor}"
    if running != kit["python"]:
        raise SystemExit(f"this kit is for Python {kit['python']}, and this is {running}: run it with that one")
    with tempfile.TemporaryDirectory(dir=here) as work:
        wheels = [join(wheel, [here, *asked.others], Path(work)) for wheel in kit["wheels"]]
        options = ["--quiet", "--no-index", "--no-deps", "--upgrade", "--no-compile", "--no-cache-dir"]
        command = [sys.executable, "-m", "pip", "install", *options, "--target", str(asked.folder)]
        status = subprocess.call([*command, *map(str, wheels)])
    if status:
        raise SystemExit(f"pip ended with status {status}: see above")
    print(f"installed {len(wheels)} packages into {asked.folder}: put it on PYTHONPATH")


if __name__ == "__main__":
    main()
