"""Step caching on engines: eager PyTorch's images at every interval, a fresh start for every image, both in step."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    HeunDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
)
from drawn import agree, differ, draw, save_lora
from engine_bundles import RANGES, variant_engines
from generate_runs import pixels, run
from helpers import fixed_weights
from PIL import Image
from small_exports import small_pipeline

from engines import load_pipeline, plug, swap_weights
from export import build_engine, export_pipeline
from sdkd.errors import BundleError, EngineError, InputError
from sdkd.models.step_caching import cache_steps

PICTURE = Image.linear_gradient("L").resize((32, 32)).convert("RGB")


@pytest.fixture(scope="module")
def bundle() -> Path:
    """Engines for step caching on both CPU targets: 32 to 64 px, up to 2 images."""
    return variant_engines("cached")


def eagerly(interval: int, change: Any = None, **call: Any) -> np.ndarray:
    """What the small pipeline draws in PyTorch at an interval."""
    pipe = small_pipeline()
    if change:
        change(pipe)
    cache_steps(pipe.unet, interval)
    return draw(pipe, **call)


def watch(pipe: Any) -> list[str]:
    """From here on, the UNet's calls: w for a whole one, l for one of the last layer."""
    calls: list[str] = []
    for letter, session in (("w", pipe.unet.session), ("l", pipe.unet.last_layer)):
        original = session.run
        session.run = lambda feeds, one=letter, own=original: (calls.append(one), own(feeds))[1]
    return calls


def taken(calls: list[str]) -> str:
    found = "".join(calls)
    calls.clear()
    return found


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_engines_draw_what_pytorch_draws_at_the_same_interval(bundle: Path, target: str) -> None:
    call = {"num_inference_steps": 6, "num_images_per_prompt": 3}  # with guidance: more than the engines' batch
    plain = draw(plug(small_pipeline(), bundle, target), **call)
    pipe = plug(small_pipeline(), bundle, target, cache_interval=1)
    assert np.array_equal(draw(pipe, **call), plain)  # bit for bit
    assert pipe.unet.last_layer is None
    for interval in (2, 4):
        pipe = plug(small_pipeline(), bundle, target, cache_interval=interval)
        found = draw(pipe, **call)
        agree(found, eagerly(interval, **call))
        differ(found, plain)
        assert np.array_equal(draw(pipe, **call), found)


