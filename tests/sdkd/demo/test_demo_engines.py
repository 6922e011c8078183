"""The demo's engines: those that this machine can build and run, and a reason for each that it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdkd.demo.run import ENGINES, DemoResult, wanted_engines
from sdkd.targets.registry import availability, cpu_precisions


def test_every_engine_is_wanted_or_left_out_with_a_reason(tmp_path: Path) -> None:
    result = DemoResult(tmp_path)
    wanted = [(plan.target.name, plan.precision) for plan in wanted_engines(result)]
    assert ("onnxruntime", "fp32") in wanted
    assert wanted == [pair for pair in ENGINES if pair in wanted]  # in the report's order
    missing = [(target, precision) for target, precision in ENGINES if (target, precision) not in wanted]
    assert set(result.skipped) <= {name for target, precision in missing for name in (target, f"{target}-{precision}")}
    assert len(result.skipped) == len({target for target, _ in missing})


def test_half_precision_is_for_cpus_that_have_it(tmp_path: Path) -> None:
    if not availability("openvino").can_build:
        pytest.skip("no OpenVINO")
    result = DemoResult(tmp_path)
    found = "openvino-bf16" in [plan.slot for plan in wanted_engines(result)]
    assert found == ("bf16" in cpu_precisions())
    assert result.skipped.get("openvino-bf16") == (None if found else "this CPU has no bf16 units")
    assert "fp32" in cpu_precisions()
