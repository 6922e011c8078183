"""Checkpoints in one file: every weight arrives, the family is recognised, and nothing is fetched."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import helpers
import ldm_files
import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from small_families import differing, loaded, mini_models

from sdkd.errors import ModelError
from sdkd.models.generation import Generation
from sdkd.models.resolve import load_component, load_eager, load_rest, resolve

PROMPT = "a photo of a cat"
PARTS = ("unet", "vae", "text_encoder")
UNET = "model.diffusion_model."
CONTEXT = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
SPREAD = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"


@pytest.fixture(autouse=True, scope="module")
def mini() -> Iterator[None]:
    """Published models with narrow modules."""
    with mini_models():
        yield


@pytest.fixture(scope="module")
def pipe(mini: None) -> StableDiffusionPipeline:
    """Read it, do not change it."""
    return load_eager("random:mini")


@pytest.fixture(scope="module")
def whole(pipe: StableDiffusionPipeline) -> dict[str, torch.Tensor]:
    return ldm_files.ldm_state(pipe)


@pytest.fixture
def state(whole: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(whole)


@pytest.mark.parametrize("text", ["clip", "without text_model", "open_clip"])
def test_every_weight_arrives(pipe: StableDiffusionPipeline, text: str, tmp_path: Path) -> None:
    pipe = load_eager("random:mini2base") if text == "open_clip" else pipe
    state = ldm_files.ldm_state(pipe, text == "open_clip")
    if text == "without text_model":
        state = {name.replace(".transformer.text_model.", ".transformer."): value for name, value in state.items()}
    loaded = load_eager(ldm_files.write(tmp_path / "model.safetensors", state))
    assert differing(loaded, pipe, PARTS) == []
    assert type(loaded) is StableDiffusionPipeline
    assert loaded.scheduler.config.prediction_type == "epsilon"
    assert not any(parameter.requires_grad for parameter in loaded.unet.parameters())
    image = loaded(PROMPT, num_inference_steps=1, output_type="np").images
    assert image.shape == (1, 64, 64, 3)


def test_a_guidance_embedding_is_found(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    weight = torch.randn(16, 24)
    for name in ("time_embed", "time_embedding"):
        path = ldm_files.write(
            tmp_path / f"{name}.safetensors", state | {f"model.diffusion_model.{name}.cond_proj.weight": weight}
        )
        unet = load_component(path, "unet")
        assert unet.config.time_cond_proj_dim == resolve(path).unet_config["time_cond_proj_dim"] == 24
        assert torch.equal(unet.time_embedding.cond_proj.weight, weight)
        assert type(load_rest(path).scheduler) is LCMScheduler


def test_a_half_precision_file_loads_in_any_precision(
    pipe: StableDiffusionPipeline, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    half = {name: value.half() for name, value in state.items()}
    path = ldm_files.write(tmp_path / "half.safetensors", half)
    assert torch.equal(load_component(path, "unet").conv_in.weight, pipe.unet.conv_in.weight.half().float())
    assert load_component(path, "vae", torch.bfloat16).dtype == torch.bfloat16
    assert load_component(path, "text_encoder").dtype == torch.float32


def test_the_rest_and_the_config_need_no_weights(
    pipe: StableDiffusionPipeline, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = ldm_files.write(tmp_path / "model.safetensors", state)
    rest = load_rest(path)
    assert rest.unet is rest.vae is rest.text_encoder is None
    assert rest.config["unet"] == ("diffusers", "UNet2DConditionModel")
    assert rest.tokenizer(PROMPT).input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert resolve(path).unet_config["block_out_channels"] == helpers.TEACHER_UNET["block_out_channels"]
    assert resolve(path).unet_config["down_block_types"] == pipe.unet.config.down_block_types
    assert set(resolve(path).digests) == {"text_encoder", "unet", "vae_decoder", "vae_encoder"}


@pytest.mark.parametrize(
    ("channels", "kind"), [(9, "StableDiffusionInpaintPipeline"), (8, "StableDiffusionInstructPix2PixPipeline")]
)
def test_more_input_channels(channels: int, kind: str, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    weight = torch.randn(16, channels, 3, 3)
    state["model.diffusion_model.input_blocks.0.0.weight"] = weight
    loaded = load_eager(ldm_files.write(tmp_path / "model.safetensors", state))
    assert type(loaded).__name__ == kind
    assert loaded.unet.config.in_channels == channels
    assert torch.equal(loaded.unet.conv_in.weight, weight)
    assert loaded.scheduler.config.prediction_type == "epsilon"


def predicted(path: Path) -> tuple[str, str]:
    """What the scheduler says, and the note of why."""
    return load_rest(path).scheduler.config.prediction_type, resolve(path).notes[0]


def test_what_a_checkpoint_predicts(tmp_path: Path) -> None:
    state = ldm_files.ldm_state(load_eager("random:mini2base"), open_clip=True)
    flat = ldm_files.write(tmp_path / "flat.safetensors", state)
    assert predicted(flat)[0] == "epsilon"
    assert "judging by the spread of a weight" in predicted(flat)[1]
    assert resolve(flat).notes[1] == "holds averaged (EMA) weights as well, which are not used"
    spread = state | {SPREAD: torch.tensor([-0.1, 0.1]).repeat(len(state[SPREAD]) // 2)}
    wide = ldm_files.write(tmp_path / "wide.safetensors", spread)
    assert predicted(wide)[0] == "v_prediction"
    said = ldm_files.write(tmp_path / "said.safetensors", spread, {"modelspec.prediction_type": "epsilon"})
    assert predicted(said)[0] == "epsilon"
    assert "the file's metadata" in predicted(said)[1]
    old = ldm_files.write(tmp_path / "old.safetensors", state, {"modelspec.architecture": "stable-diffusion-v2-768-v"})
    assert predicted(old)[0] == "v_prediction"
    marked = ldm_files.write(tmp_path / "marked.safetensors", state | {"v_pred": torch.zeros(0)})
    assert predicted(marked)[0] == "v_prediction"


def test_a_config_beside_the_checkpoint_decides(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = ldm_files.write(tmp_path / "model.safetensors", state, {"modelspec.prediction_type": "epsilon"})
    beside = tmp_path / "model.yaml"
    beside.write_text("model:\n  params:\n    parameterization: v\n")
    assert predicted(path)[0] == "v_prediction"
    assert "says model.yaml" in predicted(path)[1]
    beside.write_text("model:\n  params:\n    timesteps: 1000\n")
    assert predicted(path)[0] == "epsilon"
    beside.write_bytes("model:\r\n  params: {parameterization: v}\r\n".encode("utf-16"))  # as Windows' editor saves
    assert predicted(path)[0] == "v_prediction"
    for text in ("model: [", "model: 3", "model: {params: {parameterization: x0}}", "model: \0"):
        beside.write_text(text)
        with pytest.raises(ModelError, match=r"configuration .*model.yaml', which lies beside .* cannot be read"):
            resolve(path)


def test_missing_and_odd_weights_are_named(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    for name, own in {
        "model.diffusion_model.out.2.bias": "unet lacks 1 of .* .conv_out.bias",
        "first_stage_model.decoder.up.3.block.0.conv1.weight": "vae lacks .* .decoder.up_blocks.0.*conv1.weight",
        "first_stage_model.encoder.down.0.downsample.conv.bias": "vae lacks 1 of .*downsamplers.0.conv.bias",
    }.items():
        rest = {key: value for key, value in state.items() if key != name}
        path = ldm_files.write(tmp_path / "part.safetensors", rest)
        with pytest.raises(ModelError, match=rf"its {own}\): the file is incompl"):
            load_component(path, "text_encoder")

    state["model.diffusion_model.time_embed.0.bias"] = torch.zeros(7)
    message = r"1 of \d+ weights in another shape .* .time_embedding.linear_1.bias: expected \[64\], found \[7\]"
    with pytest.raises(ModelError, match=message):
        load_eager(ldm_files.write(tmp_path / "odd.safetensors", state))


def test_a_missing_part_is_named(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    for part, message in {
        "first_stage_model.": "has no vae .no weight begins with first_stage_model.*: give a checkpoint that holds",
        "cond_stage_model.": "has no text_encoder .no weight begins with cond_stage_model.transformer. or cond_stage",
        "model.diffusion_model.": "is a VAE alone: give the diffusers folder or the whole checkpoint",
    }.items():
        rest = {name: value for name, value in state.items() if not name.startswith(part)}
        with pytest.raises(ModelError, match=message):
            resolve(ldm_files.write(tmp_path / "part.safetensors", rest))


def test_unknown_unets_are_refused(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    first = "model.diffusion_model.input_blocks.0.0.weight"
    for shape, found in {(17, 4, 3, 3): "width 17, text of width 32, 4 ", (16, 7, 3, 3): "width 16, .* 7 "}.items():
        path = ldm_files.write(tmp_path / "odd.safetensors", state | {first: torch.zeros(shape)})
        with pytest.raises(
            ModelError, match=rf"has an unknown UNet \({found}input channels\): sdkd knows width 16 with text of"
        ):
            resolve(path)
    for name, shape in {first: (64,), CONTEXT: ()}.items():
        path = ldm_files.write(tmp_path / "flat.safetensors", state | {name: torch.zeros(shape)})
        with pytest.raises(ModelError, match=rf"its weight {name} has shape \[.*\], not [24] axes: sdkd works on"):
            resolve(path)
    path = ldm_files.write(
        tmp_path / "unclip.safetensors", state | {"model.diffusion_model.label_emb.0.0.weight": torch.zeros(1)}
    )
    with pytest.raises(ModelError, match="is unCLIP, whose UNet takes image embeddings as well: sdkd works on"):
        resolve(path)


def test_sdxl(tmp_path: Path) -> None:
    pipe = load_eager("random:minixl")
    state = ldm_files.sdxl_state(pipe)
    path = ldm_files.write(tmp_path / "xl.safetensors", state)
    assert differing(loaded(path), pipe, (*PARTS, "text_encoder_2")) == []
    rest = load_rest(path)
    assert type(rest) is StableDiffusionXLPipeline
    assert (rest.scheduler.config.prediction_type, rest.scheduler.config.rescale_betas_zero_snr) == ("epsilon", False)
    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    rest = load_rest(ldm_files.write(tmp_path / "v.safetensors", state | marks))
    assert (rest.scheduler.config.prediction_type, rest.scheduler.config.rescale_betas_zero_snr) == (
        "v_prediction",
        True,
    )
    few = ldm_files.write(tmp_path / "sdxl_lightning_2step.safetensors", state)
    assert resolve(few).generation == Generation(2, 1.0)
    scheduler = load_rest(few).scheduler
    assert (type(scheduler).__name__, scheduler.config.timestep_spacing) == ("EulerDiscreteScheduler", "trailing")
    for missing, message in {
        "conditioner.embedders.1.": r"has no text_encoder_2 \(no weight begins with conditioner.embedders.1.model.\)",
        "conditioner.embedders.0.": "has no text_encoder .no weight begins with conditioner.embedders.0.transformer.",
        f"{UNET}label_emb.0.2.bias": "its unet lacks 1 of .* .add_embedding.linear_2.bias",
        f"{UNET}output_blocks.8.": r"its UNet has blocks of \[2, 2, 2\] layers down and \[3, 3, 2\] up",
    }.items():
        rest_of = {name: value for name, value in state.items() if not name.startswith(missing)}
        with pytest.raises(ModelError, match=message):
            load_component(ldm_files.write(tmp_path / "part.safetensors", rest_of), "unet")


def test_the_refiner_and_other_widths_are_refused(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    refiner = {f"{UNET}input_blocks.0.0.weight": torch.zeros(384, 4, 3, 3), CONTEXT: torch.zeros(384, 1280)}
    with pytest.raises(ModelError, match="is SDXL's refiner, which draws an image's last steps alone: give the base"):
        resolve(ldm_files.write(tmp_path / "refiner.safetensors", refiner))
    wide = state | {f"{UNET}input_blocks.4.0.in_layers.2.weight": torch.zeros(24, 16, 3, 3),
                    f"{UNET}input_blocks.5.0.in_layers.2.weight": torch.zeros(24, 24, 3, 3)}  # fmt: skip
    with pytest.raises(
        ModelError, match=r"levels of widths \(16, 24, 32, 32\), a published one has \(16, 32, 32, 32\)"
    ):
        resolve(ldm_files.write(tmp_path / "wide.safetensors", wide))


FULL_SIZE = {"sd15": ("epsilon", 49407), "sd21base": ("epsilon", 0), "sd21": ("v_prediction", 0)}


@pytest.mark.slow
@pytest.mark.parametrize("family", FULL_SIZE)
def test_full_size_in_half_precision(family: str, tmp_path: Path) -> None:
    kind, pad = FULL_SIZE[family]
    pipe = load_eager(f"random:{family}", torch.float16)
    state = ldm_files.ldm_state(pipe, open_clip=family != "sd15")
    if kind == "v_prediction":
        state[SPREAD] = torch.tensor([-0.1, 0.1], dtype=torch.float16).repeat(160)
        pipe.unet.up_blocks[3].attentions[2].transformer_blocks[0].norm1.bias.data = state[SPREAD]
    path = ldm_files.write(tmp_path / "model.safetensors", state)
    del state
    loaded = load_eager(path, torch.float16)
    assert differing(loaded, pipe, PARTS) == []
    assert loaded.unet.config.sample_size == (96 if kind == "v_prediction" else 64)
    assert loaded.scheduler.config.prediction_type == kind
    ids = loaded.tokenizer(PROMPT, padding="max_length", max_length=77).input_ids
    assert ids[:8] == [49406, 320, 1125, 539, 320, 2368, 49407, pad]
    assert loaded.text_encoder(torch.tensor([ids])).last_hidden_state.isfinite().all()
