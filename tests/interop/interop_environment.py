"""Make the environment of the interop tests, or re-use it while its requirements are the same; prints its Python.

    python tests/interop/interop_environment.py                           # -> .venv-interop/bin/python
    python tests/interop/interop_environment.py FOLDER REQUIREMENTS        # another one, of a whole set of packages

Optimum cannot live beside our diffusers and transformers, so it has a virtual environment of its own, in .venv-interop
beside .venv (about 1.3 GB). The tests and the benchmarks (tools/bench_kit/commands.py) call it.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent.parent
REQUIREMENTS = Path(__file__).resolve().parent / "requirements.txt"
FOLDER = ROOT / ".venv-interop"
STAMP = ".requirements"


class EnvironmentFailedError(RuntimeError):
    """pip could not install the requirements, as without a network; the message ends with pip's own words."""


def interop_python(folder: Path = FOLDER, requirements: Path = REQUIREMENTS, whole: bool = False) -> Path:
    """The environment's Python, made first where it is missing, half made or of other requirements.

    `whole`: the requirements are all that is installed, whatever they say that they need. Raises
    EnvironmentFailedError.
    """
    python, stamp = folder / "bin" / "python", folder / STAMP
    wanted = hashlib.sha256(sys.version.encode() + requirements.read_bytes()).hexdigest()
    with FileLock(f"{folder}.lock"):
        if not python.is_file() or not stamp.is_file() or stamp.read_text() != wanted:
            stamp.unlink(missing_ok=True)
            _make(folder, python, requirements, ("--no-deps",) if whole else ())
            stamp.write_text(wanted)  # last: an environment that was interrupted is made again
    return python


def _make(folder: Path, python: Path, requirements: Path, options: Sequence[str]) -> None:
    print(f"Making {folder.name}: other projects and their needs, 1.3 GB, up to ten minutes, once", file=sys.stderr)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *options, "-r", requirements]
    for command in ([sys.executable, "-m", "venv", "--clear", folder], pip):
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines()
            said = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "")
            raise EnvironmentFailedError(f"{folder.name} could not be made; is there a network? pip said: {said}")


def main(arguments: Sequence[str]) -> int:
    """Print the path, or the reason why there is none and 1."""
    try:
        print(interop_python(*map(Path, arguments), whole=True) if arguments else interop_python())
    except EnvironmentFailedError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
