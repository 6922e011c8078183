"""No telemetry: what libraries would send, or note down in the home folder, about their users is switched off.

`import sdkd` does it, before any of them is imported: they read the environment, which child processes inherit, when
they are loaded. ONNX Runtime (1.32) keeps a database of events and sends it from a thread of its own. OpenVINO has no
variable; it asks the package `openvino_telemetry`, which sends an event at its import, and does without where it is
missing.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

VARIABLES = {"ORT_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DISABLE_TELEMETRY": "1"}
_OPENVINO = "openvino_telemetry"


class Telemetry:
    """What `openvino_telemetry.Telemetry` is to its callers, and does nothing."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __getattr__(self, name: str) -> object:
        return lambda *_, **__: None


def switch_off() -> None:
    """Switch off the telemetry of ONNX Runtime, OpenVINO and the hub's libraries, here and in child processes."""
    os.environ.update(VARIABLES)
    if loaded := sys.modules.get("onnxruntime"):  # by somebody else, before us
        loaded.disable_telemetry_events()
    stand_in = ModuleType(_OPENVINO)
    stand_in.__spec__ = ModuleSpec(_OPENVINO, None)
    vars(stand_in)["Telemetry"] = Telemetry
    sys.modules[_OPENVINO] = stand_in
