"""LoRA files: what diffusers loads is what was trained, whatever rank, alpha, targets and student."""

from __future__ import annotations

from pathlib import Path

import helpers
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

from sdkd.distill.training.lora import TARGETS, add_lora, lora_metadata, lora_state, read_lora, save_lora
from sdkd.errors import InputError, ModelError


def output(unet: UNet2DConditionModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    sample, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 32, generator=generator)
    with torch.no_grad():
        found: torch.Tensor = unet(sample, torch.tensor([10, 700]), encoder_hidden_states=text).sample
    return found


def adapted(student: str | None, targets: str, rank: int = 3, alpha: float = 5.0) -> UNet2DConditionModel:
    """A UNet with a LoRA as training leaves it: nothing is zero."""
    unet = helpers.tiny_pipeline(student=student).unet
    parameters = add_lora(unet, rank=rank, alpha=alpha, targets=targets, seed=4)
    generator = torch.Generator().manual_seed(8)
    for parameter in parameters:
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return unet


@pytest.mark.parametrize(("student", "targets"), [(None, "all"), ("sd-small", "attn"), ("sd-tiny", "attn+ff")])
def test_loaded_by_diffusers_equals_trained(student: str | None, targets: str, tmp_path: Path) -> None:
    unet = adapted(student, targets)
    save_lora(unet, tmp_path)
    pipe = helpers.tiny_pipeline(student=student)
    plain = output(pipe.unet)
    pipe.load_lora_weights(tmp_path)
    assert torch.equal(output(pipe.unet), output(unet))
    assert (output(pipe.unet) - plain).abs().max() > 1e-3
    (config,) = pipe.unet.peft_config.values()
    assert (config.r, config.lora_alpha) == (3, 5)
    assert set(config.target_modules) == set(TARGETS[targets])
    loaded = {name for name, _ in pipe.unet.named_parameters() if "lora_" in name}
    assert len(loaded) == len(lora_state(unet))  # every target, not those of one naming style


def test_dropout_is_for_training_only(tmp_path: Path) -> None:
    unet = helpers.tiny_unet()
    generator = torch.Generator().manual_seed(8)
    for parameter in add_lora(unet, rank=2, alpha=4, targets="all", dropout=0.5):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    unet.eval()
    save_lora(unet, tmp_path)
    pipe = helpers.tiny_pipeline()
    pipe.load_lora_weights(tmp_path)
    assert torch.equal(output(pipe.unet), output(unet))


def test_a_new_adapter_changes_nothing_and_comes_from_its_seed() -> None:
    unet = helpers.tiny_unet()
    before = output(unet)
    state = torch.get_rng_state()
    parameters = add_lora(unet, rank=2, alpha=2, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(output(unet), before)
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    assert sum(parameter.requires_grad for parameter in unet.parameters()) == len(parameters) == 2 * 128
    same, other = (helpers.tiny_unet() for _ in range(2))
    add_lora(same, rank=2, alpha=2, seed=1)
    add_lora(other, rank=2, alpha=2, seed=2)
    first, again, another = map(lora_state, (unet, same, other))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not all(torch.equal(value, another[name]) for name, value in first.items())


def test_half_precision_base_keeps_float32_updates() -> None:
    unet = helpers.tiny_unet().to(torch.bfloat16)
    assert {parameter.dtype for parameter in add_lora(unet, rank=2, alpha=2)} == {torch.float32}
    assert unet.conv_in.weight.dtype == torch.bfloat16


def test_read_gives_back_weights_and_settings(tmp_path: Path) -> None:
    unet = adapted("tiny", "attn+ff")
    file = save_lora(unet, tmp_path)
    for place in (file, tmp_path):
        state, settings = read_lora(place)
        assert state.keys() == lora_state(unet).keys()
        assert (settings["unet.r"], settings["unet.lora_alpha"]) == (3, 5)
    assert lora_metadata(unet)["unet.target_modules"] == sorted(TARGETS["attn+ff"])


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


def test_a_second_adapter_and_unknown_targets_are_refused() -> None:
    unet = helpers.tiny_unet()
    with pytest.raises(InputError, match="lora_targets 'mlp' is unknown: choose one of attn, attn"):
        add_lora(unet, rank=2, alpha=2, targets="mlp")
    add_lora(unet, rank=2, alpha=2)
    with pytest.raises(ModelError, match="carries an adapter already"):
        add_lora(unet, rank=2, alpha=2)
