"""SDXL's pipelines on engines draw what they draw eagerly: every kind of pipeline, schedulers, sizes as conditions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from drawn import agree
from helpers import fixed_weights
from made_once import made_once
from peft import LoraConfig
from small_sdxl import PROJECTED, sdxl_bundle, sdxl_pipeline, sdxl_unet

from engines import load_pipeline, plug
from export import build_engine, export_pipeline
from sdkd.bundle.manifest import Bundle
from sdkd.core.profiles import Range, ShapeRanges
from sdkd.errors import EngineError, ModelError
from sdkd.models.families import new_pipeline

PROMPT = "a red star"
RANGES = ShapeRanges(Range(1, 1, 2), Range(16, 32, 48), Range(16, 32, 48), Range.fixed(77))
SCHEDULERS = sorted(each.__name__ for each in diffusers.EulerDiscreteScheduler().compatibles)  # all that diffusers has
SCHEDULER_OPTIONS: dict[str, dict[str, Any]] = {
    "DPMSolverSDEScheduler": {"noise_sampler_seed": 0},  # else another one each time, whatever the generator
    "EDMEulerScheduler": {"sigma_min": 0.002, "sigma_max": 80.0},  # which Euler's config has as None
    "PNDMScheduler": {"skip_prk_steps": True},  # else more than 3 steps
}


@pytest.fixture(scope="module")
def bundle() -> Path:
    """The bundle with engines of ONNX Runtime; read it, do not change it."""
    return made_once("engines-sdxl", _built)


def _built(path: Path) -> None:
    import shutil

    shutil.copytree(sdxl_bundle().path, path)
    build_engine(path, "onnxruntime", ranges=RANGES)


def picture(seed: int = 0, side: int = 32) -> torch.Tensor:
    return torch.rand((1, 3, side, side), generator=torch.Generator().manual_seed(seed))


def draw(pipe: Any, **options: Any) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": 3, "output_type": "np", "generator": torch.Generator().manual_seed(0)}
    images: np.ndarray = pipe(PROMPT, **(given | options)).images
    return images


def as_kind(pipe: Any, kind: str, **more: Any) -> Any:
    """A pipeline's parts, and more, in one of another class."""
    return new_pipeline(getattr(diffusers, kind), pipe.components | more, {"add_watermarker": False})


