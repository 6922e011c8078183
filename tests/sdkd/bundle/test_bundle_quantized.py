"""What an engine's record says of its rounding, read back, and what it may not say."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from quantized_records import FLAGS, SCHEME

from sdkd.bundle.manifest_checks import strange_values
from sdkd.bundle.quantized import Quantized, StepError, flags_problem


def changed(*path: str, to: Any) -> dict[str, Any]:
    flags = copy.deepcopy(FLAGS)
    inner = flags
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = to
    return flags


def test_a_record_is_read_back() -> None:
    found = Quantized.of(FLAGS)
    assert found is not None
    assert (found.asked.scheme, found.asked.calibration) == (SCHEME, "ab" * 32)
    assert found.quality.errors == (StepError(981.0, 0.034), StepError(21.0, 0.011))
    assert (found.quality.worst, found.quality.kept) == (0.034, True)
    assert list(found.reasons.values()) == [1, 2]
    assert list(found.reasons)[1] == "rounded alone it changes the prediction"
    assert [name for name, _ in found.ranking][:1] == ["mid_block.resnets.0.conv1"]
    assert found.median_seconds == {"int8": 0.1, "fp32": 0.15}
    assert found.speed is not None
    assert found.speed.times == 1.42


def test_an_engine_in_float_has_none() -> None:
    assert Quantized.of({"config": {}}) is None
    assert flags_problem({"quality": "what other engines say is left alone"}) is None


def test_a_simulated_error_stands_in_for_the_engines_own_and_a_missed_limit_is_seen() -> None:
    found = Quantized.of(changed("quality", "engine", to=None))
    assert found is not None
    assert found.quality.worst == 0.031
    forced = Quantized.of(changed("quality", "limit", to=0.03))
    assert forced is not None
    assert not forced.quality.kept
    bare = Quantized.of({"quantization": FLAGS["quantization"], "speed": None})
    assert bare is not None
    assert (bare.light, bare.rounded_layers, found.light, found.rounded_layers) == (True, None, False, 21)
    assert (bare.quality.worst, bare.quality.kept, bare.speed, bare.reasons) == (None, False, None, {})


def test_later_keys_are_left_alone() -> None:
    assert flags_problem(FLAGS) is None
    assert flags_problem(changed("quality", "later", to=1)) is None


@pytest.mark.parametrize(
    ("path", "to", "found"),
    [
        (("quantization",), [], "flags.quantization is a list, not an object"),
        (("quantization", "scheme"), "u8", "flags.quantization.scheme is 'u8', not an object"),
        (("rounded_layers",), "all", "flags.rounded_layers is 'all', not a whole number"),
        (("float_layers",), {"conv_in": 1}, "flags.float_layers.conv_in is 1, not text"),
        (("quality", "engine"), 1, "flags.quality.engine is 1, not a list"),
        (("quality", "simulated"), [{"timestep": "x", "relative": 0.1}], "simulated[0].timestep is 'x', not a finite"),
        (("quality", "limit"), float("nan"), "flags.quality.limit is nan, not a finite number"),
        (("sensitivity",), {"conv_in": None}, "flags.sensitivity.conv_in is None, not a finite number"),
        (("speed", "times"), "fast", "flags.speed.times is 'fast', not a finite number"),
    ],
)
def test_what_no_build_wrote_is_found(path: tuple[str, ...], to: Any, found: str) -> None:
    said = flags_problem(changed(*path, to=to))
    assert said is not None
    assert found in said
    row = {"precision": "int8", "files": [{}], "flags": changed(*path, to=to)}
    wrong = next(strange_values({"components": {}, "engines": {"openvino-int8/unet": row}}))
    assert wrong.startswith("engines.openvino-int8/unet.flags.")
