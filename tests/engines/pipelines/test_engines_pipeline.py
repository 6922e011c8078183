"""Engines inside diffusers pipelines: the same images as eager, and clear refusals."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from diffusers.schedulers import KarrasDiffusionSchedulers
from engine_bundles import edit_engine, variant_engines
from helpers import tiny_unet, tiny_vae
from PIL import Image
from small_bundles import small_pipeline
from small_exports import variant_pipeline

from engines.modules.components import EngineTextEncoder, EngineUNet
from engines.modules.vae import EngineVAE
from engines.pipelines.pipeline import load_pipeline, plug, unplug
from engines.pipelines.slots import best_slot
from sdkd.bundle.manifest import Bundle
from sdkd.errors import (
    BundleError,
    EngineError,
    InputError,
    MissingExtraError,
    ModelError,
    RangeError,
    StaleEngineError,
)
from sdkd.targets.registry import built_environment

TARGETS = ("onnxruntime", "openvino")
PROMPT = "a red star"
MIN_PSNR = 60.0  # dB; bf16 in place of fp32 is about 45 here
# What StableDiffusionPipeline names, whatever diffusers adds there, and others that it runs.
SCHEDULERS = sorted(
    {scheduler.name for scheduler in KarrasDiffusionSchedulers}
    | {"DDIMParallelScheduler", "DDPMParallelScheduler", "EDMDPMSolverMultistepScheduler", "IPNDMScheduler"}
    | {"LCMScheduler", "SASolverScheduler", "TCDScheduler"}
)
SDE = "DPMSolverSDEScheduler"
SCHEDULER_OPTIONS: dict[str, dict[str, Any]] = {"PNDMScheduler": {"skip_prk_steps": True}}  # else more than 3 steps


def psnr(a: Any, b: Any) -> float:
    """Peak signal-to-noise ratio of two arrays in 0..1, dB."""
    error = float(np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2))
    return float("inf") if error == 0 else -10 * float(np.log10(error))


def draw(pipe: Any, prompt: Any = PROMPT, steps: int = 3, seed: int = 7, **options: Any) -> np.ndarray:
    settings = {"num_inference_steps": steps, "output_type": "np", "generator": torch.Generator().manual_seed(seed)}
    images: np.ndarray = pipe(prompt, **(settings | options)).images
    return images


@pytest.fixture(scope="module", params=TARGETS)
def engines(request: pytest.FixtureRequest, engine_bundle: Path) -> StableDiffusionPipeline:
    """A plugged pipeline; tests must leave it as it is."""
    return plug(small_pipeline(), engine_bundle, request.param)


@pytest.fixture(scope="module")
def plain(engine_bundle: Path) -> StableDiffusionPipeline:
    """The eager pipeline to compare with."""
    return small_pipeline()


# Images equal eager's


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guidance_scale": 1.0},
        {"guidance_scale": 2.5, "guidance_rescale": 0.7},
        {"negative_prompt": "blue"},
        {"num_images_per_prompt": 3},
        {"height": 64, "width": 40},
        {"prompt": ["a red star", "a blue disc"], "negative_prompt": ["green", "x"], "guidance_scale": 4.0},
        {"output_type": "latent"},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_images_equal_eager(
    engines: StableDiffusionPipeline, plain: StableDiffusionPipeline, options: dict[str, Any]
) -> None:
    expected, found = draw(plain, **options), draw(engines, **options)
    assert found.shape == expected.shape
    assert psnr(found, expected) > MIN_PSNR


@pytest.fixture(scope="module")
def scheduled(engine_bundle: Path) -> tuple[StableDiffusionPipeline, StableDiffusionPipeline]:
    """An eager and a plugged pipeline, whose schedulers tests exchange."""
    return small_pipeline(), plug(small_pipeline(), engine_bundle, "onnxruntime")


@pytest.mark.parametrize("name", SCHEDULERS)
def test_any_scheduler(scheduled: tuple[StableDiffusionPipeline, StableDiffusionPipeline], name: str) -> None:
    if name == SDE:
        pytest.importorskip("torchsde", reason="diffusers' SDE scheduler needs torchsde")
    for pipe in scheduled:
        config = dict(small_pipeline().scheduler.config) | SCHEDULER_OPTIONS.get(name, {})
        pipe.scheduler = getattr(diffusers, name).from_config(config)
    eager, engine = scheduled
    assert psnr(draw(engine), draw(eager)) > MIN_PSNR


def test_image_to_image(engines: StableDiffusionPipeline, plain: StableDiffusionPipeline) -> None:
    image = Image.effect_mandelbrot((32, 32), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    results = []
    for pipe in (engines, plain):
        other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
        other.set_progress_bar_config(disable=True)
        results.append(draw(other, image=image, strength=0.7, steps=5))
    assert psnr(*results) > MIN_PSNR


def test_inpainting_with_four_channels(engines: StableDiffusionPipeline, plain: StableDiffusionPipeline) -> None:
    image = Image.effect_mandelbrot((32, 32), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (8, 8, 24, 24))
    results = []
    for pipe in (engines, plain):
        other = StableDiffusionInpaintPipeline(**pipe.components, requires_safety_checker=False)
        other.set_progress_bar_config(disable=True)
        results.append(draw(other, image=image, mask_image=mask, strength=0.9, steps=4, height=32, width=32))
    assert psnr(*results) > MIN_PSNR


@pytest.mark.parametrize(
    "kind", [AutoPipelineForImage2Image, AutoPipelineForInpainting, StableDiffusionImg2ImgPipeline]
)
def test_pipelines_made_from_a_plugged_one_share_its_engines(engines: StableDiffusionPipeline, kind: Any) -> None:
    other = kind.from_pipe(engines)
    assert other.unet is engines.unet
    assert other.vae is engines.vae
    assert other.vae_scale_factor == engines.vae_scale_factor == 2


def test_prompt_embeddings_passed_in(engines: StableDiffusionPipeline, plain: StableDiffusionPipeline) -> None:
    embeddings = {}
    for pipe in (engines, plain):
        positive, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True, "blue")
        embeddings[pipe] = {"prompt_embeds": positive, "negative_prompt_embeds": negative}
    assert psnr(*(draw(pipe, None, **embeddings[pipe]) for pipe in (engines, plain))) > MIN_PSNR
    assert psnr(draw(engines, None, **embeddings[engines]), draw(engines, negative_prompt="blue")) > 100


def test_callbacks_see_and_change_the_latents(engines: StableDiffusionPipeline, plain: StableDiffusionPipeline) -> None:
    seen: list[int] = []

    def halve(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        return {"latents": tensors["latents"] * 0.5}

    results = [draw(pipe, callback_on_step_end=halve) for pipe in (engines, plain)]
    assert seen == [0, 1, 2] * 2
    assert psnr(*results) > MIN_PSNR


def test_interruption_stops_early(engines: StableDiffusionPipeline) -> None:
    seen: list[int] = []

    def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        pipe._interrupt = True
        return tensors

    draw(engines, callback_on_step_end=stop)
    assert seen == [0]


def test_seeds_are_deterministic_and_matter(engines: StableDiffusionPipeline) -> None:
    assert np.array_equal(draw(engines), draw(engines))
    assert psnr(draw(engines), draw(engines, seed=8)) < 40
    pair = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    both = draw(engines, [PROMPT, PROMPT], generator=pair)
    assert psnr(both[0], draw(engines)[0]) > MIN_PSNR


def test_a_pipeline_in_another_dtype_stays_in_it(engine_bundle: Path) -> None:
    pipe = load_pipeline(engine_bundle, "onnxruntime", torch_dtype=torch.bfloat16)
    assert pipe.dtype == torch.bfloat16
    latents = pipe(PROMPT, num_inference_steps=1, output_type="latent").images
    assert latents.dtype == torch.bfloat16
    pipe.to(torch.float32)
    assert draw(pipe).dtype == np.float32


# Plug and unplug


def test_plug_replaces_and_unplug_restores(engine_bundle: Path, eager: StableDiffusionPipeline) -> None:
    before = dict(eager.components)
    assert plug(eager, engine_bundle, "onnxruntime", keep_eager=True) is eager
    assert isinstance(eager.unet, EngineUNet)
    assert isinstance(eager.vae, EngineVAE)
    assert isinstance(eager.text_encoder, EngineTextEncoder)
    assert set(eager.components) == set(before)
    assert (eager.device, eager.dtype) == (torch.device("cpu"), torch.float32)
    plug(eager, Bundle.open(engine_bundle), "openvino", keep_eager=True)
    assert eager.unet.session.slot == "openvino"
    assert unplug(eager) is eager
    assert eager.components == before
    with pytest.raises(EngineError, match=r"this StableDiffusionPipeline runs on no engine: nothing to unplug"):
        unplug(eager)


def test_unplug_reaches_pipelines_made_from_a_plugged_one(engine_bundle: Path, eager: StableDiffusionPipeline) -> None:
    unet = eager.unet
    plug(eager, engine_bundle, "onnxruntime", keep_eager=True)
    other = StableDiffusionImg2ImgPipeline(**eager.components, requires_safety_checker=False)
    unplug(other)
    assert other.unet is unet
    assert isinstance(eager.unet, EngineUNet)
    assert draw(eager).shape == (1, 32, 32, 3)


def test_components_can_be_chosen(engine_bundle: Path, eager: StableDiffusionPipeline) -> None:
    plug(eager, engine_bundle, "onnxruntime", components=("unet",))
    assert isinstance(eager.unet, EngineUNet)
    assert isinstance(eager.vae, diffusers.AutoencoderKL)
    assert psnr(draw(eager), draw(small_pipeline())) > MIN_PSNR
    with pytest.raises(InputError, match=r"component 'vae_decoder' is unknown: choose from unet, vae, text_encoder"):
        plug(eager, engine_bundle, "onnxruntime", components=("vae_decoder",))


def test_nothing_changes_when_one_engine_does_not_open(bundle_copy: Path, eager: StableDiffusionPipeline) -> None:
    edit_engine(bundle_copy, "onnxruntime", "text_encoder", onnx_sha256="0")
    before = dict(eager.components)
    with pytest.raises(StaleEngineError, match=r"text_encoder was exported again after the engine was built"):
        plug(eager, bundle_copy, "onnxruntime")
    assert eager.components == before


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("unet", "cross_attention_dim", 768),
        ("unet", "in_channels", 9),
        ("unet", "freq_shift", 1),
        ("vae", "scaling_factor", 0.5),
        ("text_encoder", "vocab_size", 49408),
        ("text_encoder", "num_attention_heads", 4),
    ],
)
def test_disagreement_names_both_values(bundle_copy: Path, part: str, key: str, value: Any) -> None:
    folder = bundle_copy / ("vae_decoder" if part == "vae" else part)
    eager = small_pipeline()
    theirs = getattr(getattr(eager, part).config, key)
    opened = Bundle.open(bundle_copy)
    config = (folder / "config.json").read_text().replace(f'"{key}": {theirs}', f'"{key}": {value}')
    (folder / "config.json").write_text(config)
    opened.with_rest().save()
    with pytest.raises(ModelError, match=rf"{part} {key} is {value} in the bundle and {theirs} in the pipeline"):
        plug(eager, bundle_copy, "onnxruntime")


def test_other_latent_sizes_and_predictions_are_disagreements(
    engine_bundle: Path, eager: StableDiffusionPipeline
) -> None:
    other = small_pipeline()
    other.vae = tiny_vae()
    with pytest.raises(ModelError, match=r"vae pixels per latent is 2 in the bundle and 8 in the pipeline"):
        plug(other, engine_bundle, "onnxruntime")
    eager.scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction")
    with pytest.raises(ModelError, match=r"scheduler prediction_type is epsilon in the bundle and v_prediction in the"):
        plug(eager, engine_bundle, "onnxruntime")


def test_only_stable_diffusion_can_be_plugged(engine_bundle: Path) -> None:
    ddpm = diffusers.DDPMPipeline(unet=tiny_unet(), scheduler=diffusers.DDPMScheduler())
    with pytest.raises(ModelError, match=r"DDPMPipeline is no Stable Diffusion 1.x/2.x pipeline"):
        plug(ddpm, engine_bundle)


# Sizes and refused features, through the pipeline


def test_sizes_outside_the_range(engines: StableDiffusionPipeline) -> None:
    with pytest.raises(
        RangeError, match=r"height 96 px, width 32 px.* built for batch 1\.\.2.*--size 32\.\.96x32\.\.64"
    ):
        draw(engines, height=96, width=32)


def test_clip_skip_and_lora_scale_are_refused(engines: StableDiffusionPipeline) -> None:
    with pytest.raises(EngineError, match=r"for clip_skip export with --hidden-states"):
        draw(engines, clip_skip=1)
    with pytest.raises(EngineError, match=r"cannot take cross_attention_kwargs"):
        draw(engines, cross_attention_kwargs={"something": 1})


@pytest.mark.parametrize("method", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading_is_refused_and_the_pipeline_still_draws(
    engine_bundle: Path, plain: StableDiffusionPipeline, method: str
) -> None:
    pipe = plug(small_pipeline(), engine_bundle, "onnxruntime")
    with pytest.raises(EngineError, match=r"cannot be offloaded: its weights live inside the engine.*low_memory=True"):
        getattr(pipe, method)(device="cpu")
    assert psnr(draw(pipe), draw(plain)) > MIN_PSNR


def test_inpainting_with_nine_channels() -> None:
    eager = variant_pipeline("inpaint")
    pipe = load_pipeline(variant_engines("inpaint", ["onnxruntime"]), "onnxruntime")
    assert type(pipe) is StableDiffusionInpaintPipeline
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (8, 8, 24, 24))
    image = Image.effect_mandelbrot((32, 32), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    call = {"image": image, "mask_image": mask, "strength": 1.0, "height": 32, "width": 32}
    assert psnr(draw(pipe, **call), draw(eager, **call)) > MIN_PSNR


# Loading from a bundle alone


def test_load_pipeline_needs_no_weights(engine_bundle: Path, plain: StableDiffusionPipeline) -> None:
    pipe = load_pipeline(engine_bundle, "onnxruntime")
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe) is StableDiffusionPipeline
    assert pipe.safety_checker is None
    assert type(pipe.scheduler) is diffusers.DDIMScheduler
    assert psnr(draw(pipe), draw(plain)) > MIN_PSNR
    with pytest.raises(
        EngineError, match=r"has no eager modules, since it was loaded from a bundle or .*: nothing to unplug"
    ):
        unplug(pipe)


def test_the_best_slot_is_chosen(engine_bundle: Path) -> None:
    assert best_slot(Bundle.open(engine_bundle)) == "openvino"
    assert load_pipeline(engine_bundle).unet.session.slot == "openvino"


def test_a_stale_slot_is_passed_over_and_said(bundle_copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit_engine(bundle_copy, "openvino", "unet", environment=built_environment("openvino") | {"openvino": "2020.1"})
    with caplog.at_level(logging.WARNING):
        assert best_slot(Bundle.open(bundle_copy)) == "onnxruntime"
    assert "engine openvino was passed over for onnxruntime: the openvino engine of unet" in caplog.text
    with pytest.raises(StaleEngineError, match=r"built with openvino 2020.1"):
        load_pipeline(bundle_copy, "openvino")


def test_no_usable_slot_lists_why_and_what_to_run(bundle_copy: Path) -> None:
    bundle = Bundle.open(bundle_copy)
    record = bundle.engine("openvino", "unet")
    only = replace(record, target="tensorrt", slot="tensorrt")
    Bundle(bundle_copy, replace(bundle.manifest, engines={"tensorrt/unet": only})).save()
    if not torch.cuda.is_available():
        with pytest.raises(
            EngineError, match=r"no engine of .* runs here \(tensorrt: .*\).*sdkd build-engine .* --target openvino"
        ):
            load_pipeline(bundle_copy)
    Bundle(bundle_copy, replace(bundle.manifest, engines={})).save()
    with pytest.raises(EngineError, match=r"runs here \(it has none\). Build one with: sdkd build-engine"):
        load_pipeline(bundle_copy)


def test_slots_that_are_not_there_or_incomplete(bundle_copy: Path) -> None:
    with pytest.raises(BundleError, match=r"no openvino-bf16 engine for unet \(built so far: onnxruntime, openvino\)"):
        load_pipeline(bundle_copy, "openvino-bf16")
    bundle = Bundle.open(bundle_copy)
    engines = {key: value for key, value in bundle.manifest.engines.items() if key != "openvino/text_encoder"}
    Bundle(bundle_copy, replace(bundle.manifest, engines=engines)).save()
    assert best_slot(Bundle.open(bundle_copy)) == "onnxruntime"
    with pytest.raises(BundleError, match=r"no openvino engine for text_encoder"):
        load_pipeline(bundle_copy, "openvino")
    with pytest.raises(BundleError, match=r"is not a bundle"):
        load_pipeline(bundle_copy / "unet")


def test_missing_extra_through_load_pipeline(bundle_copy: Path) -> None:
    pytest.importorskip("diffusers")
    if torch.cuda.is_available():
        pytest.skip("tensorrt may be installed")
    record = Bundle.open(bundle_copy).engine("onnxruntime", "unet")
    bundle = Bundle.open(bundle_copy)
    Bundle(bundle_copy, bundle.manifest.with_engine(replace(record, target="tensorrt", slot="tensorrt"))).save()
    with pytest.raises(MissingExtraError, match=r"pip install 'sdkd\[tensorrt\]'"):
        load_pipeline(bundle_copy, "tensorrt")
