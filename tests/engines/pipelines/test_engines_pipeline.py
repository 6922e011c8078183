"""Engines inside diffusers pipelines: the same images as eager, and clear refusals."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForImage2Image, StableDiffusionPipeline
from drawn import agree, draw
from engine_bundles import edit_engine
from graph_bundles import graph_bundle
from helpers import tiny_unet, tiny_vae
from small_bundles import small_pipeline

from engines.modules.components import EngineTextEncoder, EngineUNet
from engines.modules.vae import EngineVAE
from engines.pipelines.parts import ORDER, _rank, best_slot
from engines.pipelines.pipeline import bundle_scheduler, bundle_tokenizer, load_pipeline, plug, unplug
from sdkd.bundle.manifest import Bundle
from sdkd.errors import BundleError, EngineError, ModelError, StaleEngineError
from sdkd.models.resolve import DEMO_WEIGHTS
from sdkd.targets import registry
from sdkd.targets.registry import built_environment

TARGETS = ("onnxruntime", "openvino", "inductor")
# Of each kind: timesteps that are whole numbers, fractions or logarithms, two calls a step, noise of their own.
SCHEDULERS = (
    *("EDMDPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"),
    *("LCMScheduler", "PNDMScheduler", "UniPCMultistepScheduler"),
)
SCHEDULER_OPTIONS: dict[str, dict[str, Any]] = {"PNDMScheduler": {"skip_prk_steps": True}}  # else more than 3 steps


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
        {"guidance_scale": 1.0},
        {"guidance_scale": 2.5, "guidance_rescale": 0.7},
        {"num_images_per_prompt": 3},
        {"height": 64, "width": 40},
        {"prompt": ["a red star", "a blue disc"], "negative_prompt": ["green", "x"], "guidance_scale": 4.0},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_images_equal_eager(
    engines: StableDiffusionPipeline, plain: StableDiffusionPipeline, options: dict[str, Any]
) -> None:
    agree(draw(engines, **options), draw(plain, **options))


@pytest.fixture(scope="module")
def scheduled(engine_bundle: Path) -> tuple[StableDiffusionPipeline, StableDiffusionPipeline]:
    """An eager and a plugged pipeline, whose schedulers tests exchange."""
    return small_pipeline(), plug(small_pipeline(), engine_bundle, "onnxruntime")


@pytest.mark.parametrize("name", SCHEDULERS)
def test_any_scheduler(scheduled: tuple[StableDiffusionPipeline, StableDiffusionPipeline], name: str) -> None:
    for pipe in scheduled:
        config = dict(small_pipeline().scheduler.config) | SCHEDULER_OPTIONS.get(name, {})
        pipe.scheduler = getattr(diffusers, name).from_config(config)
    eager, engine = scheduled
    agree(draw(engine), draw(eager))


def test_a_pipeline_in_another_dtype_stays_in_it(engine_bundle: Path) -> None:
    pipe = load_pipeline(engine_bundle, "onnxruntime", torch_dtype=torch.bfloat16)
    assert pipe.dtype == torch.bfloat16
    latents = pipe("a cat", num_inference_steps=1, output_type="latent").images
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
    for method in ("enable_model_cpu_offload", "enable_sequential_cpu_offload"):
        with pytest.raises(EngineError, match=r"cannot be offloaded: its weights live inside .*low_memory=True"):
            getattr(eager, method)(device="cpu")
    assert draw(eager).shape == (1, 32, 32, 3)
    other = AutoPipelineForImage2Image.from_pipe(eager)
    assert (other.unet, other.vae, other.vae_scale_factor) == (eager.unet, eager.vae, 2)
    assert unplug(other).unet is before["unet"]
    assert isinstance(eager.unet, EngineUNet)
    assert unplug(eager) is eager
    assert eager.components == before
    with pytest.raises(EngineError, match=r"this StableDiffusionPipeline runs on no engine: nothing to unplug"):
        unplug(eager)


DISAGREEMENTS: list[tuple[str, str, Any]] = [
    ("unet", "cross_attention_dim", 768),
    ("unet", "in_channels", 9),
    ("unet", "freq_shift", 1),
    ("vae", "scaling_factor", 0.5),
    ("text_encoder", "vocab_size", 49408),
    ("text_encoder", "num_attention_heads", 4),
]


def test_disagreement_names_both_values(bundle_copy: Path, eager: StableDiffusionPipeline) -> None:
    opened = Bundle.open(bundle_copy)
    for part, key, value in DISAGREEMENTS:
        file = bundle_copy / ("vae_decoder" if part == "vae" else part) / "config.json"
        before, theirs = file.read_text(), getattr(getattr(eager, part).config, key)
        file.write_text(before.replace(f'"{key}": {theirs}', f'"{key}": {value}'))
        opened.with_rest().save()
        with pytest.raises(ModelError, match=rf"{part} {key} is {value} in the bundle and {theirs} in the pipeline"):
            plug(eager, bundle_copy, "onnxruntime")
        file.write_text(before)
    opened.with_rest().save()
    scheduler, eager.scheduler = eager.scheduler, diffusers.DDIMScheduler(prediction_type="v_prediction")
    with pytest.raises(ModelError, match=r"scheduler prediction_type is epsilon in the bundle and v_prediction in the"):
        plug(eager, bundle_copy, "onnxruntime")
    eager.scheduler, eager.vae = scheduler, tiny_vae()
    with pytest.raises(ModelError, match=r"vae pixels per latent is 2 in the bundle and 8 in the pipeline"):
        plug(eager, bundle_copy, "onnxruntime")
    ddpm = diffusers.DDPMPipeline(unet=tiny_unet(), scheduler=diffusers.DDPMScheduler())
    with pytest.raises(ModelError, match=r"DDPMPipeline is no pipeline of Stable Diffusion 1.x, 2.x, which"):
        plug(ddpm, bundle_copy)


# Loading from a bundle alone


def test_load_pipeline_needs_no_weights(engine_bundle: Path, plain: StableDiffusionPipeline) -> None:
    pipe = load_pipeline(engine_bundle, "onnxruntime")
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe) is StableDiffusionPipeline
    assert pipe.safety_checker is None
    assert type(pipe.scheduler) is diffusers.DDIMScheduler
    agree(draw(pipe), draw(plain))
    with pytest.raises(
        EngineError, match=r"has no eager modules, since it was loaded from a bundle or .*: nothing to unplug"
    ):
        unplug(pipe)


def test_a_stale_slot_is_passed_over_and_said(bundle_copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert best_slot(Bundle.open(bundle_copy)) == "openvino"
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


def test_what_runs_on_the_gpu_comes_before_what_runs_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "gpu", lambda: None)
    assert sorted(ORDER, key=_rank) == ["tensorrt", "tensorrt-rtx", "openvino", "onnxruntime", "inductor"]
    monkeypatch.setattr(registry, "gpu", lambda: {"gpu": "NVIDIA H200", "compute_capability": "9.0"})
    assert sorted(ORDER, key=_rank) == ["tensorrt", "tensorrt-rtx", "inductor", "openvino", "onnxruntime"]


def test_slots_that_are_not_there_or_incomplete(bundle_copy: Path) -> None:
    with pytest.raises(BundleError, match=r"no openvino-bf16 engine for unet \(built so far: .*, openvino, inductor\)"):
        load_pipeline(bundle_copy, "openvino-bf16")
    bundle = Bundle.open(bundle_copy)
    engines = {key: value for key, value in bundle.manifest.engines.items() if key != "openvino/text_encoder"}
    Bundle(bundle_copy, replace(bundle.manifest, engines=engines)).save()
    assert best_slot(Bundle.open(bundle_copy)) == "onnxruntime"
    with pytest.raises(BundleError, match=r"no openvino engine for text_encoder"):
        load_pipeline(bundle_copy, "openvino")
    with pytest.raises(BundleError, match=r"is not a bundle"):
        load_pipeline(bundle_copy / "unet")


# Scheduler and tokenizer files that are damaged: one error, whatever the libraries raise


SCHEDULER, UNREADABLE, ODD = "scheduler/scheduler_config.json", "its tokenizer cannot be read", "an unknown scheduler"
DAMAGED: list[tuple[str, Any, str]] = [
    ("tokenizer/tokenizer.json", "{", UNREADABLE),
    ("tokenizer/tokenizer.json", {"model": {"type": "BPE", "vocab": 3}}, UNREADABLE),
    ("tokenizer/tokenizer_config.json", "[" * 100_000, UNREADABLE),
    (SCHEDULER, "{", r"scheduler_config.json' is not JSON"),
    (SCHEDULER, "[]", r"scheduler_config.json' is damaged \(the file is a list"),
    (SCHEDULER, {"num_train_timesteps": 10**9}, "num_train_timesteps .* too large"),
    (SCHEDULER, {"beta_schedule": 7}, "its scheduler cannot be read"),
    *(("model_index.json", {"scheduler": odd}, ODD) for odd in (None, "x", ["diffusers"], ["diffusers", 3])),
    ("model_index.json", {"scheduler": ["diffusers", "AutoencoderKL"]}, ODD),
]


def test_damaged_files_are_one_error(tmp_path: Path) -> None:
    bundle = graph_bundle(tmp_path, components=("unet",))
    for part in ("scheduler", "tokenizer"):
        shutil.copytree(DEMO_WEIGHTS / part, tmp_path / part)
    (tmp_path / "model_index.json").write_text(json.dumps({"scheduler": ["diffusers", "DDIMScheduler"]}))
    assert type(bundle_scheduler(bundle)).__name__ == "DDIMScheduler"
    assert bundle_tokenizer(bundle, "tokenizer")("red").input_ids
    for name, content, message in DAMAGED:
        whole = (tmp_path / name).read_text()
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(BundleError, match=message):
            bundle_tokenizer(bundle, "tokenizer") if name.startswith("tokenizer") else bundle_scheduler(bundle)
        (tmp_path / name).write_text(whole)
