"""The file that a calibration is kept in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from sdkd.core.files import sha256
from sdkd.errors import ModelError
from sdkd.quantization.calibration import Calibration, Call, LayerStatistics


def small() -> Calibration:
    steps = {
        name: np.arange(3, dtype=np.float32) + number
        for number, name in enumerate(("low", "high", "low_percentile", "high_percentile", "out_low", "out_high"))
    }
    layer = LayerStatistics(**steps, channels=np.array([1, 2], np.float32), group="a")
    sample = np.full((1, 4, 2, 2), 0.5, np.float32)
    call = Call(sample, 981.25, np.ones((1, 3, 5), np.float32), -sample, {"timestep_cond": np.ones((1, 7), np.float32)})
    about = {"prompts": ["ein rötlicher Kreis"], "steps": 3}
    return Calibration("digest", about, {"b": layer, "a": layer}, (call,), np.zeros((2, 4, 2, 2), np.float32))


def test_a_calibration_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "calibration" / "unet.safetensors"
    was = small()
    was.save(path)
    found = Calibration.load(path)
    assert (found.weights, found.about) == (was.weights, was.about)
    assert list(found.layers) == ["b", "a"]
    np.testing.assert_array_equal(found.layers["a"].out_low, [4, 5, 6])
    np.testing.assert_array_equal(found.layers["a"].channels, [1, 2])
    assert found.layers["b"].group == "a"
    assert found.calls[0].timestep == 981.25
    np.testing.assert_array_equal(found.calls[0].prediction, -found.calls[0].sample)
    assert found.calls[0].extra["timestep_cond"].shape == (1, 7)
    assert found.images.shape == (2, 4, 2, 2)
    assert found.digest == was.digest == sha256(path)


def test_what_is_no_calibration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nothing.*cannot be read.*calibrate again"):
        Calibration.load(tmp_path / "nothing")
    path = tmp_path / "foreign"
    save_file({"a": np.zeros(3, np.float32)}, path)
    with pytest.raises(ModelError, match="foreign' is no calibration: calibrate again"):
        Calibration.load(path)


def test_a_damaged_calibration_is_refused(tmp_path: Path) -> None:
    path, good = tmp_path / "file", small().content
    path.write_bytes(good[:-8])
    with pytest.raises(ModelError, match=r"calibration .*is cut off"):
        Calibration.load(path)
    path.write_bytes(good.replace(b"channels/b", b"channels/c"))
    with pytest.raises(ModelError, match=r"lacks 'channels/b': calibrate again"):
        Calibration.load(path)
    path.write_bytes(good.replace(rb"\"schema\": 1", rb"\"schema\": 9"))
    with pytest.raises(ModelError, match="has schema 9, 1 is read: calibrate again"):
        Calibration.load(path)
    path.write_bytes(good.replace(rb"\"timestep\"", rb"\"timesteq\""))
    with pytest.raises(ModelError, match=r"is damaged \(calls\[0\].timestep is missing\); calibrate again"):
        Calibration.load(path)
    path.write_bytes(good[:-4] + np.array([np.nan], np.float32).tobytes())
    with pytest.raises(ModelError, match="is not finite; calibrate again"):
        Calibration.load(path)
