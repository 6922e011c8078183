"""What a user gets: the wheel's contents, and a README whose commands exist."""

from __future__ import annotations

import pkgutil
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from sdkd import cli

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names of the files in a freshly built wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(ROOT)], check=True, capture_output=True, text=True)
    with zipfile.ZipFile(next(folder.glob("sdkd-*.whl"))) as archive:
        return archive.namelist()


def test_the_wheel_holds_the_three_packages_alone(wheel: list[str]) -> None:
    tops = {name.split("/")[0] for name in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"sdkd", "export", "engines"}


def test_the_wheel_holds_every_module_and_the_embedded_teacher(wheel: list[str]) -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    packaged = [name for name in tracked if name.startswith(("sdkd/", "export/", "engines/"))]
    assert set(packaged) - set(wheel) == set()
    assert "sdkd/demo/weights/unet/diffusion_pytorch_model.safetensors" in wheel


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands_of(page: Path) -> list[list[str]]:
    """The words of every `sdkd` command that a page shows on a line of its own."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^\s+sdkd (\S.*)$", text, flags=re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


def test_the_readme_shows_the_commands() -> None:
    assert {"build-engine", "generate", "compare", "distill"} <= {words[0] for words in commands_of(ROOT / "README.md")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_exists(page: Path) -> None:
    for words in commands_of(page):
        command = cli.load_command(words[0])
        assert command is not None, words
        known = {option for parameter in command.params for option in parameter.opts + parameter.secondary_opts}
        assert {word for word in words[1:] if word.startswith("--")} <= known, words
    text = page.read_text(encoding="utf-8")
    assert [tool for tool in re.findall(r"python (tools/\w+\.py)", text) if not (ROOT / tool).is_file()] == []
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert set(re.findall(r"(?:`|^ {4})make ([a-z-]+)", text, flags=re.MULTILINE)) <= targets
    for name in re.findall(r"`((?:sdkd|export|engines)(?:\.\w+)+)", text):
        assert pkgutil.resolve_name(name), name
    paths = re.findall(r"`((?:sdkd|export|engines|tools|tests|benchmarks)/[\w./-]+)`", text)
    assert [path for path in paths if not (ROOT / path).exists()] == []
    local = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert [link for link in local if not (page.parent / link).exists()] == []


WITHOUT_EXTRAS = """
import importlib, pkgutil, sys
for name in ("bitsandbytes", "datasets", "onnxruntime", "openvino", "peft", "polygraphy", "tensorboard", "tensorrt",
             "tensorrt_rtx", "torchmetrics"):
    sys.modules[name] = None
import engines, export, sdkd
for package in (sdkd, export, engines):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        try:
            importlib.import_module(module.name)
        except ImportError:
            print(module.name)
"""


WITHOUT_ONNXRUNTIME = """
import sys
sys.modules["onnxruntime"] = None
from sdkd.targets import registry
registry.packages_of = lambda target: []
registry.driver_version = lambda: "580.65.06"
from sdkd.cli import main
sys.argv = ["sdkd", "build-engine", "demo", "--target", "onnxruntime", "--output", "out"]
main()
"""


def test_plain_sdkd_says_at_once_which_onnxruntime_to_add(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_ONNXRUNTIME]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert " ".join(done.stderr.split()) == (
        "sdkd: target 'onnxruntime' needs the package 'onnxruntime', which is not installed. Install it with: pip "
        "install 'sdkd[gpu]'"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_modules_that_need_no_extra_are_imported_without() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_EXTRAS], cwd=ROOT, capture_output=True, text=True, check=True)
    of_peft = ["engines.lora.adapters", "engines.lora.layers", "engines.lora.modules"]
    assert done.stdout.split() == of_peft
