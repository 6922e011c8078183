"""Every attribute of TensorRT that we use exists in TensorRT 10, 11 and TensorRT-RTX, or is looked for first.

The names come from the published wheels (`tools/tensorrt_api.py`) and from whatever is installed.
"""

from __future__ import annotations

import ast
import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from export.build.options import HARDWARE, BuildOptions, check_options
from sdkd.errors import InputError
from sdkd.targets import tensorrt_api

ROOT = Path(__file__).parents[3]
API: dict[str, Any] = json.loads(Path(__file__).with_name("tensorrt_api.json").read_text(encoding="utf-8"))
LIBRARIES = frozenset(API["wheels"])
SOURCES = (
    *(f"export/build/tensorrt_{name}.py" for name in ("plan", "progress")),
    *(f"engines/sessions/trt/{name}.py" for name in ("session", "context", "opening")),
    "export/build/options.py",
    "sdkd/targets/gpu_trial.py",
    "sdkd/targets/tensorrt_api.py",
)
MODULE_NAMES = ("trt", "_trt", "library")
OURS = ("Weights",)  # in all, says their documentation: the file has no row of it
# Classes that are only reached after another name was looked for.
BEHIND = {
    "IRuntimeConfig": "create_runtime_config", "IRuntimeCache": "create_runtime_cache", "IAttention": "ATTENTION_INPUT",
    "EngineValidity": "get_engine_validity", "EngineInvalidityDiagnostics": "get_engine_validity",
    "IAttentionInputLayer": "ATTENTION_INPUT",
}  # fmt: skip

# What only options of builds use, which are refused for the other library.
OPTIONAL = {"set_compute_capability", "ComputeCapability", "CURRENT"}

# What mypy holds the code to: of each class of the library the members that are used.
TYPES: dict[str, set[str]] = {
    name: {one for one in (*kind.__annotations__, *vars(kind)) if not one.startswith("_")}
    for name, kind in vars(tensorrt_api).items()
    if name in API["classes"]
}


@dataclass(frozen=True)
class Used:
    """An attribute of a class of the library, or of the module itself, and where it is read."""

    kind: str
    name: str
    place: str


def _holder(node: ast.expr) -> str:
    return getattr(node, "id", getattr(node, "attr", ""))


