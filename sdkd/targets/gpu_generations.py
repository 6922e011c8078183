"""Which targets run on which NVIDIA GPUs, by compute capability: rows with their sources, no looking at the machine."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sdkd.errors import InputError

Capability = tuple[int, int]

# (compute capability, architecture, GPUs), from developer.nvidia.com/cuda-gpus.
GENERATIONS: tuple[tuple[str, str, str], ...] = (
    ("7.0", "Volta", "V100"),
    ("7.5", "Turing", "T4, RTX 20"),
    ("8.0", "Ampere", "A100, A30"),
    ("8.6", "Ampere", "A10, A40, RTX 30"),
    ("8.9", "Ada", "L4, L40, RTX 40"),
    ("9.0", "Hopper", "H100, H200, GH200"),
    ("10.0", "Blackwell", "B200, GB200"),
    ("10.3", "Blackwell", "B300, GB300"),
    ("12.0", "Blackwell", "RTX 50, RTX PRO 6000"),
    ("12.1", "Blackwell", "GB10 (DGX Spark)"),
)


@dataclass(frozen=True)
class GpuRow:
    """The GPUs of one target, or of one way to run it: the `named` ones and those from `since` on; and who says so."""

    target: str
    source: str
    named: tuple[str, ...] = ()
    since: str = ""
    way: str = ""

    def runs_on(self, capability: str) -> bool:
        """Whether the target's library is made for GPUs of a compute capability; InputError for other text."""
        asked = parse(capability)
        return asked in map(parse, self.named) or bool(self.since and asked >= parse(self.since))

    @property
    def words(self) -> str:
        """Its GPUs in words: `7.5 and later`, `8.6, 8.9`."""
        return ", ".join((*self.named, *([f"{self.since} and later"] if self.since else [])))


MADE_FOR: dict[str, GpuRow] = {
    row.target: row
    for row in (
        GpuRow("tensorrt", "support matrices of TensorRT 10, and CUDA 13", since="7.5"),
        GpuRow(
            "tensorrt-rtx", "support matrices of TensorRT-RTX 1.0 to 1.5", named=("7.5", "8.6", "8.9", "12.0", "12.1")
        ),
        GpuRow("inductor", "what PyTorch is built for with CUDA 13", since="7.5"),
        GpuRow("onnxruntime", "what CUDA 13 compiles for", since="7.5", way="CUDA"),
    )
}

PLUGIN = GpuRow(
    *("onnxruntime", "the provider options of onnxruntime-ep-nv-tensorrt-rtx 0.5.0", ("8.6", "8.9")),
    since="12.0",
    way="TensorRT-RTX plugin",
)
ROWS: tuple[GpuRow, ...] = (*MADE_FOR.values(), PLUGIN)


def parse(capability: str) -> Capability:
    """`8.9` as numbers; InputError for other text."""
    if not re.fullmatch(r"\d+\.\d", capability):
        raise InputError(f"compute capability {capability!r} is not understood: give one such as 9.0")
    major, minor = capability.split(".")
    return int(major), int(minor)


def targets_for(capability: str) -> tuple[str, ...]:
    """The targets that are made for GPUs of a compute capability; InputError for other text."""
    return tuple(name for name, row in MADE_FOR.items() if row.runs_on(capability))


def generation(capability: str) -> str:
    """The GPUs of a compute capability in words: `9.0 (Hopper: H100, H200, GH200)`."""
    known = {number: f"{number} ({name}: {gpus})" for number, name, gpus in GENERATIONS}
    return known.get(capability, capability)
