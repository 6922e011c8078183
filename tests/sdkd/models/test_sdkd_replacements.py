"""Another VAE in place of a model's own: what fits, what is refused, and what it is known by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
import training_runs
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from training_runs import SMALL_VAE, small_vae

from sdkd.core.files import write_json
from sdkd.errors import InputError, ModelError
from sdkd.models.kinds import BundleSource
from sdkd.models.replacements import check_vae, load_replacement, with_vae
from sdkd.models.resolve import load_eager, resolve

UNET = {"out_channels": 4}


def test_a_model_with_another_vae_is_that_model_but_for_it() -> None:
    base = resolve(str(training_runs.teacher()))
    found = with_vae(base, str(small_vae()))
    assert with_vae(base, None) is base
    pipe, own = load_eager(found), load_eager(base)
    assert type(pipe.vae) is AutoencoderTiny
    expected = load_file(small_vae() / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, expected[name]) for name, value in pipe.vae.state_dict().items())
    assert torch.equal(pipe.unet.conv_in.weight, own.unet.conv_in.weight)
    assert pipe.config.vae == ("diffusers", "AutoencoderTiny")
    assert found.native_size == (64, 64)
    changed = {name for name, digest in found.digests.items() if digest != base.digests[name]}
    assert changed == {"vae_decoder", "vae_encoder"}
    drawn = load_replacement("vae", "random:taesd", torch.float16)
    assert drawn.num_parameters() == 2_445_063  # TAESD's: 1,222,532 + 1,222,531
    assert drawn.dtype == torch.float16
    assert with_vae(base, "random:taesd").random_weights


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        (AutoencoderTiny, SMALL_VAE | {"latent_channels": 16}, "number of latent channels is 16, the model needs 4"),
        (AutoencoderTiny, SMALL_VAE | {"scaling_factor": 0.3}, "scaling factor is 0.3, the model needs 1"),
        (AutoencoderTiny, SMALL_VAE | {"out_channels": 1}, "number of image channels is 1, the model needs 3"),
        (AutoencoderTiny, {name: value[:3] for name, value in SMALL_VAE.items()}, "per latent is 4, the model .* 8"),
        (AutoencoderKL, helpers.VAE | {"scaling_factor": 0.13025}, r"factor is 0\.13025, the model needs 0\.5"),
        (AutoencoderKL, helpers.VAE | {"shift_factor": 0.1}, r"shift factor is 0\.1, the model needs 0"),
    ],
)
def test_a_vae_of_other_latents_is_refused(kind: Any, settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    kind(**settings).save_config(tmp_path)  # refused before weights are looked for
    with pytest.raises(ModelError, match=f"does not fit the UNet: its .*{words}: give a VAE that was made for"):
        check_vae(str(tmp_path), UNET, helpers.VAE)


def test_scaling_factors_that_fit(tmp_path: Path) -> None:
    for name, settings in (("own", {}), ("scaled", {"scaling_factor": 1.0}), ("raw", {"scaling_factor": 0.5})):
        kind, common = (AutoencoderKL, helpers.VAE) if name == "own" else (AutoencoderTiny, SMALL_VAE)
        kind(**(common | settings)).save_config(tmp_path / name)
        check_vae(str(tmp_path / name), UNET, helpers.VAE)
    AutoencoderKL(**helpers.VAE | {"scaling_factor": 0.2}).save_config(tmp_path / "other")
    check_vae(str(tmp_path / "other"), UNET, SMALL_VAE)  # none knows what such a UNet was trained with
    write_json(tmp_path / "scaled" / "sdkd.json", {"objective": "vae-distill", "teacher_scaling_factor": 0.18215})
    with pytest.raises(ModelError, match=r"its teacher's scaling factor is 0\.18215, the model needs 0\.5"):
        check_vae(str(tmp_path / "scaled"), UNET, helpers.VAE)


def test_what_is_no_whole_vae_is_refused(tmp_path: Path) -> None:
    base = resolve(str(training_runs.teacher()))
    vae = helpers.fixed_weights(AutoencoderTiny(**SMALL_VAE), 3)
    vae.save_pretrained(tmp_path / "half")
    file = tmp_path / "half" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file({name: value for name, value in weights.items() if name.startswith("decoder.")}, file)
    with pytest.raises(ModelError, match="is a decoder without its encoder, which image-to-image and inpainting need"):
        with_vae(base, str(tmp_path / "half"))
    weights.pop("decoder.layers.0.weight")
    save_file(weights, file)
    with pytest.raises(ModelError, match=r"half' lacks 1 of \d+ weights \(decoder\.layers\.0\.weight\)"):
        with_vae(base, str(tmp_path / "half"))
    UNet2DConditionModel(**helpers.TEACHER_UNET).save_config(tmp_path / "unet")
    with pytest.raises(ModelError, match="is a UNet2DConditionModel: give one of AutoencoderKL, AutoencoderTiny"):
        with_vae(base, str(tmp_path / "unet"))
    bundle = BundleSource("my bundle", tmp_path, find=resolve)
    with pytest.raises(InputError, match=r"is a bundle and has its VAE in it: leave --vae demo out, or give the model"):
        with_vae(bundle, "demo")
