"""Students of SDXL: counts, configs, weights, feature pairs, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from small_sdxl_unet import POOLED, SDXL_UNET, sdxl_output, small_sdxl_unet

from sdkd.distill import TrainConfig
from sdkd.distill.training.pairs import feature_pairs
from sdkd.errors import InputError, ModelError
from sdkd.families import FAMILIES, SDXL, STUDENTS
from sdkd.families.sdxl import UNET
from sdkd.students.blocks import (
    build_student,
    check_teacher,
    count_macs,
    count_parameters,
    full_config,
    key_map,
    student_config,
    student_names,
    student_spec,
    teacher_key,
    teacher_layout,
)
from sdkd.students.layout import depths

SD1: dict[str, Any] = {"cross_attention_dim": 768, "attention_head_dim": 8}
NAMES = tuple(spec.name for spec in SDXL.students)
PARAMETERS = {
    "ssd-1b": 1_331_334_404, "vega": 745_225_604, "koala-1b": 1_161_184_324, "koala-700m": 782_822_724,
}  # fmt: skip
GMACS = {"ssd-1b": 2104, "vega": 1411, "koala-1b": 1716, "koala-700m": 1351}
# Transformer blocks of every attention: down, mid, up, from the published configs.
BLOCKS: dict[str, tuple[list[list[int]], list[int], list[list[int]]]] = {
    "ssd-1b": ([[], [2, 2], [4, 4]], [], [[4, 4, 10], [2, 1, 1], []]),
    "vega": ([[], [1, 1], [2, 2]], [], [[2, 2, 2], [1, 1, 1], []]),
    "koala-1b": ([[], [2], [6]], [6], [[6, 6], [2, 2], []]),
    "koala-700m": ([[], [2], [5]], [], [[5, 5], [2, 2], []]),
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "ssd-1b": {
        "mid_block_type": "UNetMidBlock2D", "transformer_layers_per_block": [1, [2, 2], [4, 4]],
        "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
    },
    "vega": {"mid_block_type": "UNetMidBlock2D", "transformer_layers_per_block": [1, 1, 2]},
    "koala-1b": {"layers_per_block": 1, "transformer_layers_per_block": [1, 2, 6]},
    "koala-700m": {"layers_per_block": 1, "transformer_layers_per_block": [1, 2, 5], "mid_block_type": None},
}  # fmt: skip


def test_parameter_counts_are_the_published_ones() -> None:
    assert {name: count_parameters(student_config(UNET, name)) for name in NAMES} == PARAMETERS


@pytest.mark.slow
def test_parameters_and_macs_of_the_teacher() -> None:
    assert count_parameters(UNET) == 2_567_463_684
    assert round(count_macs(UNET) / 1e9) == 3381


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name.endswith("-1b") else []) for name in NAMES]
)
def test_macs_at_1024_pixels(name: str) -> None:
    assert round(count_macs(student_config(UNET, name)) / 1e9) == GMACS[name]


@pytest.mark.parametrize("name", NAMES)
def test_config_is_the_published_one(name: str) -> None:
    config = student_config(UNET, name)
    assert config == full_config({**UNET, **PUBLISHED[name]})
    assert student_names(PUBLISHED[name] | {key: list(config[key]) for key in ("down_block_types", "up_block_types")}
                         | {"addition_embed_type": "text_time"}) == (name,)  # fmt: skip
    assert (student_names(UNET), student_names(UNET | {"transformer_layers_per_block": 3})) == ((), ())
    down, mid, up = BLOCKS[name]
    assert sum(depths(config).values()) == sum(map(sum, (*down, mid, *up)))
    layout = teacher_layout(config)
    assert {key: layout[key] for key in UNET} == {**UNET}
    assert key_map(layout, name) == key_map(UNET, name)


def removed(teacher: UNet2DConditionModel, name: str) -> UNet2DConditionModel:
    """The same student made another way: by deleting modules of a copy of the teacher."""
    unet = copy.deepcopy(teacher)
    down, mid, up = BLOCKS[name]
    thin = name.startswith("koala")
    for blocks, kept in ((unet.down_blocks, down), (unet.up_blocks, up)):
        for block, attentions in zip(blocks, kept, strict=True):
            if thin:
                del block.resnets[1]
            if attentions:
                if thin:
                    del block.attentions[1]
                for attention, count in zip(block.attentions, attentions, strict=True):
                    del attention.transformer_blocks[count:]
    if mid:
        del unet.mid_block.attentions[0].transformer_blocks[mid[0] :]
    elif thin:
        unet.mid_block = None
    else:
        del unet.mid_block.attentions[0], unet.mid_block.resnets[1]
    return unet


@pytest.fixture(scope="module")
def teacher() -> UNet2DConditionModel:
    return small_sdxl_unet()


@pytest.mark.parametrize("name", NAMES)
def test_student_equals_the_teacher_with_modules_removed_also_when_saved(
    name: str, teacher: UNet2DConditionModel, tmp_path: Path
) -> None:
    student = build_student(teacher, name)
    expected, weights = sdxl_output(removed(teacher, name)), teacher.state_dict()
    assert expected.std() > 0.01
    torch.testing.assert_close(sdxl_output(student), expected, rtol=1e-5, atol=1e-5)
    modules = key_map(teacher.config, name)
    for key, value in student.state_dict().items():
        assert torch.equal(value, weights[teacher_key(key, modules)])
    student.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path)
    torch.testing.assert_close(sdxl_output(loaded), expected, rtol=1e-4, atol=1e-4)
    assert student_names(loaded.config) == (name,)


def test_the_last_up_layer_and_the_first_transformer_blocks_are_kept(teacher: UNet2DConditionModel) -> None:
    modules = key_map(teacher.config, "koala-700m")
    names = {
        "up_blocks.0.attentions.1.transformer_blocks.4.norm1.bias": "up_blocks.0.attentions.2.transformer_blocks.4",
        "up_blocks.0.attentions.1.proj_out.weight": "up_blocks.0.attentions.2.proj_out",
        "down_blocks.1.attentions.0.norm.bias": "down_blocks.1.attentions.0",
    }
    for own, of in names.items():
        assert teacher_key(own, modules).startswith(of)
    assert modules["down_blocks.1.attentions.0"] == "down_blocks.1.attentions.0"  # all of its blocks
    assert not [own for own in modules if "mid_block" in own]


def test_macs_take_the_conditions_and_their_width() -> None:
    config = SDXL_UNET | {"sample_size": 4, "transformer_layers_per_block": 1}
    wider = config | {"projection_class_embeddings_input_dim": POOLED + 1 + 6 * 8}
    embedding = 4 * config["block_out_channels"][0]
    assert count_macs(wider, batch=3) - count_macs(config, batch=3) == 3 * embedding


@pytest.mark.parametrize(
    ("config", "student", "message"),
    [
        (SD1, "ssd-1b", r"^ssd-1b is a student of SDXL, and this UNet is one of Stable Diffusion .*, whose .*tiny"),
        (UNET, "tiny", r"^sd-tiny is a student of Stable Diffusion .*, and this UNet is one of SDXL, .*vega"),
        (
            UNET | {"transformer_layers_per_block": (1, 2, 4)},
            "ssd-1b",
            r"made from 10 transformer blocks of up_blocks\.0\.attentions\.2, and this teacher has 4 there",
        ),
        (UNET | {"transformer_layers_per_block": (1, 1, 10)}, "koala-1b", r"2 transformer blocks of down_blocks\.1"),
        (UNET | {"mid_block_type": None}, "vega", "not a complete UNet of SDXL. mid_block_type: .*, found None"),
        (UNET | {"attention_head_dim": (5, 10)}, "vega", "attention_head_dim: expected 3 levels, found 2"),
    ],
)
def test_other_teachers_are_refused(config: dict[str, Any], student: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        check_teacher(config, student)
    with pytest.raises(ModelError, match=message):
        student_config(config, student)


def test_a_shallow_teacher_has_the_students_that_it_is_deep_enough_for() -> None:
    shallow = SDXL_UNET | {"transformer_layers_per_block": (1, 1, 2)}
    assert depths(student_config(shallow, "vega"))["up_blocks.0.attentions.2"] == 2
    assert key_map(shallow, "vega")["up_blocks.0.attentions.2"] == "up_blocks.0.attentions.2"


@pytest.mark.parametrize("name", NAMES)
def test_a_student_is_no_teacher(name: str) -> None:
    with pytest.raises(ModelError, match="looks like a student already"):
        check_teacher(student_config(UNET, name), "vega")
    assert student_spec(name.upper()).name == name


def test_names_of_students_tell_their_families() -> None:
    assert {spec.family for spec in STUDENTS.values()} == {family.name for family in FAMILIES}
    assert sum(len(family.students) for family in FAMILIES) == len(STUDENTS)
    for family in FAMILIES:
        assert {spec.family for spec in family.students} == {family.name}
        assert family.teacher["addition_embed_type"] == family.addition


@pytest.mark.parametrize("name", NAMES)
def test_feature_pairs_have_equal_shapes(name: str, teacher: UNet2DConditionModel) -> None:
    pairs, student = feature_pairs(name), build_student(teacher, name)
    assert pairs == feature_pairs(name, student_spec(name).pairs)
    assert shapes(teacher, [pair[0] for pair in pairs]) == shapes(student, [pair[1] for pair in pairs])
    with pytest.raises(InputError, match=rf"pairs 'bk-sdm' are of students of Stable Diffusion .*: {name} has"):
        TrainConfig(student=name, pairs="bk-sdm")


def shapes(unet: UNet2DConditionModel, names: list[str]) -> list[torch.Size]:
    found: dict[str, torch.Size] = {}

    def keep(name: str) -> Any:
        return lambda _, __, output: found.update({name: (output[0] if isinstance(output, tuple) else output).shape})

    handles = [unet.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    sdxl_output(unet)
    for handle in handles:
        handle.remove()
    return [found[name] for name in names]


def test_pairs_are_those_of_the_trainers() -> None:
    """Segmind's distill_sdxl.py: 2 and 3 resnets of 3 blocks each, 2 and 3 attentions of two, and the middle block."""
    pairs = feature_pairs("ssd-1b")
    assert len(pairs) == 6 + 4 + 9 + 6 + 1
    assert pairs[-1] == ("mid_block", "mid_block")
    assert len(feature_pairs("koala-1b")) == sum(map(sum, BLOCKS["koala-1b"][0])) + 6 + sum(
        map(sum, BLOCKS["koala-1b"][2])
    )
    block = "transformer_blocks.4.attn1"
    assert (f"up_blocks.0.attentions.2.{block}", f"up_blocks.0.attentions.1.{block}") in feature_pairs("koala-700m")
