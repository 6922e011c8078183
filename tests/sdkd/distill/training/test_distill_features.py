"""Feature pairs fit every student and preset; features leave through the forward pass and nothing stays behind."""

from __future__ import annotations

from functools import cache
from typing import Any

import helpers
import pytest
import torch

from sdkd.distill.training.features import FeatureUNet
from sdkd.distill.training.pairs import PAIRS, feature_pairs
from sdkd.students.blocks import STUDENTS, build_student, meta_unet, student_config

# Full-size shapes on the meta device: no memory, no time.
FAMILIES: dict[str, dict[str, Any]] = {
    "sd1": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2": {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
}


@cache
def shapes(family: str, student: str | None) -> dict[str, torch.Size]:
    """Shape of every feature that any pair names, of a family's teacher or student."""
    config = FAMILIES[family] if student is None else student_config(FAMILIES[family], student)
    unet = meta_unet(config)
    known = {name for name, _ in unet.named_modules()}
    pairs = [pair for preset in PAIRS.values() for group in preset.values() for pair in group]
    names = sorted({name for pair in pairs for name in pair} & known)
    with torch.device("meta"), torch.no_grad():
        inputs = torch.empty(2, 4, 64, 64), torch.ones(2), torch.empty(2, 77, unet.config.cross_attention_dim)
        _, found = FeatureUNet(unet, names)(*inputs)
    return {name: feature.shape for name, feature in zip(names, found, strict=True)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("preset", PAIRS)
@pytest.mark.parametrize("student", STUDENTS)
def test_pairs_have_equal_shapes(student: str, preset: str, family: str) -> None:
    pairs, taught, learnt = feature_pairs(student, preset), shapes(family, None), shapes(family, student)
    assert [taught[name] for name, _ in pairs] == [learnt[name] for _, name in pairs]
    assert taught[pairs[0][0]] == (2, 320, 32, 32)


@pytest.mark.parametrize(
    ("student", "preset", "count"),
    [
        ("small", "segmind", 9),
        ("small", "bk-sdm", 8),
        ("bk-small", "bk-sdm", 8),
        ("tiny", "segmind", 6),
        ("tiny", "bk-sdm", 6),
    ],
)
def test_number_of_pairs(student: str, preset: str, count: int) -> None:
    assert len(feature_pairs(student, preset)) == count


def test_presets_differ_where_the_trainers_differ() -> None:
    assert ("mid_block", "mid_block") in feature_pairs("small")
    assert ("mid_block", "mid_block") not in feature_pairs("bk-base")
    assert ("up_blocks.0", "down_blocks.2") in feature_pairs("tiny")
    assert ("down_blocks.2.attentions.1.proj_out", "down_blocks.2.attentions.0.proj_out") in feature_pairs("bk-tiny")


def run(model: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    sample, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 32, generator=generator)
    return model(sample, torch.tensor([1, 2]), encoder_hidden_states=text)


def test_output_is_the_unets_and_features_are_in_order() -> None:
    unet = build_student(helpers.tiny_unet(), "tiny")
    names = ["up_blocks.2", "down_blocks.0", "down_blocks.2.attentions.0.proj_out"]
    model = FeatureUNet(unet, names)
    output, found = run(model)
    assert torch.equal(output, run(unet).sample)
    assert [tuple(feature.shape) for feature in found] == [(2, 16, 8, 8), (2, 16, 4, 4), (2, 32, 2, 2)]
    assert all(feature.requires_grad for feature in found)


def test_nothing_stays_alive_between_calls() -> None:
    unet = helpers.tiny_unet()
    model = FeatureUNet(unet, ["mid_block"])
    assert torch.equal(run(model)[1][0], run(model)[1][0])
    assert not model._found
    model.close()
    assert not any(module._forward_hooks for module in unet.modules())


def test_gradient_checkpointing_gives_the_same_features() -> None:
    unet = build_student(helpers.tiny_unet(), "small").train()
    plain = run(FeatureUNet(unet, ["up_blocks.1"]))[1][0]
    unet.enable_gradient_checkpointing()
    found = run(FeatureUNet(unet, ["up_blocks.1"]))[1]
    assert len(found) == 1
    torch.testing.assert_close(found[0], plain)
    found[0].sum().backward()
    assert unet.conv_in.weight.grad is not None
