"""Install sdkd's extras for ONNX Runtime into a fresh environment, one after the other, and look at what each gives.

    python tools/try_extras.py              # about 6 GB and a quarter of an hour; needs a network and no GPU

plain       no ONNX Runtime: an export is refused at once, and names the extra to add
cpu         the CPU's package; nothing lies over anything
overlay     `gpu` installed on top: doctor names both packages and the repair
repaired    by that very command, the way it is named: CUDA is listed, and nothing lies over anything
lost        the CPU's package on top again and removed: what is left is refused, with the repair
rtx         the CPU's package with the TensorRT-RTX plugin, whose library is there

Versions are those of constraints.txt. Status 1 where a step finds something else than this.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PROVIDERS = "import onnxruntime; print(*onnxruntime.get_available_providers())"
PLUGIN = "import onnxruntime_ep_nv_tensorrt_rtx as plugin; print(plugin.get_library_path())"


class Environment:
    """A virtual environment with nothing but what is installed here, step by step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)

    def run(self, *words: str, fails: bool = False) -> str:
        """What a program of the environment prints; SystemExit where its status is not the expected one."""
        command = [str(self.folder / "bin" / words[0]), *words[1:]]
        alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        done = subprocess.run(command, capture_output=True, text=True, cwd=self.folder, env=alone, check=False)
        if bool(done.returncode) != fails:
            raise SystemExit(
                f"{' '.join(words)} ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
            )
        return " ".join((done.stderr if fails else done.stdout).split())

    def install(self, extra: str) -> None:
        """Install sdkd with an extra, or plain."""
        wanted = f"{ROOT}[{extra}]" if extra else str(ROOT)
        self.run("python", "-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt"), wanted)

    def remove(self, *packages: str) -> None:
        """Uninstall packages."""
        self.run("python", "-m", "pip", "uninstall", "--quiet", "--yes", *packages)

    def doctor(self) -> dict[str, Any]:
        """What `sdkd doctor` says."""
        found: dict[str, Any] = json.loads(self.run("sdkd", "doctor", "--json"))
        return found

    def target(self) -> str:
        """What it says of the target onnxruntime: the reason, and what to do."""
        row = next(row for row in self.doctor()["targets"] if row["target"] == "onnxruntime")
        return f"{row['reason']}; {row['fix']}"


def plain(place: Environment) -> str:
    """No ONNX Runtime."""
    place.install("")
    return place.run("sdkd", "export", "demo", "out", fails=True)


def cpu(place: Environment) -> str:
    """The package for the CPU."""
    place.install("cpu")
    return f"{place.run('python', '-c', PROVIDERS)}; {place.target()}; {place.doctor()['packages']}"


def overlay(place: Environment) -> str:
    """That for CUDA on top of it."""
    place.install("gpu")
    return "; ".join(f"{row['reason']}: {row['fix']}" for row in place.doctor()["packages"])


def repaired(place: Environment) -> str:
    """As doctor says, but for the extra: this machine has no GPU, and the packages for one are tried all the same."""
    place.remove("onnxruntime", "onnxruntime-gpu")
    place.install("gpu")
    return f"{place.run('python', '-c', PROVIDERS)}; {place.doctor()['packages']}"


def lost(place: Environment) -> str:
    """One of two packages removed."""
    place.install("cpu")
    place.remove("onnxruntime")
    return place.target()


def rtx(place: Environment) -> str:
    """The plugin beside the package for the CPU."""
    place.remove("onnxruntime-gpu")
    place.install("onnxruntime-rtx")
    return f"{place.run('python', '-c', PROVIDERS)}; {place.run('python', '-c', PLUGIN)}; {place.doctor()['packages']}"


STEPS: tuple[tuple[Callable[[Environment], str], tuple[str, ...]], ...] = (
    (plain, ("needs the package 'onnxruntime', which is not installed", "pip install 'sdkd[cpu]'")),
    (cpu, ("CPUExecutionProvider; ready", "[]")),
    (overlay, ("onnxruntime and onnxruntime-gpu lie over one another: pip uninstall -y onnxruntime onnxruntime-gpu",)),
    (repaired, ("CUDAExecutionProvider", "[]")),
    (lost, ("onnxruntime has lost files", "pip uninstall -y onnxruntime-gpu, then pip install 'sdkd[cpu]'")),
    (rtx, ("CPUExecutionProvider; ", "libonnxruntime_providers_nv_tensorrt_rtx.so; []")),
)


def main() -> int:
    """Go through the steps; the number of those that found something else."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        place = Environment(Path(folder) / "venv")
        for step, expected in STEPS:
            said = step(place)
            fine = all(text in said for text in expected)
            wrong += not fine
            print(f"{step.__name__:10} {'as expected' if fine else 'NOT AS EXPECTED'}: {said}", flush=True)
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
