"""What users do to one pipeline, one thing after another, on each target: at every stage it draws what eager draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from drawn import agree, draw, save_lora
from helpers import fixed_weights
from small_exports import small_pipeline

from engines import load_pipeline, plug, swap_weights, unplug
from engines.modules.base import EngineModule
from sdkd.errors import EngineError, ModelError


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random adapters for the attention of the UNet and of the text encoder."""
    return save_lora(small_pipeline(), tmp_path_factory.mktemp("lora"), 5, text=True)


class Both:
    """A pipeline on engines and the same one eagerly, to which the same is done."""

    def __init__(self) -> None:
        self.engines, self.eager = small_pipeline(), small_pipeline()
        self.seen = draw(self.eager)

    def check(self, changes: bool = True) -> None:
        """The same image on both, and another one than at the last stage where something was changed."""
        expected = draw(self.eager)
        agree(draw(self.engines), expected)
        assert (np.abs(expected - self.seen).max() > 0.02) == changes
        self.seen = expected

    def do(self, method: str, *arguments: Any, **options: Any) -> None:
        """Call a method of both pipelines."""
        for pipe in (self.engines, self.eager):
            getattr(pipe, method)(*arguments, **options)


def test_one_pipeline_through_everything(engine_bundle: Path, lora: Path, tmp_path: Path) -> None:
    first, second = "onnxruntime", "openvino"  # the other way in test_engines_carried
    both, other = Both(), fixed_weights(small_pipeline().unet, seed=9).state_dict()
    pipe = plug(both.engines, engine_bundle, first, keep_eager=True)
    both.check(changes=False)
    plug(pipe, engine_bundle, second)
    both.check(changes=False)
    both.do("load_lora_weights", lora, adapter_name="style")
    both.check()
    swap_weights(pipe, other)
    base = {name.replace(".base_layer.", "."): tensor for name, tensor in both.eager.unet.named_parameters()}
    for name, tensor in other.items():
        base[name].data.copy_(tensor)
    both.check()
    both.do("set_adapters", "style", 0.3)
    both.check()
    with pytest.raises(EngineError, match=r"cannot be saved with adapters on it.*unload_lora_weights"):
        pipe.save_pretrained(tmp_path / "saved")
    both.do("unload_lora_weights")
    both.check()
    plug(pipe, engine_bundle, first, components="unet")  # two targets in one pipeline
    assert [getattr(pipe, part).session.slot for part in ("unet", "text_encoder")] == [first, second]
    both.check(changes=False)
    copied = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    assert copied.unet is pipe.unet
    pipe.save_pretrained(tmp_path / "saved")
    unplug(pipe)
    assert not any(isinstance(module, EngineModule) for module in pipe.components.values())
    both.check(changes=False)
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "saved", requires_safety_checker=False)
    assert np.array_equal(draw(again), draw(pipe))
    with pytest.raises(ModelError, match=r"the unet of this pipeline .* has other weights than unet of bundle"):
        plug(again, engine_bundle, first)
    plug(again, engine_bundle, first, components=["vae", "text_encoder"])
    both.engines = again
    both.check(changes=False)


def test_a_part_put_in_by_hand_counts(engine_bundle: Path) -> None:
    both, first, second = Both(), "onnxruntime", "openvino"
    pipe = plug(both.engines, engine_bundle, first)
    for one in (pipe, both.eager):
        one.unet = fixed_weights(small_pipeline().unet, seed=9)
    both.check()
    with pytest.raises(ModelError, match=r"unet of this pipeline \(UNet2DConditionModel\) has other weights"):
        plug(pipe, engine_bundle, second)
    both.check(changes=False)
    for one in (pipe, both.eager):
        one.unet = small_pipeline().unet
    plug(pipe, engine_bundle, second)
    both.check()
    loaded = load_pipeline(engine_bundle, first)
    plug(loaded, engine_bundle, second)  # from one engine to the next, without an eager module
    both.engines = loaded
    both.check(changes=False)
