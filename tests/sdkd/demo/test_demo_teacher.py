"""The committed teacher: what it is made of, and that its pictures show what the captions say."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sdkd.demo
from sdkd.demo import load_teacher, teacher, teacher_path
from sdkd.errors import InputError, ModelError
from sdkd.toyworld.accuracy import CaptionAccuracy, draw, evaluate_captions
from sdkd.toyworld.reader import read_image
from sdkd.toyworld.scenes import Scene, all_scenes, caption, held_out_scenes, render, sample_scenes, seen_scenes


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load_teacher()


def test_folder_is_small_and_half_precision() -> None:
    files = [file for file in teacher_path().rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 25e6
    assert not [file for file in files if file.suffix in {".bin", ".pt", ".partial"}]


def test_index_names_no_safety_checker() -> None:
    index = json.loads((teacher_path() / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["safety_checker"] == [None, None]
    assert index["feature_extractor"] == [None, None]
    assert index["requires_safety_checker"] is False


def test_configs_name_no_path() -> None:
    for file in teacher_path().rglob("*.json"):
        text = file.read_text(encoding="utf-8")
        if file.name != "vocab.json":
            assert str(Path.home()) not in text, file
            assert "/tmp" not in text, file
            assert "/work" not in text, file


def test_loads_without_warnings(caplog: pytest.LogCaptureFixture) -> None:
    for name in ("diffusers", "transformers"):
        logging.getLogger(name).addHandler(caplog.handler)
    loaded = load_teacher(torch.float16)
    for name in ("diffusers", "transformers"):
        logging.getLogger(name).removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert {parameter.dtype for parameter in loaded.unet.parameters()} == {torch.float16}


def test_unet_has_the_shape_of_stable_diffusion(pipe: Any) -> None:
    config = pipe.unet.config
    assert config.down_block_types == ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    assert config.mid_block_type == "UNetMidBlock2DCrossAttn"
    assert config.up_block_types == ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
    widths = [width // heads for width, heads in zip(config.block_out_channels, config.attention_head_dim, strict=True)]
    assert widths == [16, 16, 16, 16]
    assert (config.sample_size, config.cross_attention_dim, config.layers_per_block) == (8, 128, 2)
    assert {parameter.dtype for parameter in pipe.unet.parameters()} == {torch.float32}


def test_tokenizer_makes_one_token_of_each_word(pipe: Any) -> None:
    for scene in sample_scenes(all_scenes(), 50, 0):
        text = caption(scene)
        ids = pipe.tokenizer(text).input_ids
        assert len(ids) == len(text.replace(",", " ,").split()) + 2
        assert pipe.tokenizer.decode(ids, skip_special_tokens=True).replace(" ,", ",").strip() == text
        assert (ids[0], ids[-1]) == (pipe.tokenizer.bos_token_id, pipe.tokenizer.eos_token_id)
    assert pipe.tokenizer.model_max_length == 77


def test_pooled_text_is_taken_at_the_end_token(pipe: Any) -> None:
    tokens = pipe.tokenizer("a small red star", padding="max_length", return_tensors="pt").input_ids
    end = tokens[0].tolist().index(pipe.text_encoder.config.eos_token_id)
    output = pipe.text_encoder(tokens)
    assert tokens.shape == (1, 77)
    assert end == 5
    assert torch.equal(output.pooler_output[0], output.last_hidden_state[0, end])


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


def test_draws_what_the_captions_say(pipe: Any) -> None:
    result = evaluate_captions(pipe, sample_scenes(seen_scenes(), 16, 2), seed=3, batch_size=16)
    assert result.count == 16
    assert min(result.right[name] for name in ("shape", "colour", "background")) >= 14, result.right


def test_draws_combinations_that_it_never_saw(pipe: Any) -> None:
    result = evaluate_captions(pipe, sample_scenes(held_out_scenes(), 16, 2), seed=3, batch_size=16)
    assert min(result.right[name] for name in ("shape", "colour", "background")) >= 13, result.right


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


def test_no_scenes_are_refused(pipe: Any) -> None:
    with pytest.raises(InputError, match="0 scenes in batches of 32: both numbers must be 1 or more"):
        evaluate_captions(pipe, [])


def test_missing_weights_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(teacher, "__file__", str(tmp_path / "teacher.py"))
    with pytest.raises(
        ModelError, match=r"the demo teacher is not part of this installation: .*train_demo_teacher\.py"
    ):
        teacher_path()


def test_unknown_name_of_the_package() -> None:
    with pytest.raises(AttributeError, match=r"module 'sdkd\.demo' has no attribute 'student'"):
        _ = sdkd.demo.student