def test_every_image_begins_with_a_whole_call(bundle: Path) -> None:
    pipe = plug(small_pipeline(), bundle, "onnxruntime", ["unet"], cache_interval=4)
    calls = watch(pipe)

    def drawn(expected: str, on: Any = pipe, **call: Any) -> np.ndarray:
        image = draw(on, **({"num_inference_steps": 6, "guidance_scale": 1.0} | call))
        assert taken(calls) == expected
        return image

    first = drawn("wlllwl")
    assert np.array_equal(drawn("wlllwl"), first)  # the same prompt and seed again
    drawn("wlllwl", prompt="a dog", guidance_scale=4.0, height=48)
    drawn("wlllwl", num_images_per_prompt=2)

    def stop(own: Any, step: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        own._interrupt = step == 1
        return tensors

    def swap_text(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return tensors if step != 1 else {"prompt_embeds": -tensors["prompt_embeds"]}

    drawn("wl", callback_on_step_end=stop)
    images = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    later = {"image": PICTURE, "strength": 0.5, "height": None, "width": None}  # goes on where that one was stopped
    one = drawn("wll", images, **{key: value for key, value in later.items() if value is not None})
    agree(one, draw(_img2img(4), num_inference_steps=6, guidance_scale=1.0, image=PICTURE, strength=0.5))
    for _ in range(2):
        drawn("w", num_inference_steps=1)
    drawn("wlwlll", callback_on_step_end=swap_text, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert np.array_equal(drawn("wlllwl"), first)
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    drawn("wlllwlllwll")  # two calls a step but for the last
    pipe.unet.close()
    with pytest.raises(EngineError, match=r"is closed"):
        draw(pipe)


def test_inpainting_caches_steps(bundle: Path) -> None:
    mask = Image.new("L", (32, 32))
    mask.paste(255, (8, 8, 24, 24))
    call = {"num_inference_steps": 5, "image": PICTURE, "mask_image": mask, "strength": 1.0}
    eager, pipe = small_pipeline(), plug(small_pipeline(), bundle, "onnxruntime", cache_interval=3)
    whole = draw(StableDiffusionInpaintPipeline.from_pipe(eager), **call)
    cache_steps(eager.unet, 3)
    cached = draw(StableDiffusionInpaintPipeline.from_pipe(eager), **call)
    agree(draw(StableDiffusionInpaintPipeline.from_pipe(pipe), **call), cached)
    differ(cached, whole)


@pytest.mark.slow
def test_a_unet_that_takes_an_image_caches_steps(tmp_path: Path) -> None:
    def eager() -> Any:
        return StableDiffusionInstructPix2PixPipeline(
            **small_pipeline(in_channels=8).components, requires_safety_checker=False
        )

    export_pipeline(eager(), tmp_path / "bundle", step_caching=True)
    build_engine(tmp_path / "bundle", "onnxruntime", ranges=RANGES)
    call, cached = {"num_inference_steps": 5, "image": PICTURE}, eager()
    cache_steps(cached.unet, 3)
    found = draw(plug(eager(), tmp_path / "bundle", "onnxruntime", cache_interval=3), **call)
    agree(found, draw(cached, **call))
    differ(found, draw(eager(), **call))


def _img2img(interval: int) -> Any:
    pipe = StableDiffusionImg2ImgPipeline.from_pipe(small_pipeline())
    cache_steps(pipe.unet, interval)
    return pipe


def test_threads_have_images_of_their_own(bundle: Path) -> None:
    pipe = plug(small_pipeline(), bundle, "onnxruntime", ["unet"], cache_interval=3)
    alone = {seed: _loop(pipe.unet, seed) for seed in (1, 2)}
    calls, found, barrier = watch(pipe), {}, threading.Barrier(2)

    def work(seed: int) -> None:
        found[seed] = _loop(pipe.unet, seed, barrier)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken(calls)) == sorted("wllw" * 2)
    for seed, expected in alone.items():
        assert torch.equal(found[seed], expected)


def _loop(unet: Any, seed: int, barrier: threading.Barrier | None = None) -> torch.Tensor:
    """Four steps of a loop of one's own, in step with another thread."""
    latents, text = (
        torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed)) for shape in ((4, 16, 16), (77, 32))
    )
    for timestep in torch.tensor([900, 700, 500, 300]):
        if barrier:
            barrier.wait(60)
        latents = latents - 0.1 * unet(latents, timestep, text).sample
    return latents


