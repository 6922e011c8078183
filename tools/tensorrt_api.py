"""What TensorRT's Python bindings have, by generation: tests/export/build/tensorrt_api.json, from the wheels.

    python tools/tensorrt_api.py

The wheels of the bindings are small and hold the compiled module, which needs the libraries only when it is used:
against a stub library of the same names it can be imported and asked. Needs pip with an index, gcc and nm.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

WHEELS = (
    "tensorrt_cu12_bindings==10.8.0.43",
    "tensorrt_cu12_bindings==10.16.1.11",
    "tensorrt_cu13_bindings==11.0.0.114",
    "tensorrt_cu13_bindings==11.4.0.106",
    "tensorrt_rtx_cu13_bindings==1.4.0.76",
    "tensorrt_rtx_cu13_bindings==1.7.1.116",
)
# The classes that export/ and engines/ use.
CLASSES = (
    "Builder", "BuilderFlag", "ComputeCapability", "DataType", "EngineInspector", "EngineInvalidityDiagnostics",
    "EngineValidity", "ExecutionContextAllocationStrategy", "HardwareCompatibilityLevel", "IAttention",
    "IAttentionInputLayer", "IBuilderConfig", "ICudaEngine", "IExecutionContext", "ILayer", "ILogger",
    "INetworkDefinition", "IProgressMonitor", "IRuntimeCache", "IRuntimeConfig", "ITensor", "LayerInformationFormat",
    "LayerType", "Logger", "MemoryPoolType", "NetworkDefinitionCreationFlag", "OnnxParser", "OnnxParserRefitter",
    "ParserError", "Refitter", "Runtime", "TensorIOMode", "TensorLocation",
)  # fmt: skip
OUTPUT = Path(__file__).parent.parent / "tests" / "export" / "build" / "tensorrt_api.json"


def names(module: Any) -> dict[str, list[str]]:
    """Public attributes of each class that a module has."""
    found = {name: getattr(module, name) for name in CLASSES if hasattr(module, name)}
    return {name: [one for one in dir(kind) if not one.startswith("_")] for name, kind in found.items()}


def dump(library: str) -> None:
    """Import one compiled module and print its names as JSON."""
    path = Path(library)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    print(json.dumps(names(module)))


def stubs(library: Path, folder: Path) -> None:
    """Empty libraries of the names that a compiled module wants."""
    dynamic = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    wanted = re.findall(r"NEEDED.*\[(lib(?:nv|tensorrt)[^\]]*)\]", dynamic)
    listed = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    symbols = re.findall(r"^\s+U ((?!_?Py)\w+)$", listed.stdout, re.M)
    source = folder / "stub.c"
    source.write_text("".join(f"void* {symbol}(void) {{ return 0; }}\n" for symbol in symbols))
    for name in wanted:
        subprocess.run(
            ["gcc", "-w", "-fno-builtin", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", folder / name, source],
            check=True,
        )


def inspect(requirement: str) -> dict[str, Any]:
    """The names of one wheel's module."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, requirement]
        subprocess.run(pip, check=True)
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        (library,) = folder.glob("*/tensorrt*.so")
        stubs(library, folder)
        command = [sys.executable, __file__, str(library)]
        environment = os.environ | {"LD_LIBRARY_PATH": str(folder)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return {"wheel": wheel.name, "classes": json.loads(done.stdout)}


def packed(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Names by class: under "all" what every library has, under a library what it alone or not every one has."""
    classes = {}
    for kind in CLASSES:
        having = {library: set(entry["classes"].get(kind, ())) for library, entry in found.items()}
        common = set.intersection(*having.values())
        rest = {library: sorted(have - common) for library, have in having.items() if have - common}
        classes[kind] = {"all": sorted(common), **rest}
    return {"wheels": {library: entry["wheel"] for library, entry in found.items()}, "classes": classes}


def main() -> None:
    """Write the file, or as a child answer for one module."""
    if len(sys.argv) > 1:
        dump(sys.argv[1])
        return
    found = {f"{wheel.split('_cu')[0]} {wheel.split('==')[1]}": inspect(wheel) for wheel in WHEELS}
    text = json.dumps(packed(found), separators=(",", ":"))
    OUTPUT.write_text(re.sub(r'([\]}],)(?=")', r"\1\n", text) + "\n")


if __name__ == "__main__":
    main()
