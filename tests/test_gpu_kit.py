"""The kit of wheels: resolved, split, checked and installed into an empty environment."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import gpu_kit

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


BACKEND = """
import zipfile
def build_wheel(folder, config_settings=None, metadata_directory=None):
    name, info = "pure_one-3.0-py3-none-any.whl", "pure_one-3.0.dist-info"
    files = {
        "pure_one.py": open("pure_one.py").read(),
        f"{info}/METADATA": "Metadata-Version: 2.1\\nName: pure_one\\nVersion: 3.0\\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\\nGenerator: test\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
        f"{info}/RECORD": "",
    }
    with zipfile.ZipFile(f"{folder}/{name}", "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return name
"""


def wheel(
    folder: Path, name: str, version: str, needs: tuple[str, ...] = (), size: int = 0, python: str = ">=3.8"
) -> None:
    """A small wheel, as pip accepts it: a module `name` with VERSION, and `size` bytes that do not compress."""
    info = f"{name}-{version}.dist-info"
    head = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Python: {python}\n"
    files = {
        f"{name}/__init__.py": f"VERSION = {version!r}\n".encode(),
        f"{name}/data.bin": random.Random(name).randbytes(size),
        f"{info}/METADATA": (head + "".join(f"Requires-Dist: {one}\n" for one in needs)).encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    rows = []
    for path, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        rows.append(f"{path},sha256={digest},{len(data)}")
    files[f"{info}/RECORD"] = "\n".join([*rows, f"{info}/RECORD,,"]).encode()
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, data in files.items():
            archive.writestr(path, data)


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """Wheels to choose from: `large` needs `helper` and `torch`, which the machine has."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheel(folder, "large", "2.0", ("helper>=1", "torch"), size=250_000)
    for name, version in (("helper", "1.0"), ("helper", "1.5"), ("torch", "2.11")):
        wheel(folder, name, version)
    return folder


def make(tmp_path: Path, index: Path, *more: str) -> Path:
    kit = tmp_path / "kit"
    tmp_path.mkdir(exist_ok=True)
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("helper==1.0\ntorch==2.13.0\n")
    words = [str(kit), "--packages", "large", "--present", "torch", "--python", PYTHON, "--find-links", str(index)]
    gpu_kit.main([*words, "--constraints", str(constraints), "--part-mb", "0.1", *more])
    return kit


def files_of(kit: Path) -> list[str]:
    return [one["file"] for one in json.loads((kit / "kit.json").read_text())["wheels"]]


def install(kit: Path, target: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(kit / "install.py"), str(target), *more]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_kit_is_split_and_installs_what_came_whole_into_an_empty_folder(
    tmp_path: Path, index: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kit = make(tmp_path, index)
    described = json.loads((kit / "kit.json").read_text())
    assert [(one["file"], len(one["pieces"])) for one in described["wheels"]] == [
        ("helper-1.0-py3-none-any.whl", 1),  # as the constraints say; torch is left out, with its pin
        ("large-2.0-py3-none-any.whl", 3),
    ]
    parts = [f"large-2.0-py3-none-any.whl.part{number:02d}" for number in (1, 2, 3)]
    assert sorted(path.name for path in kit.glob("large*")) == parts
    assert max(path.stat().st_size for path in kit.glob("*.whl*")) <= 100_000
    assert "large-2.0-py3-none-any.whl in 3 parts" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"kit is there and not empty: name another folder"):
        make(tmp_path, index)

    target, away, part = tmp_path / "packages", tmp_path / "second delivery", kit / parts[1]
    whole = part.read_bytes()
    for wrong, said in (
        (whole[:-1] + b"?", f"{part.name} is damaged: bring it again"),
        (whole[:70_000], f"{part.name} has 70000 bytes, not 100000: it was copied in part, bring it again"),
    ):
        part.write_bytes(wrong)
        assert install(kit, target).stderr.strip() == said
    part.unlink()
    lacking = install(kit, target)
    assert (lacking.returncode, target.exists()) == (1, False)
    assert f"{parts[1]} is in none of" in lacking.stderr
    away.mkdir()
    (away / part.name).write_bytes(whole)
    done = install(kit, target, "--from", str(away))
    assert done.returncode == 0, done.stderr
    code = (
        f"import sys; sys.path.insert(0, {str(target)!r}); import large, helper; print(large.VERSION, helper.VERSION)"
    )
    asked = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True)
    assert asked.stdout.strip() == "2.0 1.0"
    assert [path for path in kit.iterdir() if path.is_dir()] == []  # nothing is left behind
    assert list(target.rglob("*.pyc")) == []  # compiled when it is imported, if at all
    (kit / "kit.json").write_text(json.dumps({**described, "python": "3.99"}))
    assert f"this kit is for Python 3.99, and this is {PYTHON}" in install(kit, target).stderr


def test_what_is_there_is_left_out_and_the_rest_fits_its_versions_and_its_python(tmp_path: Path, index: Path) -> None:
    for version in ("1.0", "2.0"):
        wheel(index, "needy", version, (f"hub=={version}",))
        wheel(index, "hub", version)
    freeze = tmp_path / "there.txt"
    freeze.write_text("# of the machine\nTorch==2.11.0+cu130\nhub==1.0\n-e git+https://x/y#egg=y\nlocal @ file:///x\n")
    wheel(index, "torch", "2.11.0")
    assert gpu_kit.present_of(f"{freeze},hub") == {"torch": "2.11.0", "hub": "", "local": ""}
    kit = make(tmp_path, index, "--packages", "needy,large", "--present", str(freeze))
    assert files_of(kit) == [f"{name}-py3-none-any.whl" for name in ("helper-1.0", "large-2.0", "needy-1.0")]
    with pytest.raises(SystemExit, match=r"--present: 'there\.txt 2' is no file, name or NAME==VERSION"):
        gpu_kit.present_of("there.txt 2")
    # What is there, a numpy say, may be for the other machine's Python alone; what is gathered must be for it, too.
    later = f"3.{sys.version_info.minor + 1}"
    wheel(index, "helper", "1.2", python=f">={later}")
    words = ("--present", "torch,helper==1.2", "--python", later)
    assert files_of(make(tmp_path / "later", index, *words)) == ["large-2.0-py3-none-any.whl"]
    wheel(index, "large", "2.0", ("helper>=1", "torch"), python=f"<{later}")
    with pytest.raises(SystemExit, match=r"pip download failed: (.|\n)*large"):
        make(tmp_path / "again", index, *words)


def test_source_packages_are_built_when_they_are_pure(tmp_path: Path, index: Path) -> None:
    source = tmp_path / "pure_one-3.0"
    source.mkdir()
    (source / "pure_one.py").write_text("VERSION = '3.0'\n")
    (source / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: pure_one\nVersion: 3.0\n")
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    (source / "backend.py").write_text(BACKEND)
    with tarfile.open(index / "pure_one-3.0.tar.gz", "w:gz") as archive:
        archive.add(source, source.name)
    assert "pure_one-3.0-py3-none-any.whl" in files_of(make(tmp_path, index, "--build", "pure_one"))
    with pytest.raises(SystemExit, match=r"pip install failed: .*nothing-of-this-name"):
        make(tmp_path / "again", index, "--packages", "nothing-of-this-name")
