"""Which layers stay float so that the prediction is near the float one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers import CONTEXT, tiny_unet

from sdkd.errors import InputError
from sdkd.quantization.calibration import Call
from sdkd.quantization.fake import fake_quantized
from sdkd.quantization.scheme import LayerScales, Scheme
from sdkd.quantization.sensitivity import _fewest, choose, prediction_error, sensitivity

SCHEME = Scheme("s8")
FINE, COARSE, WORST = "conv_out", "down_blocks.0.resnets.0.conv1", "up_blocks.3.resnets.2.conv2"
SCALES = {FINE: LayerScales(0.05), COARSE: LayerScales(0.25), WORST: LayerScales(4.0)}


@pytest.fixture(scope="module")
def unet() -> Any:
    return tiny_unet()


@pytest.fixture(scope="module")
def calls(unet: Any) -> list[Call]:
    generator, made = torch.Generator().manual_seed(0), []
    for timestep, rows in ((1.0, 2), (981.0, 2), (501.0, 1)):
        sample = torch.randn((rows, 4, 8, 8), generator=generator)
        text = torch.randn((rows, 7, CONTEXT), generator=generator)
        with torch.no_grad():
            prediction = unet(sample, timestep, text).sample
        made.append(Call(sample.numpy(), timestep, text.numpy(), prediction.numpy()))
    return made


def test_the_float_unet_has_no_error(unet: Any, calls: list[Call]) -> None:
    found = prediction_error(unet, calls)
    assert [timestep for timestep, _ in found] == [1.0, 981.0, 501.0]
    assert max(relative for _, relative in found) < 1e-6


def test_the_error_is_relative_to_the_prediction(unet: Any, calls: list[Call]) -> None:
    doubled = [Call(call.sample, call.timestep, call.text, 2 * call.prediction) for call in calls]
    assert [relative for _, relative in prediction_error(unet, doubled)] == pytest.approx([0.5] * 3)


def test_each_layer_counts_as_if_it_were_rounded_alone(unet: Any, calls: list[Call]) -> None:
    said: list[str] = []
    with torch.inference_mode():
        found = sensitivity(unet, calls, SCALES, SCHEME, lambda message, fraction: said.append(message))
    assert list(found) == list(SCALES)
    assert 0 < found[FINE] < found[COARSE] < found[WORST]
    assert said[-1] == "sensitivity of all layers"
    assert not any(module._forward_hooks for module in unet.modules())
    single = [call for call in calls if len(call.sample) == 1]
    with fake_quantized(unet, SCALES, SCHEME, [COARSE]):
        ((_, relative),) = prediction_error(unet, single)
    assert sensitivity(unet, single, SCALES, SCHEME)[COARSE] == pytest.approx(relative**2, rel=0.7)


def test_large_latents_are_cropped(unet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdkd.quantization.sensitivity._SUMS", 1)
    sample = np.ones((2, 4, 24, 48), np.float32)
    sample[1, :, 4:20, 16:32] = np.random.default_rng(0).standard_normal((4, 16, 16))
    text = np.zeros((2, 7, CONTEXT), np.float32)
    large = Call(sample, 5.0, text, sample)
    small = Call(sample[1:, :, 4:20, 16:32], 5.0, text[1:], sample[1:, :, 4:20, 16:32])
    found, wanted = (sensitivity(unet, [call], {COARSE: SCALES[COARSE]}, SCHEME) for call in (large, small))
    assert found == wanted


def test_nothing_stays_float_where_all_may_be_rounded(unet: Any, calls: list[Call]) -> None:
    found = choose(unet, calls, SCALES, SCHEME, 10.0, 3)
    assert found.holds
    assert found.float_layers == {}
    assert set(found.sensitivity) == set(SCALES)
    assert found.before == found.after


def test_as_few_layers_as_needed_stay_float(unet: Any, calls: list[Call]) -> None:
    errors, calls = [], calls[1:]
    for rounded in ([FINE, COARSE, WORST], [FINE, COARSE], [FINE]):
        with fake_quantized(unet, SCALES, SCHEME, rounded):
            errors.append(max(relative for _, relative in prediction_error(unet, calls)))
    assert errors == sorted(errors, reverse=True)
    found = choose(unet, calls, SCALES, SCHEME, (errors[0] + errors[1]) / 2, 3)
    assert (list(found.float_layers), found.holds) == ([WORST], True)
    assert found.float_layers[WORST].startswith("rounded alone it changes the prediction by about ")
    assert max(relative for _, relative in found.after) == pytest.approx(errors[1])
    found = choose(unet, calls, SCALES, SCHEME, (errors[1] + errors[2]) / 2, 3)
    assert (list(found.float_layers), found.holds) == ([WORST, COARSE], True)
    found = choose(unet, calls, SCALES, SCHEME, errors[2] / 2, 2)
    assert (list(found.float_layers), found.holds) == ([WORST, COARSE], False)
    assert max(relative for _, relative in found.before) == pytest.approx(errors[0])
    assert not choose(unet, calls, SCALES, SCHEME, errors[2] / 2, 0).holds


@pytest.mark.parametrize("needed", range(1, 20))
def test_the_least_count_is_found_in_few_tries(needed: int) -> None:
    asked: list[int] = []

    def holds(count: int) -> bool:
        asked.append(count)
        return count >= needed

    assert _fewest(holds, 13) == min(needed, 13)
    assert len(set(asked)) <= 8
    assert max(asked) <= 13


def test_no_calls_are_refused(unet: Any) -> None:
    with pytest.raises(InputError, match="holds no calls to measure the error with: calibrate again"):
        choose(unet, [], SCALES, SCHEME, 0.1, 1)
