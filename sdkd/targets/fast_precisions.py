"""Which precisions a CPU or GPU has units for, and what that means for eight bits: rows, no looking at the machine."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from sdkd.core.contract import ENGINE_PRECISIONS, EnginePrecision
from sdkd.targets.gpu_generations import parse

FP8_CAPABILITY = (8, 9)
TENSOR_CORES = "tensor cores"

# (unit in the kernel's words, what it multiplies fast, why), the fastest first; x86, then ARM.
CPU_ROWS: tuple[tuple[str, EnginePrecision, str], ...] = (
    ("amx_bf16", "bf16", "multiplies tiles of bf16"),
    ("avx512_bf16", "bf16", "adds products of two bf16 pairs per lane"),
    ("bf16", "bf16", "multiplies matrices of bf16 (ARM)"),
    ("amx_fp16", "fp16", "multiplies tiles of fp16"),
    ("avx512_fp16", "fp16", "computes in fp16, twice as wide as fp32"),
    ("asimdhp", "fp16", "computes in fp16, twice as wide as fp32 (ARM)"),
    ("amx_int8", "int8", "multiplies tiles of int8, with sums of 32 bits"),
    ("avx512_vnni", "int8", "adds four products per lane in a sum of 32 bits"),
    ("avx_vnni", "int8", "adds four products per lane in a sum of 32 bits"),
    ("i8mm", "int8", "multiplies matrices of int8, with sums of 32 bits (ARM)"),
    ("asimddp", "int8", "adds four products per lane in a sum of 32 bits (ARM)"),
)
# Without such a unit; the products of two pairs of bytes still come at once.
PAIRS: tuple[str, ...] = ("avx512bw", "avx2")
# (precision, the first compute capability, why)
GPU_ROWS: tuple[tuple[EnginePrecision, tuple[int, int], str], ...] = (
    ("fp16", (7, 0), "since Volta"),
    ("bf16", (8, 0), "since Ampere"),
    ("int8", (7, 5), "since Turing"),
    ("fp8", FP8_CAPABILITY, "since Ada and Hopper"),
)


@dataclass(frozen=True)
class Fast:
    """Whether a precision is fast on a machine, by which unit (empty without one), and why."""

    precision: EnginePrecision
    fast: bool
    unit: str
    why: str


def weight_bits(flags: Collection[str]) -> Literal[7, 8]:
    """Bits that int8 weights may have on a CPU of these flags, in the kernel's words.

    8 where products of bytes are added up in 32 bits: VNNI, AMX, ARM's dot products. 7 on other CPUs: AVX2 and AVX-512
    add two products u8 * s8 in 16 bits (`vpmaddubsw`), and 2 * 255 * 127 overflows those where 2 * 255 * 63 does not.
    7, too, where the flags are not known.
    """
    return 8 if any(precision == "int8" and unit in flags for unit, precision, _ in CPU_ROWS) else 7


def cpu_precisions_fast(flags: Collection[str]) -> tuple[Fast, ...]:
    """One row for each precision, of a CPU with these flags."""
    return tuple(_on_cpu(precision, flags) for precision in ENGINE_PRECISIONS)


def _on_cpu(precision: EnginePrecision, flags: Collection[str]) -> Fast:
    for unit, fast, why in CPU_ROWS:
        if fast == precision and unit in flags:
            return Fast(precision, True, unit, why)
    if precision == "fp32":
        return Fast(precision, True, "", "what every CPU computes in")
    if precision == "int8" and (pairs := next((unit for unit in PAIRS if unit in flags), "")):
        return Fast(precision, True, pairs, "adds two products in 16 bits, so that weights get 7 bits")
    known = ", ".join(unit for unit, fast, _ in CPU_ROWS if fast == precision)
    return Fast(precision, False, "", f"no unit for it here ({known})" if known else "CPUs have no unit for it")


def gpu_precisions_fast(compute_capability: str) -> tuple[Fast, ...]:
    """One row for each precision, of an NVIDIA GPU of a compute capability such as 8.9; InputError for other text."""
    here, found = parse(compute_capability), list[Fast]()
    first = {precision: (least, why) for precision, least, why in GPU_ROWS}
    for precision in ENGINE_PRECISIONS:
        if precision not in first:
            tf32 = "on tensor cores in TF32 where that is allowed" if here >= (8, 0) else "what every GPU computes in"
            found.append(Fast(precision, True, "", tf32))
            continue
        least, why = first[precision]
        if here >= least:
            found.append(Fast(precision, True, TENSOR_CORES, why))
        else:
            found.append(Fast(precision, False, "", f"needs compute capability {_text(least)}, this is {_text(here)}"))
    return tuple(found)


def fp8_problem(compute_capability: str) -> str | None:
    """Why engines in fp8 cannot run on a GPU of this compute capability (`8.6`), and what to do; None where they can.

    InputError for other text.
    """
    here = parse(compute_capability)
    if here >= FP8_CAPABILITY:
        return None
    advice = "build with --precision int8" if here >= (7, 5) else "build with --precision fp16"
    return (
        f"fp8 needs a GPU of compute capability {_text(FP8_CAPABILITY)} or later (Ada, Hopper), and this is "
        f"{_text(here)}: {advice}"
    )


def _text(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
