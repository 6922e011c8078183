"""What a user gets: the wheel's contents, and a README whose commands exist."""

from __future__ import annotations

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


def _readme_commands() -> list[list[str]]:
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if re.match(r"\s+sdkd \S", line)]
    return [shlex.split(line, comments=True)[1:] for line in lines]


def test_the_readme_shows_the_commands() -> None:
    assert len(_readme_commands()) >= 6


@pytest.mark.parametrize("words", _readme_commands(), ids=" ".join)
def test_a_readme_command_exists_with_its_options(words: list[str]) -> None:
    command = cli.load_command(words[0])
    assert command is not None
    known = {option for parameter in command.params for option in parameter.opts + parameter.secondary_opts}
    assert {word for word in words[1:] if word.startswith("--")} <= known


def test_readme_links_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    local = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert [link for link in local if not (ROOT / link).exists()] == []
