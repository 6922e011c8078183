"""Which units make which precision fast, and when int8 weights have seven bits."""

from __future__ import annotations

import numpy as np
import pytest

from sdkd.errors import InputError
from sdkd.targets.fast_precisions import cpu_precisions_fast, fp8_problem, gpu_precisions_fast, weight_bits

AVX2 = {"avx2", "fma"}
CASCADE_LAKE = AVX2 | {"avx512f", "avx512bw", "avx512_vnni"}
SAPPHIRE_RAPIDS = CASCADE_LAKE | {"amx_int8", "amx_bf16", "avx512_bf16", "avx512_fp16", "avx_vnni"}


@pytest.mark.parametrize(
    ("flags", "bits", "fast"),
    [
        (AVX2, 7, {"fp32": "", "int8": "avx2"}),
        (AVX2 | {"avx512f", "avx512bw"}, 7, {"fp32": "", "int8": "avx512bw"}),
        (AVX2 | {"avx_vnni"}, 8, {"fp32": "", "int8": "avx_vnni"}),
        (CASCADE_LAKE, 8, {"fp32": "", "int8": "avx512_vnni"}),
        (SAPPHIRE_RAPIDS, 8, {"fp32": "", "fp16": "avx512_fp16", "bf16": "amx_bf16", "int8": "amx_int8"}),
        ({"asimd", "asimddp", "asimdhp"}, 8, {"fp32": "", "fp16": "asimdhp", "int8": "asimddp"}),
        (set(), 7, {"fp32": ""}),
    ],
)
def test_a_cpu_by_its_flags(flags: set[str], bits: int, fast: dict[str, str]) -> None:
    assert weight_bits(flags) == bits
    rows = cpu_precisions_fast(flags)
    assert [row.precision for row in rows] == ["fp32", "fp16", "bf16", "int8", "fp8"]
    assert {row.precision: row.unit for row in rows if row.fast} == fast
    assert rows[-1].why == "CPUs have no unit for it"


def test_a_precision_without_a_unit_names_those_that_it_needs() -> None:
    bf16 = cpu_precisions_fast(AVX2)[2]
    assert (bf16.fast, bf16.why) == (False, "no unit for it here (amx_bf16, avx512_bf16, bf16)")


def test_two_products_overflow_sixteen_bits_with_weights_of_eight_bits_alone() -> None:
    limit = np.iinfo(np.int16).max
    assert [2 * 255 * (2 ** (bits - 1) - 1) <= limit for bits in (7, 8)] == [True, False]


@pytest.mark.parametrize(
    ("capability", "fast"),
    [
        ("6.1", ["fp32"]),
        ("7.0", ["fp32", "fp16"]),
        ("7.5", ["fp32", "fp16", "int8"]),
        ("8.6", ["fp32", "fp16", "bf16", "int8"]),
        ("8.9", ["fp32", "fp16", "bf16", "int8", "fp8"]),
        ("12.0", ["fp32", "fp16", "bf16", "int8", "fp8"]),
    ],
)
def test_a_gpu_by_its_compute_capability(capability: str, fast: list[str]) -> None:
    rows = gpu_precisions_fast(capability)
    assert [row.precision for row in rows if row.fast] == fast
    assert all(row.why == f"needs compute capability 8.9, this is {capability}" for row in rows[-1:] if not row.fast)


def test_fp8_is_refused_by_name_where_there_is_none() -> None:
    assert fp8_problem("8.9") is None
    assert fp8_problem("9.0") is None
    assert fp8_problem("10.0") is None  # not compared as text
    refused = "fp8 needs a GPU of compute capability 8.9 or later (Ada, Hopper), and this is 8.6: build with "
    assert fp8_problem("8.6") == f"{refused}--precision int8"
    assert fp8_problem("7.0") == f"{refused.replace('8.6', '7.0')}--precision fp16"
    for text in ("new", "9", "9.x"):
        with pytest.raises(InputError, match=f"compute capability '{text}' is not understood: give one such as 9.0"):
            fp8_problem(text)