CALLS: dict[str, dict[str, Any]] = {
    "StableDiffusionXLPipeline": {
        "height": 32, "width": 48, "original_size": (64, 64), "crops_coords_top_left": (3, 4), "prompt_2": "a ring",
        "negative_prompt": "blue", "clip_skip": 0,
    },
    "StableDiffusionXLImg2ImgPipeline": {"image": picture(), "strength": 0.7, "num_inference_steps": 4},
    "StableDiffusionXLInpaintPipeline": {
        "image": picture(), "mask_image": (picture(1)[:, :1] > 0.5).float(), "height": 32, "width": 32, "strength": 1.0,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", CALLS)
def test_every_pipeline_draws_what_it_draws_eagerly(bundle: Path, kind: str) -> None:
    plugged, eager = as_kind(sdxl_pipeline(), kind), as_kind(sdxl_pipeline(), kind)
    plug(plugged, bundle, "onnxruntime")
    assert type(plugged.text_encoder_2).__name__ == "EngineTextEncoder"
    found, expected = draw(plugged, **CALLS[kind]), draw(eager, **CALLS[kind])
    np.testing.assert_allclose(found, expected, atol=2e-4)
    assert found.std() > 0.01


@pytest.fixture(scope="module")
def scheduled(bundle: Path) -> tuple[Any, Any]:
    """A pipeline on engines and an eager one, whose parts tests take."""
    return load_pipeline(bundle, "onnxruntime"), sdxl_pipeline()


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("kind", CALLS)
def test_any_scheduler_in_every_pipeline(scheduled: tuple[Any, Any], kind: str, scheduler: str) -> None:
    if scheduler == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde")
    found, expected = (draw(_scheduled(pipe, kind, scheduler), **CALLS[kind]) for pipe in scheduled)
    agree(found, expected)


def _scheduled(pipe: Any, kind: str, scheduler: str) -> Any:
    made = as_kind(pipe, kind)
    # The same for both: a saved config no longer says which of its values are its class's defaults.
    config = dict(sdxl_pipeline().scheduler.config) | SCHEDULER_OPTIONS.get(scheduler, {})
    made.scheduler = getattr(diffusers, scheduler).from_config(config)
    return made


def test_embeddings_that_are_passed_in(bundle: Path) -> None:
    pipe, eager = load_pipeline(bundle, "onnxruntime"), sdxl_pipeline()
    assert type(pipe) is diffusers.StableDiffusionXLPipeline
    embeddings = eager.encode_prompt(PROMPT, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    given = dict(zip(names, embeddings, strict=True)) | {"prompt": None, "num_images_per_prompt": 2}

    def images(which: Any) -> np.ndarray:
        return which(
            **given, num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(1)
        ).images

    np.testing.assert_allclose(images(pipe), images(eager), atol=2e-4)


def test_what_a_unet_of_sdxl_needs(bundle: Path) -> None:
    unet = load_pipeline(bundle, "onnxruntime").unet
    call = (torch.zeros(2, 4, 16, 16), 5, torch.zeros(2, 77, 64))
    with pytest.raises(EngineError, match=r"EngineUNet needs text_embeds, time_ids: SDXL's UNet needs added_cond"):
        unet(*call)
    wrong = {"text_embeds": torch.zeros(2, PROJECTED + 1), "time_ids": torch.zeros(2, 6)}
    with pytest.raises(EngineError, match=rf"takes a text_embeds of shape \(2, {PROJECTED}\), a row per latent, not"):
        unet(*call, added_cond_kwargs=wrong)
    right = {"text_embeds": torch.zeros(1, PROJECTED), "time_ids": torch.zeros(1, 6)}
    with pytest.raises(EngineError, match=r"cannot take added_cond_kwargs\['image_embeds'\]: .*IP-Adapter"):
        unet(*call, added_cond_kwargs=right | {"image_embeds": [torch.zeros(1)]})
    assert unet(*call, added_cond_kwargs=right).sample.shape == (2, 4, 16, 16)


def test_families_are_told_apart(bundle: Path) -> None:
    from small_exports import small_bundle, small_pipeline

    with pytest.raises(ModelError, match=r"StableDiffusionPipeline is no pipeline of SDXL, which bundle"):
        plug(small_pipeline(), bundle, "onnxruntime")
    with pytest.raises(ModelError, match=r"StableDiffusionXLPipeline is no pipeline of Stable Diffusion 1.x, 2.x"):
        plug(sdxl_pipeline(), small_bundle(), "onnxruntime")


def lora(pipe: Any) -> dict[str, torch.Tensor]:
    """A LoRA of UNet and both text encoders, as diffusers saves it."""
    generator, found = torch.Generator().manual_seed(3), {}
    for part, ends in (("unet", "to_q"), ("text_encoder", "q_proj"), ("text_encoder_2", "v_proj")):
        for name, layer in getattr(pipe, part).named_modules():
            if name.endswith(ends):
                width, depth = layer.weight.shape
                down, up = (torch.randn(shape, generator=generator) for shape in ((4, depth), (width, 4)))
                root = "" if part == "unet" or name.startswith("text_model.") else "text_model."
                found |= {f"{part}.{root}{name}.lora_A.weight": down, f"{part}.{root}{name}.lora_B.weight": 0.1 * up}
    return found


def test_a_lora_of_unet_and_both_text_encoders_comes_and_goes(bundle: Path) -> None:
    pipe, eager = load_pipeline(bundle, "onnxruntime"), sdxl_pipeline()
    before, state = draw(pipe), lora(eager)
    for each in (pipe, eager):
        each.load_lora_weights(dict(state), adapter_name="style")
        each.set_adapters("style", 0.7)
    assert set(pipe.get_list_adapters()) == {"unet", "text_encoder", "text_encoder_2"}
    expected = draw(eager)
    np.testing.assert_allclose(draw(pipe), expected, atol=2e-4)
    assert not np.allclose(expected, before, atol=1e-2)
    pipe.unload_lora_weights()
    assert np.array_equal(draw(pipe), before)


def test_each_module_takes_adapters_by_its_own_methods(bundle: Path) -> None:
    pipe, eager = load_pipeline(bundle, "onnxruntime"), sdxl_pipeline()
    before = draw(pipe)
    for each in (pipe, eager):
        for part, targets in (("unet", ["to_q"]), ("text_encoder", ["v_proj"]), ("text_encoder_2", ["v_proj"])):
            torch.manual_seed(1)
            config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
            getattr(each, part).add_adapter(config, adapter_name="style")
        each.unet.set_adapters("style", 0.6)
    expected = draw(eager)
    np.testing.assert_allclose(draw(pipe), expected, atol=2e-4)
    pipe.text_encoder_2.disable_adapters()
    assert not np.allclose(draw(pipe), expected, atol=1e-3)
    pipe.unload_lora_weights()
    assert np.array_equal(draw(pipe), before)


def test_low_memory_has_one_stage_open(bundle: Path) -> None:
    pipe = load_pipeline(bundle, "onnxruntime", low_memory=True)
    np.testing.assert_allclose(draw(pipe), draw(sdxl_pipeline()), atol=2e-4)


def controlled() -> Any:
    """The pipeline with a ControlNet."""
    net = diffusers.ControlNetModel.from_unet(sdxl_unet(5), conditioning_channels=3)
    net = diffusers.ControlNetModel.from_config(dict(net.config) | {"conditioning_embedding_out_channels": (8, 8)})
    return as_kind(sdxl_pipeline(), "StableDiffusionXLControlNetPipeline", controlnet=fixed_weights(net, 6))


def adapted() -> Any:
    """The pipeline with a T2I-Adapter."""
    shape = {"channels": [16, 32, 32, 32], "num_res_blocks": 1, "downscale_factor": 4}
    adapter = fixed_weights(diffusers.T2IAdapter(**shape, adapter_type="full_adapter_xl"), 6)
    return as_kind(sdxl_pipeline(), "StableDiffusionXLAdapterPipeline", adapter=adapter)


@pytest.fixture(scope="module")
def conditioned() -> Path:
    """Engines that take the residuals of a ControlNet, of a T2I-Adapter, or of none; read it, do not change it."""

    def make(path: Path) -> None:
        export_pipeline(controlled(), path, t2i_adapter=True, reuse=[sdxl_bundle().path])
        build_engine(path, "onnxruntime", ranges=RANGES)

    return made_once("engines-sdxl-conditioned", make)


def test_a_t2i_adapter_beside_sdxl(conditioned: Path) -> None:
    options = {"image": picture(), "height": 32, "width": 32}
    expected = draw(adapted(), **options)
    np.testing.assert_allclose(draw(plug(adapted(), conditioned, "onnxruntime"), **options), expected, atol=2e-4)
    without = draw(adapted(), **options | {"adapter_conditioning_scale": 0.0})
    assert not np.allclose(expected, without, atol=1e-3)


def test_a_controlnet_beside_sdxl(conditioned: Path) -> None:
    inputs = [spec.name for spec in Bundle.open(conditioned).component("controlnet").contract.inputs]
    assert inputs[3:] == ["controlnet_cond", "conditioning_scale", "text_embeds", "time_ids"]
    pipe, options = controlled(), {"image": picture(), "height": 32, "width": 32, "controlnet_conditioning_scale": 0.5}
    expected = draw(pipe, **options)
    np.testing.assert_allclose(draw(load_pipeline(conditioned, "onnxruntime"), **options), expected, atol=2e-4)
    assert not np.allclose(expected, draw(pipe, **options | {"controlnet_conditioning_scale": 0.0}), atol=1e-3)


def test_without_either_the_unet_is_the_plain_one(conditioned: Path) -> None:
    pipe = plug(sdxl_pipeline(), conditioned, "onnxruntime")
    np.testing.assert_allclose(draw(pipe), draw(sdxl_pipeline()), atol=2e-4)
