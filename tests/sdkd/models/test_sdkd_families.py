"""Published families and students are recognised, those of old diffusers versions too; the tokenizer is CLIP's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from sdkd.families import MODELS, STABLE_DIFFUSION
from sdkd.models.clip_tokenizer import MERGES, clip_tokenizer
from sdkd.models.diffusers_folder import write_pipeline
from sdkd.models.families import empty, part_config, pipeline_rest
from sdkd.models.resolve import load_eager, resolve
from sdkd.students.blocks import build_student, full_config, student_config, student_names

CROSS, UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
# What BK-SDM's configs say: written by diffusers 0.10 to 0.15, some entries missing, some no longer known.
OLD = {
    "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.10.0.dev0", "center_input_sample": False,
    "dual_cross_attention": False, "layers_per_block": 1, "num_class_embeds": None,
}  # fmt: skip
FOUR: dict[str, Any] = {
    "down_block_types": [CROSS, CROSS, CROSS, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", UP, UP, UP],
}
THREE: dict[str, Any] = {"down_block_types": [CROSS] * 3, "up_block_types": [UP] * 3, "mid_block_type": None}
PUBLISHED = {
    "bk-sdm-base, no mid_block_type": (OLD | FOUR, ("sd-small", "bk-base")),
    "sd-small": (OLD | FOUR | {"mid_block_type": "UNetMidBlock2DCrossAttn"}, ("sd-small", "bk-base")),
    "bk-sdm-small": (OLD | FOUR | {"mid_block_type": None}, ("bk-small",)),
    "tiny": (OLD | THREE, ("sd-tiny", "bk-tiny")),
    "a whole UNet": (OLD | FOUR | {"layers_per_block": 2}, ()),
    "no entries": ({}, ()),
}


def test_published_students_and_our_own_are_recognised() -> None:
    for name, (config, students) in PUBLISHED.items():
        assert student_names(config) == students, name
    for student in (spec.name for spec in STABLE_DIFFUSION.students):
        assert student in student_names(student_config(helpers.TEACHER_UNET, student))


@pytest.mark.parametrize("student", ["sd-small", "bk-small", "sd-tiny"])
def test_a_folder_with_an_old_config_loads(student: str, tmp_path: Path) -> None:
    unet = build_student(helpers.tiny_unet(), student)
    write_pipeline(helpers.tiny_pipeline(), tmp_path / "model", unet=unet)
    file = tmp_path / "model" / "unet" / "config.json"
    known = ("block_out_channels", "cross_attention_dim", "attention_head_dim", "norm_num_groups", "sample_size")
    blocks = THREE if student == "sd-tiny" else FOUR | ({} if student == "sd-small" else {"mid_block_type": None})
    file.write_text(json.dumps(OLD | blocks | {key: unet.config[key] for key in known}))
    loaded = load_eager(tmp_path / "model").unet
    assert full_config(loaded.config) == full_config(unet.config)
    assert torch.equal(loaded.conv_out.weight, unet.conv_out.weight)
    assert student in student_names(resolve(tmp_path / "model").unet_config)


def test_attention_of_the_vae_in_its_old_names(tmp_path: Path) -> None:
    pipe = helpers.tiny_pipeline()
    write_pipeline(pipe, tmp_path / "model")
    file = tmp_path / "model" / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for name, value in load_file(file).items():
        for own, before in old.items():
            name = name.replace(f"attentions.0.{own}.", f"attentions.0.{before}.")
        state[name] = value
    assert "decoder.mid_block.attentions.0.query.weight" in state
    save_file(state, file)
    loaded = load_eager(tmp_path / "model").vae.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in pipe.vae.state_dict().items())


PARAMETERS = {
    "sd15": (859_520_964, 83_653_863, 123_060_480),
    "sd21": (865_910_724, 83_653_863, 340_387_840),
    "sd21base": (865_910_724, 83_653_863, 340_387_840),
    "sdxl": (2_567_463_684, 83_653_863, 123_060_480, 694_659_840),
}


@pytest.mark.parametrize("family", PARAMETERS)
def test_published_sizes(family: str) -> None:
    own = MODELS[family]
    modules = {part: empty(part, part_config(*own, part)) for part in own[0].parts}
    assert tuple(sum(p.numel() for p in module.parameters()) for module in modules.values()) == PARAMETERS[family]
    pipe = pipeline_rest(*own)
    assert pipe.scheduler.config.prediction_type == own[1].prediction_type
    assert pipeline_rest(*own, 9, "v_prediction").scheduler.config.prediction_type == "v_prediction"
    for encoder in own[0].text_encoders:
        assert modules[encoder.part].config.pad_token_id == getattr(pipe, encoder.tokenizer).pad_token_id


# Ids as CLIP's own tokenizer gives them.
KNOWN = {
    "a photo of a cat": [320, 1125, 539, 320, 2368],
    "A  Photo, of\na cat": [320, 1125, 267, 539, 320, 2368],
    "": [],
    "!": [256],
    "1girl": [272, 1611],
}


def test_the_embedded_tokenizer(tmp_path: Path) -> None:
    tokenizer = clip_tokenizer()
    for text, ids in KNOWN.items():
        assert tokenizer(text).input_ids == [49406, *ids, 49407]
    assert (len(tokenizer), tokenizer.model_max_length) == (49408, 77)
    letters = ["!", "Ń", "!</w>", "Ń</w>", "in", "th", "jekyll</w>"]
    assert tokenizer.convert_ids_to_tokens([0, 255, 256, 511, 512, 513, 49405]) == letters
    for text in ("日本語", "café 🐱 don't", "naïve Ωμέγα"):
        back = tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True)
        assert back.replace(" ", "") == text.lower().replace(" ", "")
    for pad, token in ((49407, "<|endoftext|>"), (0, "!")):  # of SD 1.x, of SD 2.x
        padded = clip_tokenizer(token)("cat", padding="max_length").input_ids
        assert (len(padded), padded[:4]) == (77, [49406, 2368, 49407, pad])
        clip_tokenizer(token).save_pretrained(tmp_path / str(pad))
        again = CLIPTokenizer.from_pretrained(tmp_path / str(pad))
        assert again("cat", padding="max_length").input_ids == padded
    assert "Copyright (c) 2021 OpenAI" in (MERGES.parent / "NOTICE").read_text(encoding="utf-8")
