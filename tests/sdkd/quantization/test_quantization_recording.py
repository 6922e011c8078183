"""A pipeline draws, and what its UNet's layers are given is noted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import tiny_pipeline
from small_exports import variant_pipeline

from sdkd.errors import InputError, ValuesError
from sdkd.models.schedulers import set_scheduler
from sdkd.quantization.calibration import Calibration
from sdkd.quantization.recording import record
from sdkd.quantization.watching import Watch, watched

PROMPTS = ("a red star", "a blue circle")
NAMES = ("low", "high", "low_percentile", "high_percentile", "channels", "out_low", "out_high")


@pytest.fixture(scope="module")
def pipe() -> Any:
    found = tiny_pipeline()
    set_scheduler(found, "ddim")
    return found


def short(pipe: Any, folder: Path, **options: Any) -> Calibration:
    given: dict[str, Any] = {"weights": "w", "images": 2, "steps": 2, "guidance": 4.0, "folder_for_partial": folder}
    return record(pipe, PROMPTS, **(given | options))


@pytest.fixture(scope="module")
def found(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    folder = tmp_path_factory.mktemp("partial")
    made = short(pipe, folder)
    assert list(folder.iterdir()) == []
    return made


def same(one: Calibration, other: Calibration) -> None:
    assert one.content == other.content


def test_it_says_what_was_drawn(found: Calibration, pipe: Any) -> None:
    assert found.weights == "w"
    assert found.about == {
        "prompts": list(PROMPTS), "seeds": [0, 1], "guided": [True, True], "steps": 2, "guidance_scale": 4.0,
        "scheduler": "DDIMScheduler", "height": 64, "width": 64, "timesteps": [501.0, 1.0],
    }  # fmt: skip
    assert found.images.shape == (2, 4, 8, 8)
    generator = torch.Generator().manual_seed(1)
    options: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "latent"}
    made = pipe(PROMPTS[1], generator=generator, **options).images
    np.testing.assert_array_equal(found.images[1], made[0].numpy())


def test_calls_answer_as_the_unet_does(found: Calibration, pipe: Any) -> None:
    assert [call.timestep for call in found.calls] == [501.0, 1.0, 501.0, 1.0]
    for call in found.calls:
        assert call.sample.shape == (2, 4, 8, 8)
        with torch.no_grad():
            answer = pipe.unet(
                torch.from_numpy(call.sample), call.timestep, torch.from_numpy(call.text), return_dict=False
            )[0]
        np.testing.assert_allclose(answer.numpy(), call.prediction, atol=1e-5)


def test_statistics_are_those_of_what_layers_are_given(found: Calibration, pipe: Any) -> None:
    assert set(found.layers) == set(watched(pipe.unet))
    first = found.layers["conv_in"]
    assert first.low.shape == (2,)
    assert first.low[0] == min(call.sample.min() for call in found.calls if call.timestep == 501)
    assert first.high[0] == max(call.sample.max() for call in found.calls if call.timestep == 501)
    assert first.low[0] <= first.low_percentile[0] < 0 < first.high_percentile[0] <= first.high[0]
    np.testing.assert_array_less([np.abs(call.sample).max() - 1e-6 for call in found.calls], first.channels.max())
    assert first.channels.shape == (4,)
    last = found.layers["conv_out"]
    assert last.out_high[0] == max(call.prediction.max() for call in found.calls if call.timestep == 501)


def test_layers_that_are_given_the_same_tensor_make_a_group(found: Calibration) -> None:
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    groups = {name: layer.group for name, layer in found.layers.items()}
    assert {groups[f"{block}.attn1.to_{name}"] for name in "qkv"} == {f"{block}.attn1.to_q"}
    assert groups[f"{block}.attn2.to_q"] == f"{block}.attn2.to_q"
    assert groups["mid_block.attentions.0.transformer_blocks.0.attn2.to_v"] == f"{block}.attn2.to_k"  # the text
    assert groups[f"{block}.ff.net.2"] == f"{block}.ff.net.2"


def test_it_goes_on_where_it_was_ended_with_the_same_bits(pipe: Any, tmp_path: Path, found: Calibration) -> None:
    def end(message: str, fraction: float | None) -> None:
        if message.startswith("calibration: image 2 of 2"):
            raise KeyboardInterrupt("ended")

    with pytest.raises(KeyboardInterrupt, match="ended"):
        short(pipe, tmp_path, progress=end)
    assert len(list(tmp_path.iterdir())) == 1
    said: list[str] = []
    again = short(pipe, tmp_path, progress=lambda message, fraction: said.append(message))
    assert said[0] == "going on after 1 images"
    same(again, found)
    assert list(tmp_path.iterdir()) == []


def test_other_settings_do_not_go_on_and_a_damaged_file_is_made_again(
    pipe: Any, tmp_path: Path, found: Calibration
) -> None:
    def end(message: str, fraction: float | None) -> None:
        if message.startswith("calibration: image 2"):
            raise KeyboardInterrupt("ended")

    with pytest.raises(KeyboardInterrupt, match="ended"):
        short(pipe, tmp_path, progress=end)
    (partial,) = tmp_path.iterdir()
    said: list[str] = []
    short(pipe, tmp_path, weights="other", images=1, progress=lambda message, fraction: said.append(message))
    assert said[0] == "calibration: image 1 of 1, step 1"
    partial.write_bytes(b"damaged")
    same(short(pipe, tmp_path, progress=lambda message, fraction: said.append(message)), found)
    assert said[-5].endswith("is damaged: starting again")


def test_one_image_in_four_is_drawn_without_guidance(pipe: Any, tmp_path: Path) -> None:
    made = short(pipe, tmp_path, images=4, steps=1)
    assert made.about["guided"] == [True, True, True, False]
    assert [len(call.sample) for call in made.calls] == [2, 2, 2, 1]
    assert len(short(pipe, tmp_path, images=1, guidance=1.0, steps=1).calls[0].sample) == 1


@pytest.mark.parametrize(("name", "batch", "channels"), [("inpaint", 2, 9), ("pix2pix", 3, 8), ("embedded", 1, 4)])
def test_pipelines_that_look_at_images_or_embed_guidance(name: str, batch: int, channels: int, tmp_path: Path) -> None:
    made = short(variant_pipeline(name), tmp_path, images=1, height=16, width=32)
    assert made.calls[0].sample.shape[:2] == (batch, channels)
    assert sorted(made.calls[0].extra) == (["timestep_cond"] if name == "embedded" else [])


def test_what_cannot_be_drawn_is_refused(pipe: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no prompts to calibrate with: give at least one"):
        record(pipe, [], weights="w", folder_for_partial=tmp_path)
    with pytest.raises(InputError, match="count 0 is too small"):
        short(pipe, tmp_path, images=0)
    with pytest.raises(InputError, match="height 60 is not a multiple of 64 pixels"):
        short(pipe, tmp_path, height=60)
    with pytest.raises(InputError, match="steps 2000 is too large"):
        short(pipe, tmp_path, steps=2000)


def test_infinity_names_layer_and_step(tmp_path: Path) -> None:
    broken = tiny_pipeline()
    broken.unet.mid_block.resnets[0].conv1.weight.data[0, 0, 1, 1] = torch.inf
    with pytest.raises(ValuesError, match=r"layer 'mid_block.resnets.0.conv1' is given or gives NaN.* in step 1"):
        short(broken, tmp_path)
    assert not any(module._forward_hooks for module in broken.unet.modules())


def test_residuals_of_a_controlnet_are_refused(pipe: Any) -> None:
    text, residual = torch.zeros(1, 77, 32), torch.zeros(1, 32, 1, 1)
    with Watch(pipe.unet), torch.no_grad(), pytest.raises(InputError, match="gives its UNet cross_attention_kwargs"):
        pipe.unet(torch.zeros(1, 4, 8, 8), 1, text, cross_attention_kwargs={"a": residual})
