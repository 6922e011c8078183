"""From ranges to scales and codes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sdkd.errors import InputError
from sdkd.quantization.calibration import Calibration, LayerStatistics
from sdkd.quantization.scales import layer_scales, to_e4m3, weight_codes
from sdkd.quantization.scheme import LayerScales, Scheme


def statistics(low: float, high: float, channels: list[float], group: str = "a", **changes: Any) -> LayerStatistics:
    given = {"low": low, "high": high, "low_percentile": low, "high_percentile": high, "out_low": low, "out_high": high}
    arrays = {name: np.array([value / 2, value], np.float32) for name, value in (given | changes).items()}
    return LayerStatistics(**arrays, channels=np.array(channels, np.float32), group=group)


def calibration(**layers: LayerStatistics) -> Calibration:
    return Calibration("weights", {}, layers, (), np.zeros((0, 4, 8, 8), np.float32))


LINEAR = np.array([[1.0, -0.5], [0.25, 0.0]], np.float32)
CONVOLUTION = np.ones((3, 2, 3, 3), np.float32)


def test_affine_scales_span_the_largest_range_of_all_steps_and_hold_zero() -> None:
    seen = calibration(a=statistics(-1, 4.1, [4, 1]), b=statistics(2, 5.1, [5, 5], "b"))
    found = layer_scales(seen, Scheme("u8"), {"a": LINEAR, "b": LINEAR})
    assert found["a"].scale == pytest.approx(5.1 / 255)
    assert found["a"].zero_point == 50
    assert found["b"].scale == pytest.approx(5.1 / 255)
    assert found["b"].zero_point == 0
    assert found["a"].smooth is None
    assert found["a"].out_scale is None


@pytest.mark.parametrize(("clip", "high"), [(0.0, 9.0), (0.5, 7.0), (1.0, 5.0)])
def test_ranges_go_from_extremes_to_percentiles(clip: float, high: float) -> None:
    seen = calibration(a=statistics(0, 9, [9, 1], high_percentile=5))
    found = layer_scales(seen, Scheme("u8"), {"a": LINEAR}, clip=clip)["a"]
    assert found.scale == pytest.approx(high / 255)


@pytest.mark.parametrize(("activations", "limit"), [("s8", 127), ("e4m3", 448)])
def test_symmetric_scales_take_the_larger_side(activations: Any, limit: int) -> None:
    found = layer_scales(calibration(a=statistics(-6, 4, [6, 4])), Scheme(activations), {"a": LINEAR})["a"]
    assert found.scale == pytest.approx(6 / limit)
    assert found.zero_point == 0


def test_only_convolutions_round_what_they_give_and_none_is_smoothed() -> None:
    seen = calibration(a=statistics(-1, 1, [1, 1], out_low=-51, out_high=204), b=statistics(-1, 1, [1, 1], "b"))
    found = layer_scales(seen, Scheme("u8", outputs=True, smooth=0.5), {"a": CONVOLUTION, "b": LINEAR})
    assert found["a"].out_scale == pytest.approx(1.0)
    assert found["a"].out_zero_point == 51
    assert found["a"].smooth is None
    assert found["b"].out_scale is None
    assert found["b"].smooth is not None


def test_layers_that_take_the_same_tensor_share_scale_and_smoothing() -> None:
    seen = calibration(q=statistics(-4, 4, [4, 1], "q"), k=statistics(-4, 4, [4, 1], "q"))
    found = layer_scales(seen, Scheme("s8", smooth=0.5), {"q": LINEAR, "k": 4 * LINEAR})
    assert found["q"].smooth is found["k"].smooth
    np.testing.assert_allclose(found["q"].smooth, [(4 / 4) ** 0.5, (1 / 2) ** 0.5])  # weights 4 and 2 at most
    assert found["q"].scale == pytest.approx(4 / 127)


def test_dead_channels_are_not_smoothed() -> None:
    weight = np.array([[2.0, 0.0, 3.0]], np.float32)
    seen = calibration(a=statistics(0, 8, [8, 1, 0]))
    found = layer_scales(seen, Scheme("u8", smooth=0.5), {"a": weight})["a"]
    np.testing.assert_allclose(found.smooth, [2, 1, 1])
    assert found.scale == pytest.approx(4 / 255)


def test_layers_that_stay_float_are_left_out() -> None:
    seen = calibration(a=statistics(-1, 1, [1, 1]))
    weights = {"conv_in": CONVOLUTION, "time_embedding.linear_1": LINEAR, "a": LINEAR}
    assert list(layer_scales(seen, Scheme("u8"), weights)) == ["a"]


def test_a_calibration_of_another_model_is_refused() -> None:
    with pytest.raises(InputError, match="layer 'b' has 2 input channels, and the calibration did not see it"):
        layer_scales(calibration(), Scheme("u8"), {"b": LINEAR})
    with pytest.raises(InputError, match="layer 'a' has 2 input channels, and the calibration saw 1 input channels"):
        layer_scales(calibration(a=statistics(0, 1, [1])), Scheme("u8"), {"a": LINEAR})


@pytest.mark.parametrize(("bits", "limit", "second"), [(8, 127, -38), (7, 63, -19)])
def test_codes_of_a_weight(bits: int, limit: int, second: int) -> None:
    weight = np.array([[1.0, -0.3], [0.25, 0.0]], np.float32)
    codes, scale = weight_codes(weight, LayerScales(1.0), Scheme("u8", weight_bits=bits))
    np.testing.assert_allclose(scale, [1 / limit, 0.25 / limit])
    assert codes.tolist() == [[limit, second], [limit, 0]]
    assert codes.dtype == scale.dtype == np.float32


def test_codes_of_a_smoothed_weight_and_of_zeros() -> None:
    codes, scale = weight_codes(LINEAR, LayerScales(1.0, smooth=np.array([1.0, 2.0], np.float32)), Scheme("s8"))
    assert codes.tolist() == [[127, -127], [127, 0]]
    codes, scale = weight_codes(np.zeros((2, 3, 1, 1), np.float32), LayerScales(1.0), Scheme("s8"))
    assert not codes.any()
    assert (scale > 0).all()


def test_e4m3_rounds_to_even_and_clips() -> None:
    assert to_e4m3(np.array([17, 19, 1000, -460, 2**-10, 0.1], np.float32)).tolist() == [
        16, 20, 448, -448, 0, 0.1015625,
    ]  # fmt: skip
    codes, scale = weight_codes(LINEAR, LayerScales(1.0), Scheme("e4m3"))
    np.testing.assert_allclose(scale, [1 / 448, 0.25 / 448])
    assert codes.tolist() == [[448, -224], [448, 0]]
