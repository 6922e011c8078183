"""What users do to one pipeline, one thing after another, on each target: at every stage it draws what eager draws."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from helpers import fixed_weights
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from small_exports import small_pipeline

from engines import load_pipeline, plug, swap_weights, unplug
from engines.modules.base import EngineModule
from sdkd.errors import EngineError, ModelError

ORDERS = [("onnxruntime", "openvino"), ("openvino", "onnxruntime")]


def draw(pipe: Any) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images: np.ndarray = pipe("a cat", num_inference_steps=2, output_type="np", generator=generator).images
    return images


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random adapters for the attention of the UNet and of the text encoder."""
    folder, pipe, layers = tmp_path_factory.mktemp("lora"), small_pipeline(), {}
    torch.manual_seed(5)
    for part, names in (("unet", ["to_q", "to_v"]), ("text_encoder", ["q_proj", "v_proj"])):
        module = copy.deepcopy(getattr(pipe, part))
        module.add_adapter(LoraConfig(r=4, target_modules=names, lora_alpha=8, init_lora_weights=False))
        layers[f"{part}_lora_layers"] = convert_state_dict_to_diffusers(get_peft_model_state_dict(module))
    StableDiffusionPipeline.save_lora_weights(folder, **layers)
    return folder


class Both:
    """A pipeline on engines and the same one eagerly, to which the same is done."""

    def __init__(self) -> None:
        self.engines, self.eager = small_pipeline(), small_pipeline()
        self.seen = draw(self.eager)

    def check(self, changes: bool = True) -> None:
        """The same image on both, and another one than at the last stage where something was changed."""
        expected = draw(self.eager)
        assert np.abs(draw(self.engines) - expected).max() < 2e-3
        assert (np.abs(expected - self.seen).max() > 0.02) == changes
        self.seen = expected

    def do(self, method: str, *arguments: Any, **options: Any) -> None:
        """Call a method of both pipelines."""
        for pipe in (self.engines, self.eager):
            getattr(pipe, method)(*arguments, **options)


@pytest.mark.parametrize(("first", "second"), ORDERS)
def test_one_pipeline_through_everything(
    engine_bundle: Path, lora: Path, tmp_path: Path, first: str, second: str
) -> None:
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
    both, (first, second) = Both(), ORDERS[0]
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