def used(source: str) -> set[Used]:
    """Attributes that a file reads of the library and its classes, and of objects those that not every library has."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / source).read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Attribute) or node.attr.startswith("__"):
            continue
        place = f"{source}:{node.lineno}"
        holder = _holder(node.value)
        if holder in MODULE_NAMES:
            found.add(Used("", node.attr, place))
        elif isinstance(node.value, ast.Attribute) and _holder(node.value.value) in MODULE_NAMES:
            found.add(Used(node.value.attr, node.attr, place))
        else:
            found |= {
                Used(kind, node.attr, place) for kind in TYPES if node.attr in TYPES[kind] and _rare(kind, node.attr)
            }
    return {one for one in found if one.kind or one.name not in OURS}


def guards(source: str) -> set[str]:
    """Names that a file looks for before it uses them: in `hasattr`, in `getattr` with a default."""
    calls = [
        node for node in ast.walk(ast.parse((ROOT / source).read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
    ]
    found = set()
    for call in calls:
        looks = _holder(call.func) == "hasattr" or (_holder(call.func) == "getattr" and len(call.args) == 3)
        if looks and isinstance(call.args[1], ast.Constant):
            found.add(str(call.args[1].value))
    return found


def having(kind: str, name: str) -> frozenset[str]:
    """Libraries whose class has an attribute; with no class, those that have a class of that name."""
    rows = API["classes"]
    if kind:
        row = rows[kind]
        return LIBRARIES if name in row["all"] else frozenset(one for one in LIBRARIES if name in row.get(one, ()))
    if name in rows:
        return LIBRARIES if rows[name]["all"] else frozenset(one for one in LIBRARIES if one in rows[name])
    return frozenset()


def _rare(kind: str, name: str) -> bool:
    return having(kind, name) != LIBRARIES


def _guarded(one: Used, looked_for: set[str]) -> bool:
    """Whether a name of the same class, or the one that the class is behind, was looked for, and is as rare."""
    where = having(one.kind, one.name)
    same = [having(one.kind, guard) for guard in looked_for]
    behind = BEHIND.get(one.kind or one.name, "")
    outer = [having(kind, behind) for kind in ("", *API["classes"])] if behind in looked_for else []
    return any(found and found <= where for found in (*same, *outer))


def test_every_declared_member_exists() -> None:
    assert len(TYPES) > 12
    assert [f"{kind}.{name}" for kind, names in TYPES.items() for name in names if not having(kind, name)] == []
    declared = {name for name in tensorrt_api.TensorRT.__annotations__ if not name.startswith("_")}
    assert [name for name in declared - set(OURS) if not having("", name)] == []


@pytest.mark.parametrize("source", SOURCES)
def test_every_attribute_exists_or_is_looked_for(source: str) -> None:
    looked_for = guards(source) | OPTIONAL
    missing = []
    for one in used(source):
        where = having(one.kind, one.name)
        assert where, f"{one.kind}.{one.name} at {one.place} is in no TensorRT at all"
        if where != LIBRARIES and not _guarded(one, looked_for):
            missing.append(f"{one.place}: {one.kind}.{one.name} is missing in {', '.join(sorted(LIBRARIES - where))}")
    assert missing == []


def test_the_search_finds_what_is_there() -> None:
    names = {(one.kind, one.name) for source in SOURCES for one in used(source)}
    for expected in (
        ("Runtime", "get_engine_validity"), ("IRuntimeConfig", "set_runtime_cache"), ("IAttention", "decomposable"),
        ("ICudaEngine", "create_runtime_config"), ("IBuilderConfig", "set_compute_capability"), ("", "Runtime"),
        ("TensorIOMode", "INPUT"), ("ComputeCapability", "CURRENT"),
    ):  # fmt: skip
        assert expected in names, expected


def test_what_one_generation_lacks() -> None:
    """The differences that the code lives with; a new wheel that changes them is worth a look."""
    rtx = {one for one in LIBRARIES if "rtx" in one}
    assert having("Runtime", "get_engine_validity") == rtx
    assert having("IRuntimeConfig", "create_runtime_cache") == rtx
    assert having("IBuilderConfig", "set_compute_capability") == rtx
    assert "tensorrt 10.8.0.43" not in having("", "IAttentionInputLayer")
    assert "tensorrt 10.8.0.43" not in having("HardwareCompatibilityLevel", "SAME_COMPUTE_CAPABILITY")
    assert having("BuilderFlag", "FP16").isdisjoint(one for one in LIBRARIES if one.startswith("tensorrt 11"))
    assert all("tensorrt 11.4.0.106" in having("HardwareCompatibilityLevel", name) for name in HARDWARE.values())


@pytest.mark.parametrize("module", ["tensorrt_rtx", "tensorrt"])
def test_the_installed_library_has_them_too(module: str) -> None:
    library = pytest.importorskip(module)
    generation = next(
        (one for one in LIBRARIES if one.startswith(f"{module} {library.__version__.rpartition('.')[0]}")), ""
    )
    found = {(one.kind, one.name) for source in SOURCES for one in used(source)}
    for kind, name in found | {(kind, name) for kind, names in TYPES.items() for name in names}:
        if not _rare(kind, name) or generation in having(kind, name):
            assert hasattr(getattr(library, kind) if kind else library, name), f"{kind}.{name}"


def test_a_level_that_an_older_library_lacks_is_refused_by_name() -> None:
    levels = SimpleNamespace(AMPERE_PLUS=1)  # as in 10.8: see above
    old: Any = SimpleNamespace(__name__="tensorrt", __version__="10.8.0.43", HardwareCompatibilityLevel=levels)
    check_options(BuildOptions(hardware_compatible="ampere-plus", refit="lora"), "tensorrt", old, True)
    with pytest.raises(
        InputError,
        match=r"--hardware-compatible cannot be had for tensorrt: tensorrt 10.8.0.43 has no "
        r"HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY",
    ):
        check_options(BuildOptions(hardware_compatible="same-compute-capability"), "tensorrt", old, True)


def test_our_dtype_names_are_in_all() -> None:
    from export.build.tensorrt_plan import DTYPES

    session = importlib.import_module("engines.sessions.trt.session")
    assert set(session.DATA_TYPES.values()) == set(DTYPES)
    assert all(having("DataType", name) == LIBRARIES for name in DTYPES)
