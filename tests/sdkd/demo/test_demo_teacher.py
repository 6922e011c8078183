"""The committed teacher: what it is made of, and that its pictures show what the captions say."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import sdkd.demo
from sdkd.compare.measure.quality import image_likeness
from sdkd.demo import load_teacher, teacher_path
from sdkd.demo.picture import contact_sheet
from sdkd.demo.run import ENGINES, FEW, DemoSettings, training_config, wanted_engines
from sdkd.distill.data.buckets import fit_pixels
from sdkd.distill.data.encode import encode_image
from sdkd.distill.vae.trainer import decode
from sdkd.errors import InputError, ModelError
from sdkd.models.replacements import load_replacement, with_vae
from sdkd.models.resolve import resolve
from sdkd.targets.registry import availability, cpu_precisions
from sdkd.toyworld.reader import CaptionAccuracy, draw, evaluate_captions, read_image
from sdkd.toyworld.scenes import DemoImages, Scene, all_scenes, held_out_scenes, render, sample_scenes, seen_scenes


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load_teacher()


def test_folder_is_small_and_names_no_path_and_no_safety_checker() -> None:
    files = [file for file in teacher_path().rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 25e6
    assert not [file for file in files if file.suffix in {".bin", ".pt", ".partial"}]
    for file in files:
        if file.suffix == ".json" and file.name != "vocab.json":
            text = file.read_text(encoding="utf-8")
            assert not [place for place in (str(Path.home()), "/tmp", "/work") if place in text], file
    index = json.loads((teacher_path() / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["safety_checker"] == index["feature_extractor"] == [None, None]
    assert index["requires_safety_checker"] is False


def test_loads_without_warnings(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:  # the libraries are imported
    for name in ("diffusers", "transformers"):
        logging.getLogger(name).addHandler(caplog.handler)
    loaded = load_teacher(torch.float16)
    for name in ("diffusers", "transformers"):
        logging.getLogger(name).removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert {parameter.dtype for parameter in loaded.unet.parameters()} == {torch.float16}


@torch.no_grad()
def test_vae_keeps_what_an_image_shows(pipe: Any) -> None:
    scenes = sample_scenes(all_scenes(), 60, 1)
    drawn = torch.from_numpy(np.stack([np.asarray(render(scene, 77)) for scene in scenes]))
    pixels = drawn.permute(0, 3, 1, 2) / 127.5 - 1
    latents = pipe.vae.encode(pixels).latent_dist.mode()
    assert latents.shape == (60, 4, 8, 8)
    assert 0.85 < float(latents.std()) * pipe.vae.config.scaling_factor < 1.15
    images = pipe.image_processor.postprocess(pipe.vae.decode(latents).sample, output_type="pil")
    right = CaptionAccuracy(tuple(scenes), tuple(map(read_image, images))).right
    assert min(right.values()) >= 58, right


def test_draws_what_the_captions_say_also_those_that_it_never_saw(pipe: Any) -> None:
    scenes = sample_scenes(seen_scenes(), 8, 2) + sample_scenes(held_out_scenes(), 8, 2)
    result = evaluate_captions(pipe, scenes, seed=3, batch_size=16)
    assert result.count == 16
    assert min(result.right[name] for name in ("shape", "colour", "background")) >= 14, result.right


def test_images_do_not_depend_on_the_batch_size(pipe: Any) -> None:
    scenes = [Scene("ring", "white", "black"), Scene("cross", "red", "yellow"), Scene("star", "blue", "white")]
    one, three = (
        np.asarray(draw(pipe, scenes, steps=4, guidance_scale=4.0, seed=1, batch_size=size), np.int16)
        for size in (1, 3)
    )
    assert one.shape == (3, 64, 64, 3)
    assert np.abs(one - three).max() <= 2


def test_accuracy_counts_attributes() -> None:
    scene, other = Scene("star", "red", "blue"), Scene("ring", "red", "white")
    result = CaptionAccuracy((scene, other), (read_image(render(scene, 0)), read_image(render(scene, 0))))
    assert result.right == {"shape": 1, "colour": 2, "background": 1, "size": 2, "position": 2}
    assert result.accuracy["shape"] == 0.5


def test_no_scenes_and_missing_weights_are_named(pipe: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="0 scenes in batches of 32: both numbers must be 1 or more"):
        evaluate_captions(pipe, [])
    monkeypatch.setattr(sdkd.demo, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(
        ModelError, match=r"the demo teacher is not part of this installation: .*train_demo_teacher\.py"
    ):
        teacher_path()


def test_every_engine_is_wanted_or_left_out_with_a_reason() -> None:
    skipped: dict[str, str] = {}
    wanted = [(plan.target.name, plan.precision) for plan in wanted_engines(skipped)]
    assert ("onnxruntime", "fp32") in wanted
    assert wanted == [pair for pair in ENGINES if pair in wanted]  # in the report's order
    missing = [pair for pair in ENGINES if pair not in wanted]
    assert set(skipped) <= {name for target, precision in missing for name in (target, f"{target}-{precision}")}
    assert len(skipped) == len({target for target, _ in missing})
    if availability("openvino").can_build:
        half = "bf16" in cpu_precisions()
        assert (("openvino", "bf16") in wanted) == half
        assert skipped.get("openvino-bf16") == (None if half else "this CPU has no bf16 units")


def test_the_student_for_few_steps_learns_the_guidance_that_all_are_compared_with() -> None:
    few, tiny = (training_config(name, DemoSettings(guidance_scale=5.0)) for name in (FEW, "tiny"))
    assert (few.objective, few.guidance, few.steps, few.student_name) == ("consistency", (3.0, 5.0), 300, "sd-tiny")
    assert (few.feature_weight, few.snr_gamma) == (0.01, 5.0)
    assert str(few.generation(None)) == "4 steps, guidance 1, LCMScheduler"
    assert (tiny.objective, tiny.steps, tiny.generation(None)) == ("distill", 240, None)


def test_the_picture_has_a_row_of_each_subject() -> None:
    found = contact_sheet({"teacher": [Image.new("RGB", (8, 8), "red")] * 2, "student": []}, ["a", "b"])
    assert found.size == (150 + 2 * 168, 64 + 2 * 168)
    assert (found.getpixel((160, 70)), found.getpixel((160, 240))) == ((255, 0, 0), (255, 255, 255))


def test_the_small_vae_decodes_and_encodes_what_the_full_one_does(pipe: Any) -> None:
    small, drawings = load_replacement("vae", "demo", torch.float32), DemoImages(12, held_out=True)
    decoded, encoded = [], []
    for row in drawings:
        pixels = fit_pixels(row["image"], 64, 64)
        latents, own = (encode_image(vae, pixels)[0][None] for vae in (pipe.vae, small))
        wanted = pipe.image_processor.postprocess(decode(pipe.vae, latents))
        decoded.append(
            image_likeness(pipe.image_processor.postprocess(decode(small, latents))[0], wanted[0]).counted_db
        )
        encoded.append(image_likeness(pipe.image_processor.postprocess(decode(pipe.vae, own))[0], wanted[0]).counted_db)
    assert np.mean(decoded) > 28
    assert np.mean(encoded) > 36
    assert small.decoder.training is False
    found = with_vae(resolve("demo"), "demo")
    assert found.native_size == (64, 64)
    with pytest.raises(ModelError, match=r"its teacher's scaling factor is 0\.638973, the model needs 0\.18215"):
        with_vae(resolve("random:sd15"), "demo")