def test_adapters_and_swapped_weights_reach_both_engines_or_none(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = {"num_inference_steps": 3}
    lora = save_lora(small_pipeline(), tmp_path / "lora", 1)
    pipe = plug(small_pipeline(), bundle, "onnxruntime", cache_interval=3)
    before = draw(pipe, **call)
    pipe.load_lora_weights(lora)
    with_lora = draw(pipe, **call)
    agree(with_lora, eagerly(3, lambda it: it.load_lora_weights(lora), **call))
    differ(with_lora, before)
    pipe.unload_lora_weights()
    assert np.array_equal(draw(pipe, **call), before)
    other = fixed_weights(small_pipeline().unet, seed=9).state_dict()
    swap_weights(pipe, other)
    agree(draw(pipe, **call), eagerly(3, lambda it: it.unet.load_state_dict(other), **call))
    # The whole UNet's engine refuses what its last layer's took: no image is drawn with one of each.
    swap_weights(pipe, None)
    original = type(pipe.unet.session)._swap

    def refuse(session: Any, *given: Any) -> None:
        if session is pipe.unet.session:
            raise EngineError("no room")
        original(session, *given)

    monkeypatch.setattr(type(pipe.unet.session), "_swap", refuse)
    for _ in range(2):
        with pytest.raises(EngineError, match=r"no room"):
            draw(pipe, **call)
    swap_weights(pipe, other)  # as it was before: still not in step
    with pytest.raises(EngineError, match=r"no room"):
        draw(pipe, **call)
    monkeypatch.undo()
    agree(draw(pipe, **call), eagerly(3, lambda it: it.unet.load_state_dict(other), **call))


def test_low_memory_and_eager_fallback_draw_the_same(bundle: Path) -> None:
    call = {"num_inference_steps": 4}
    pipe = load_pipeline(bundle, "onnxruntime", low_memory=True, cache_interval=2)
    for _ in range(2):
        agree(draw(pipe, **call), eagerly(2, **call))
    pipe = plug(small_pipeline(), bundle, "onnxruntime", eager_fallback=True, cache_interval=2)
    large = draw(pipe, height=96, width=64, **call)
    agree(large, eagerly(1, height=96, width=64, **call))  # eagerly every call is whole
    agree(draw(pipe, **call), eagerly(2, **call))


def test_generate_caches_steps_on_engines_and_eagerly(
    bundle: Path, engine_bundle: Path, folder: Path, tmp_path: Path
) -> None:
    settings = ("--steps", 9, "--seed", 5, "--cache-interval", 3, "--overwrite")
    for model, name in ((bundle, "engine"), (folder, "eager")):
        result = run(model, "a red star", "-o", tmp_path / f"{name}.png", *settings)
        assert result.exit_code == 0, result.exception
    one, other = pixels(tmp_path / "engine.png"), pixels(tmp_path / "eager.png")
    assert np.abs(one - other).max() <= 1
    assert Image.open(tmp_path / "engine.png").text["cache_interval"] == "3"
    result = run(bundle, "a red star", "-o", tmp_path / "whole.png", *settings[:4])
    assert np.abs(one - pixels(tmp_path / "whole.png")).max() > 5
    few = run(bundle, "x", "-o", tmp_path / "few.png", "--steps", 4, "--cache-interval", 2)
    assert "cache interval 2 at 4 steps: few steps have little in common" in " ".join(few.output.split())
    PICTURE.save(tmp_path / "image.png")
    for words, kind, why in (
        ((bundle, "--steps", 4, "--cache-interval", 5), InputError, r"cache interval 5 is larger than the 4 steps"),
        ((bundle, "--steps", 8, "--cache-interval", 5, "--image", tmp_path / "image.png", "--strength", 0.5),
         InputError, r"cache interval 5 is larger than the 4 steps"),
        ((engine_bundle, "--cache-interval", 2), BundleError, r"has no graphs for step caching: export its model"),
    ):  # fmt: skip
        result = run(words[0], "x", "-o", tmp_path / "none.png", *words[1:])
        assert result.exit_code == 1
        with pytest.raises(kind, match=why):
            raise result.exception
    assert run(bundle, "x", "--cache-interval", 0).exit_code == 2


def test_what_cannot_be_cached_is_refused(bundle: Path, engine_bundle: Path) -> None:
    with pytest.raises(BundleError, match=r"has no graphs for step caching: export its model again with --step-cach"):
        plug(small_pipeline(), engine_bundle, cache_interval=2)
    with pytest.raises(BundleError, match=r"has no graphs for step caching"):
        load_pipeline(engine_bundle, cache_interval=2)
    with pytest.raises(InputError, match=r"cache interval 0 is too small"):
        plug(small_pipeline(), bundle, cache_interval=0)
    with pytest.raises(InputError, match=r"cache interval 3 is for the UNet's engine: have unet among the components"):
        plug(small_pipeline(), bundle, components=["vae"], cache_interval=3)
