"""Students as data: counts, configs, weights, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import helpers
import peft
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_kohya
from training_runs import fused

from sdkd.errors import InputError, ModelError
from sdkd.families import STABLE_DIFFUSION
from sdkd.students.blocks import (
    build_student,
    check_teacher,
    count_macs,
    count_parameters,
    key_map,
    student_config,
    student_spec,
    teacher_key,
)
from sdkd.students.lora_fit import remap_lora

STUDENTS = [spec.name for spec in STABLE_DIFFUSION.students]

SD1: dict[str, Any] = {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64}
SD2: dict[str, Any] = {
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
    "sample_size": 64,
}
COUNTS = {
    "teacher": (859_520_964, 865_910_724),
    "sd-small": (579_384_964, 583_480_964),
    "sd-tiny": (323_384_964, 326_825_604),
    "bk-base": (579_384_964, 583_480_964),
    "bk-small": (482_346_884, 485_787_524),
    "bk-tiny": (323_384_964, 326_825_604),
}
GMACS = [("teacher", SD1, 401.6), ("sd-tiny", SD2, 243.0)]


def config_of(family: dict[str, Any], name: str) -> dict[str, Any]:
    return family if name == "teacher" else student_config(family, name)


def test_parameter_counts_are_the_published_ones() -> None:
    found = {name: tuple(count_parameters(config_of(family, name)) for family in (SD1, SD2)) for name in COUNTS}
    assert found == COUNTS


def test_macs_include_attention_and_grow_with_batch_and_size() -> None:
    for name, family, expected in GMACS:
        assert round(count_macs(config_of(family, name)) / 1e9, 1) == expected, name
    config = helpers.TEACHER_UNET
    assert count_macs(config, batch=3) == 3 * count_macs(config)
    assert count_macs(config, height=16, width=16) > 3 * count_macs(config, height=8, width=8)


def test_config_says_what_the_student_is() -> None:
    tiny = student_config(SD2, "tiny")
    assert tiny["layers_per_block"] == 1
    assert tiny["mid_block_type"] is None
    assert tiny["block_out_channels"] == (320, 640, 1280)
    assert tiny["attention_head_dim"] == (5, 10, 20)
    assert tiny["down_block_types"] == ("CrossAttnDownBlock2D",) * 3
    assert tiny["up_block_types"] == ("CrossAttnUpBlock2D",) * 3
    assert student_config(SD1, "tiny")["attention_head_dim"] == 8
    assert student_config(SD1, "small")["mid_block_type"] == "UNetMidBlock2DCrossAttn"
    assert student_config(SD1, "bk-small")["mid_block_type"] is None


def test_config_of_an_in_memory_teacher_keeps_no_private_entries() -> None:
    teacher = helpers.tiny_unet()
    before = dict(teacher.config)
    config = student_config(teacher.config, "tiny")
    assert not [key for key in config if key.startswith("_")]
    assert UNet2DConditionModel.from_config(config).config.layers_per_block == 1
    assert dict(teacher.config) == before


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *((name, {}) for name in STUDENTS),
        ("sd-small", {"in_channels": 9, "use_linear_projection": True}),
        ("sd-tiny", {"time_cond_proj_dim": 8}),
    ],
)
def test_student_equals_the_teacher_with_blocks_removed_also_when_saved(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    teacher = helpers.tiny_unet(**changes)
    student = build_student(teacher, name)
    assert same_output(student, removed(teacher, name))
    assert not student.training
    assert student.num_upsamplers == (2 if name.endswith("tiny") else 3)
    student.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path)
    # Clones are aligned in memory; the file's mapped weights are not, and kernels may then round differently.
    loaded.load_state_dict({key: value.clone() for key, value in loaded.state_dict().items()}, assign=True)
    assert same_output(student, loaded)


def removed(teacher: UNet2DConditionModel, name: str) -> UNet2DConditionModel:
    """The same student made another way: by deleting modules of a copy of the teacher."""
    unet = copy.deepcopy(teacher)
    for block in unet.down_blocks:
        del block.resnets[1]
        if hasattr(block, "attentions"):
            del block.attentions[1]
    for block in unet.up_blocks:
        del block.resnets[1]
        if hasattr(block, "attentions"):
            del block.attentions[1]
    if name not in ("sd-small", "bk-base"):
        unet.mid_block = None
    if name.endswith("tiny"):
        del unet.down_blocks[3]
        unet.down_blocks[2].downsamplers = None
        del unet.up_blocks[0]
        unet.num_upsamplers = 2
    return unet


def outputs(unet: UNet2DConditionModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    sample = torch.randn(2, unet.config.in_channels, 8, 8, generator=generator)
    text = torch.randn(2, 5, helpers.CONTEXT, generator=generator)
    width = unet.config.time_cond_proj_dim
    guidance = None if width is None else torch.randn(2, width, generator=generator)
    with torch.no_grad():
        found: torch.Tensor = unet(sample, torch.tensor([7, 500]), text, timestep_cond=guidance).sample
    return found


def same_output(one: UNet2DConditionModel, other: UNet2DConditionModel) -> bool:
    # Not bit for bit: matrix products may round in another order where the weights lie at another alignment.
    return bool(outputs(one).std() > 0) and torch.allclose(outputs(one), outputs(other), rtol=1e-5, atol=1e-5)


def test_last_up_layer_is_kept_not_the_middle_one() -> None:
    teacher = helpers.tiny_unet()
    weights, student = teacher.state_dict(), build_student(teacher, "tiny").state_dict()
    assert torch.equal(student["up_blocks.0.resnets.1.conv1.weight"], weights["up_blocks.1.resnets.2.conv1.weight"])
    modules = key_map(teacher.config, "tiny")
    assert teacher_key("up_blocks.2.attentions.1.proj_in.bias", modules) == "up_blocks.3.attentions.2.proj_in.bias"
    assert teacher_key("conv_in.weight", modules) == "conv_in.weight"


def test_training_the_student_does_not_train_the_teacher() -> None:
    teacher = helpers.tiny_unet()
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    student = build_student(teacher, "small")
    with torch.no_grad():
        for parameter in student.parameters():
            assert parameter.requires_grad
            parameter.add_(1.0)
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert build_student(teacher.half(), "tiny").dtype == torch.float16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"addition_embed_type": "text_time"}, "not a complete UNet of SDXL"),
        ({"mid_block_type": None}, "mid_block_type: expected UNetMidBlock2DCrossAttn, found None"),
        ({"layers_per_block": 3}, "layers_per_block: expected 2, found 3"),
        ({"layers_per_block": [2, 2, 2, 1]}, "layers_per_block: expected 2, found 4 x"),
        ({"class_embed_type": "projection"}, "class_embed_type: expected None, found projection"),
        ({"attention_head_dim": [5, 10, 20]}, "attention_head_dim: expected 4 levels, found 3"),
        (
            {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")},
            "down_block_types: expected 4 x .*, found 3 x",
        ),
    ],
)
def test_other_unets_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        check_teacher(SD1 | changes)


def test_students_are_known_by_name_and_are_no_teachers() -> None:
    names = [student_spec(name).name for name in ("small", "tiny", "bk-tiny", "SD_Tiny")]
    assert names == ["sd-small", "sd-tiny", "bk-tiny", "sd-tiny"]
    with pytest.raises(InputError, match=r"student 'micro' is unknown: choose one of small \(sd-small\), tiny"):
        student_spec("micro")
    for name in STUDENTS:
        with pytest.raises(ModelError, match="looks like a student already"):
            student_config(student_config(SD1, name), "tiny")


def test_teacher_with_an_adapter_is_refused() -> None:
    teacher = helpers.tiny_unet()
    teacher.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ModelError, match="fuse or unload it first"):
        build_student(teacher, "tiny")


def test_remapped_lora_does_what_it_does_in_the_teacher() -> None:
    """A kohya file of rank 2 on attention, feed-forward and convolution layers."""
    teacher = helpers.tiny_unet()
    targets = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "ff.net.2", "proj_in"]
    teacher.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=targets))
    generator = torch.Generator().manual_seed(8)
    state = peft.get_peft_model_state_dict(teacher)
    lora = convert_state_dict_to_kohya(
        {f"unet.{key}": torch.randn(value.shape, generator=generator) * 0.2 for key, value in state.items()}
    )
    pipe = helpers.tiny_pipeline(student="small")
    plain = outputs(pipe.unet)
    pipe.load_lora_weights(remap_lora(lora, helpers.TEACHER_UNET, "small"))
    expected = outputs(build_student(fused(helpers.tiny_pipeline(), dict(lora)), "small"))
    torch.testing.assert_close(outputs(pipe.unet), expected, rtol=1e-4, atol=1e-4)
    assert (plain - expected).abs().max() > 0.01


def test_remap_keeps_the_text_encoder_and_refuses_foreign_names() -> None:
    one = torch.zeros(1)
    lora = {"text_encoder.x": one, "lora_te_y": one, "unet.conv_in.lora_A.weight": one, "unet.mid_block.a.b": one,
            "base_model.model.up_blocks.1.resnets.2.conv1.lora_A.weight": one}  # fmt: skip
    assert list(remap_lora(lora, SD1, "tiny")) == [
        "text_encoder.x",
        "lora_te_y",
        "unet.conv_in.lora_A.weight",
        "unet.up_blocks.0.resnets.1.conv1.lora_A.weight",
    ]
    with pytest.raises(ModelError, match=r"names no layer that sd-tiny keeps .its first name is 'input_blocks"):
        remap_lora({"input_blocks.1.1.x": one}, SD1, "tiny")
