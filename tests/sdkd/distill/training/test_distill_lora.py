"""LoRA files: what diffusers loads is what was trained, whatever rank, alpha, targets and student."""

from __future__ import annotations

from pathlib import Path

import helpers
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from training_runs import unet_output

from sdkd.distill.training.lora import TARGETS, add_lora, lora_metadata, lora_state, save_lora
from sdkd.errors import InputError, ModelError
from sdkd.students.lora_file import read_lora


def adapted(student: str | None, targets: str, dropout: float = 0.0) -> UNet2DConditionModel:
    """A UNet with a LoRA as training leaves it: nothing is zero."""
    unet = helpers.tiny_pipeline(student=student).unet
    generator = torch.Generator().manual_seed(8)
    for parameter in add_lora(unet, rank=3, alpha=5.0, targets=targets, dropout=dropout, seed=4):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return unet.eval()


@pytest.mark.parametrize(
    ("student", "targets", "dropout"), [(None, "all", 0.5), ("sd-small", "attn", 0.0), ("sd-tiny", "attn+ff", 0.0)]
)
def test_loaded_by_diffusers_equals_trained(student: str | None, targets: str, dropout: float, tmp_path: Path) -> None:
    unet = adapted(student, targets, dropout)
    file = save_lora(unet, tmp_path)
    for place in (file, tmp_path):
        state, settings = read_lora(place)
        assert state.keys() == lora_state(unet).keys()
        assert (settings["unet.r"], settings["unet.lora_alpha"]) == (3, 5)
    pipe = helpers.tiny_pipeline(student=student)
    plain = unet_output(pipe.unet)
    pipe.load_lora_weights(tmp_path)
    assert torch.equal(unet_output(pipe.unet), unet_output(unet))  # without dropout, which is for training only
    assert (unet_output(pipe.unet) - plain).abs().max() > 1e-3
    (config,) = pipe.unet.peft_config.values()
    assert (config.r, config.lora_alpha) == (3, 5)
    assert set(config.target_modules) == set(lora_metadata(unet)["unet.target_modules"]) == set(TARGETS[targets])
    loaded = {name for name, _ in pipe.unet.named_parameters() if "lora_" in name}
    assert len(loaded) == len(lora_state(unet))  # every target, not those of one naming style


def test_a_new_adapter_changes_nothing_and_comes_from_its_seed() -> None:
    unet, again, other = (helpers.tiny_unet() for _ in range(3))
    before = unet_output(unet)
    state = torch.get_rng_state()
    parameters = add_lora(unet, rank=2, alpha=2, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(unet_output(unet), before)
    assert sum(parameter.requires_grad for parameter in unet.parameters()) == len(parameters) == 2 * 128
    add_lora(again, rank=2, alpha=2, seed=1)
    other.to(torch.bfloat16)
    assert {parameter.dtype for parameter in add_lora(other, rank=2, alpha=2, seed=2)} == {torch.float32}
    assert other.conv_in.weight.dtype == torch.bfloat16  # updates alone are in float32
    first, same, another = map(lora_state, (unet, again, other))
    assert all(torch.equal(value, same[name]) for name, value in first.items())
    assert not all(torch.equal(value, another[name]) for name, value in first.items())


def test_what_is_no_lora_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"LoRA '.*nothing' does not exist"):
        read_lora(tmp_path / "nothing")
    (tmp_path / "old.ckpt").write_bytes(b"pickle")
    with pytest.raises(InputError, match=r"is a \.ckpt file: only \.safetensors is read"):
        read_lora(tmp_path / "old.ckpt")
    save_file({"conv_in.weight": torch.zeros(1)}, tmp_path / "unet.safetensors")
    with pytest.raises(InputError, match=r"is no LoRA \(first weight: conv_in\.weight\)"):
        read_lora(tmp_path / "unet.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "unet.safetensors").read_bytes()[:20])
    with pytest.raises(InputError, match="cannot be read"):
        read_lora(tmp_path / "cut.safetensors")
    with pytest.raises(InputError, match=r"holds 2 \.safetensors files"):
        read_lora(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("[1", "is not JSON"),
        ("[1]", "is damaged"),
        ("[" * 100_000, "nested too deeply"),
        ('{"unet.r": "x"}', "unet.r is 'x', not a whole number"),
        ('{"unet.lora_alpha": 1e999}', "unet.lora_alpha is inf, not a finite number"),
        ('{"unet.rank_pattern": {"a": "b"}}', "unet.rank_pattern.a is 'b', not a whole number"),
        ('{"text_encoder.target_modules": 5}', "text_encoder.target_modules is 5, not a list or text"),
    ],
)
def test_settings_that_are_none_are_refused(settings: str, message: str, tmp_path: Path) -> None:
    state = {"unet.conv_in.lora_A.weight": torch.ones(1)}
    save_file(state, tmp_path / "odd.safetensors", {"lora_adapter_metadata": settings})
    with pytest.raises(InputError, match=rf"odd\.safetensors' has unusable settings: .*{message}.*; make it again"):
        read_lora(tmp_path / "odd.safetensors")


def test_adapters_that_cannot_be_added_are_refused() -> None:
    unet = helpers.tiny_unet()
    with pytest.raises(InputError, match="lora_targets 'mlp' is unknown: choose one of attn, attn"):
        add_lora(unet, rank=2, alpha=2, targets="mlp")
    with pytest.raises(InputError, match=r"lora_rank 100000 is above what any layer has room for: a rank of 32"):
        add_lora(unet, rank=100_000, alpha=1)
    assert not hasattr(unet, "peft_config")
    assert len(add_lora(unet, rank=32, alpha=1))
    with pytest.raises(ModelError, match="carries an adapter already"):
        add_lora(unet, rank=2, alpha=2)
