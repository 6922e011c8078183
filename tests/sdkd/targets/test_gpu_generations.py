"""Which targets are made for which GPUs."""

from __future__ import annotations

import importlib.util

import pytest

from export.build.options import BuildOptions, check_options
from sdkd.errors import InputError
from sdkd.targets.gpu_generations import GENERATIONS, MADE_FOR, PLUGIN, ROWS, generation, targets_for
from sdkd.targets.registry import TARGETS, require


@pytest.mark.parametrize(
    ("capability", "targets"),
    [
        ("7.0", ()),
        ("8.0", ("tensorrt", "inductor", "onnxruntime")),
        ("8.9", ("tensorrt", "tensorrt-rtx", "inductor", "onnxruntime")),
        ("9.0", ("tensorrt", "inductor", "onnxruntime")),
        ("10.0", ("tensorrt", "inductor", "onnxruntime")),
        ("12.0", ("tensorrt", "tensorrt-rtx", "inductor", "onnxruntime")),
        ("13.0", ("tensorrt", "inductor", "onnxruntime")),
    ],
)
def test_every_generation_has_its_targets(capability: str, targets: tuple[str, ...]) -> None:
    assert targets_for(capability) == targets


def test_the_rows_are_targets_and_known_generations() -> None:
    assert set(MADE_FOR) <= set(TARGETS)
    known = [number for number, _, _ in GENERATIONS]
    assert {one for row in ROWS for one in (*row.named, row.since) if one} <= set(known)
    assert generation("9.0") == "9.0 (Hopper: H100, H200, GH200)"
    assert generation("13.0") == "13.0"
    runs = {number: PLUGIN.runs_on(number) for number in known}
    assert [number for number, here in runs.items() if here] == ["8.6", "8.9", "12.0", "12.1"]
    assert PLUGIN.words == "8.6, 8.9, 12.0 and later"


@pytest.mark.parametrize("text", ["9", "sm_90", "", "9.0.1"])
def test_what_is_no_compute_capability_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"is not understood: give one such as 9\.0"):
        targets_for(text)


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")
def test_a_plan_for_an_h100_is_refused_at_once_with_the_targets_that_it_has() -> None:
    wanted = r"does not know 9.0 \(it knows .*\). For 9.0 \(Hopper: H100, .*\) there is tensorrt, inductor, onnxruntime"
    with pytest.raises(InputError, match=wanted):
        check_options(BuildOptions(compute_capabilities=("9.0",)), "tensorrt-rtx", require("tensorrt-rtx"), False)
