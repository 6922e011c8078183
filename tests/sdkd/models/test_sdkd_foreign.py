"""What is not a model is refused before anything is loaded; what is one is read as the library reads it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import helpers
import ldm_files
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionInstructPix2PixPipeline, StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from sdkd.errors import ModelError
from sdkd.models import safetensors_file as weights
from sdkd.models.diffusers_folder import component_digest, write_pipeline
from sdkd.models.resolve import load_component, load_eager, resolve
from sdkd.models.safetensors_file import Weights

WEIGHTS = "diffusion_pytorch_model.safetensors"
LORA = r"is a LoRA, not a model: give its base model, and the LoRA with --lora \(sdkd export, sdkd build-engine\)"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("foreign") / "model"
    write_pipeline(helpers.tiny_pipeline(), path)
    return path


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def one(name: str, *shape: int) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(shape or (1,))}


def controlnet() -> ControlNetModel:
    return ControlNetModel.from_unet(helpers.tiny_unet())


def peft_lora() -> dict[str, torch.Tensor]:
    unet = helpers.tiny_unet()
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    return {f"unet.{name}": value for name, value in get_peft_model_state_dict(unet).items()}


FILES: dict[str, tuple[Any, str]] = {
    "peft-lora": (peft_lora, LORA),
    "kohya-lora": (lambda: one("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"), LORA),
    "kohya-text-lora": (lambda: one("lora_te_text_model_encoder_layers_0_mlp_fc1.alpha"), LORA),
    "old-lora": (lambda: one("unet.down_blocks.0.attn1.processor.to_q_lora.down.weight"), LORA),
    "lycoris": (lambda: one("layer.hada_w1_a"), LORA),
    "vae": (lambda: helpers.tiny_vae().state_dict(), "is a VAE alone: give the diffusers folder or the whole"),
    "ldm-vae": (lambda: ldm_files.vae_state(helpers.tiny_vae()), "is a VAE alone"),
    "ema": (lambda: ldm_files.vae_state(helpers.tiny_vae()) | one("model_ema.diffusion_modelinput_blocks00weight"),
            r"holds averaged \(EMA\) weights of its UNet alone .*: give the checkpoint that has model.diffusion_model"),
    "unet": (lambda: helpers.tiny_unet().state_dict(), "is a UNet alone"),
    "bare-unet": (lambda: one("input_blocks.0.0.weight"), "is a UNet alone"),
    "text-encoder": (lambda: helpers.tiny_text_encoder().state_dict(), "is a text encoder alone"),
    "controlnet": (lambda: controlnet().state_dict(), "is a ControlNet, not a model: give its base model"),
    "ldm-controlnet": (lambda: one("control_model.time_embed.0.weight"), "is a ControlNet, not a model"),
    "embedding": (lambda: one("<cat-toy>", 1, 768), "is a textual-inversion embedding, not a model: .*load_"),
    "embedding-of-two": (lambda: one("emb_params", 4, 1024), "is a textual-inversion embedding"),
    "sdxl": (lambda: one("conditioner.embedders.1.model.ln_final.weight"), "is a text encoder alone"),
    "flux": (lambda: one("double_blocks.0.img_attn.norm.key_norm.scale"), r"is not for Stable .*Flux.*: sdkd works on"),
    "sd3": (lambda: one("model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.bias"), "is not for Stable .* alone"),
    "motion": (lambda: one("down_blocks.0.motion_modules.0.norm.bias"), "is not for Stable Diffusion alone"),
    "other": (lambda: one("model.diffusion_model.layers.0.x"), "holds another architecture: sdkd works on"),
    "nothing": (dict, r"holds no Stable Diffusion UNet \(its first weight is none\): give a whole checkpoint"),
}  # fmt: skip


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    for name, (make, message) in FILES.items():
        path = ldm_files.write(tmp_path / f"{name}.safetensors", make())
        with pytest.raises(ModelError, match=rf"checkpoint '.*{name}.safetensors' {message}"):
            resolve(path)


def test_pickles_are_not_read_and_the_conversion_that_is_named_works(tmp_path: Path) -> None:
    state = ldm_files.ldm_state(helpers.tiny_pipeline())
    for suffix in (".ckpt", ".pt", ".bin", ".pth", ""):
        torch.save({"state_dict": state}, tmp_path / f"model{suffix}")
        with pytest.raises(
            ModelError, match=r"only .safetensors is read .pickles can run code on loading.; convert it"
        ):
            resolve(tmp_path / f"model{suffix}")
    save_file(torch.load(tmp_path / "model.ckpt", weights_only=True)["state_dict"], tmp_path / "new.safetensors")
    with pytest.raises(ModelError, match=r"has an unknown UNet .width 16"):  # that is: it was read and recognised
        resolve(tmp_path / "new.safetensors")


@pytest.mark.parametrize("kind", ["StableDiffusion3Pipeline", "FluxPipeline", "AuraFlowPipeline"])
def test_a_folder_of_another_pipeline(kind: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    with pytest.raises(ModelError, match=rf"holds an? {kind}: sdkd works on Stable Diffusion 1.x, 2.x and SDXL, th"):
        resolve(tmp_path)


def test_folders_that_are_no_pipelines(folder: Path, tmp_path: Path) -> None:
    controlnet().save_pretrained(tmp_path / "controlnet")
    for name in ("lora", "adapter", "embedding", "empty"):
        (tmp_path / name).mkdir()
    save_file(peft_lora(), tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "embedding" / "learned_embeds.bin").write_bytes(b"")
    for path, message in {
        tmp_path / "controlnet": "is a ControlNet, not a model",
        tmp_path / "lora": LORA,
        tmp_path / "adapter": LORA,
        tmp_path / "embedding": "is a textual-inversion embedding",
        tmp_path / "empty": "is not a diffusers pipeline .no model_index.json.: give the folder that",
        folder / "unet": "holds a UNet2DConditionModel alone, a part of a pipeline: give the folder above it",
        folder / "text_encoder": "holds a CLIPTextModel alone",
    }.items():
        with pytest.raises(ModelError, match=message):
            resolve(path)


def test_a_folder_with_pickled_weights_only(folder: Path) -> None:
    weights, before = folder / "unet" / WEIGHTS, resolve(folder).digests
    torch.save(helpers.tiny_unet().state_dict(), weights.with_suffix(".bin"))
    assert resolve(folder).digests == before  # the pickle beside is not looked at
    weights.unlink()
    message = r"unet' holds pickled weights only \(diffusion_pytorch_model.bin\), which can run .*from_pretrained"
    with pytest.raises(ModelError, match=message):
        resolve(folder)
    with pytest.raises(ModelError, match=message):
        component_digest(folder / "unet")
    StableDiffusionPipeline.from_pretrained(folder).save_pretrained(folder / "new")  # as the message says
    assert torch.equal(load_component(folder / "new", "unet").conv_in.weight, helpers.tiny_unet().conv_in.weight)


def test_weights_that_are_not_there_or_end_too_early(folder: Path) -> None:
    weights = folder / "unet" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1])
    size = weights.stat().st_size
    with pytest.raises(ModelError, match=rf"is cut off: {size} of {size + 1} bytes; download or save it again"):
        resolve(folder)
    weights.rename(weights.with_name("other.safetensors"))
    with pytest.raises(ModelError, match=r"holds other.safetensors alone, none of which is named diffusion_"):
        resolve(folder)
    (folder / "unet" / "other.safetensors").unlink()
    with pytest.raises(ModelError, match="holds no weights: nothing there is named"):
        resolve(folder)


def headed(text: bytes, length: int | None = None) -> bytes:
    return (len(text) if length is None else length).to_bytes(8, "little") + text


def row(offsets: list[Any]) -> bytes:
    return headed(json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": offsets}}).encode()) + b"\0" * 8


HEADER = "is damaged: its header is not that of a safetensors file"
DAMAGE = {
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n": "is a Git LFS pointer, not",
    b"": "is cut off or damaged: its 0 bytes do not hold",
    b"123": "is cut off or damaged: its 3 bytes",
    headed(b"{}", 10**6): "is cut off or damaged: its 10 bytes",
    b"PK\x03\x04" + b"\0" * 100: "is a pickle under a .safetensors name, which can run code",
    b"<!DOCTYPE html><html></html>" + b" " * 100: "is a web page, not weights: download it again",
    **dict.fromkeys([headed(b"{{{{"), headed(b"[" * 10**5), headed(b"[]"), headed(b'{"a": 1}')], HEADER),
    **{row(offsets): HEADER for offsets in ([0, 5], [-4, 0], [4, 0], [0, 1e400], ["a", "b"], [0])},
}


def test_damaged_weights(folder: Path, tmp_path: Path) -> None:
    for content, message in DAMAGE.items():
        (folder / "vae" / WEIGHTS).write_bytes(content)
        (tmp_path / "single.safetensors").write_bytes(content)
        for path in (folder, tmp_path / "single.safetensors"):
            with pytest.raises(ModelError, match=rf"weights file '.*' {message}"):
                resolve(path)


def test_missing_and_odd_weights_of_a_folder(folder: Path) -> None:
    state = dict(helpers.tiny_unet().state_dict())
    weight = state.pop("conv_out.bias")
    save_file(state, folder / "unet" / WEIGHTS)
    with pytest.raises(ModelError, match=r"unet of '.*' lacks 1 of \d+ weights \(conv_out.bias\): the file is inc"):
        load_component(folder, "unet")
    save_file(state | {"conv_out.bias": torch.zeros(5)}, folder / "unet" / WEIGHTS)
    with pytest.raises(ModelError, match=r"in another shape .* \(conv_out.bias: expected \[4\], found \[5\]\)"):
        load_component(folder, "unet")
    save_file(state | {"conv_out.bias": weight, "more": weight + 1}, folder / "unet" / WEIGHTS)
    assert torch.equal(load_component(folder, "unet").conv_out.bias, weight)


def test_weights_in_several_files(folder: Path) -> None:
    unet = helpers.tiny_unet()
    (folder / "unet" / WEIGHTS).unlink()
    unet.save_pretrained(folder / "unet", max_shard_size="200KB")
    shards = sorted((folder / "unet").glob("*-of-*.safetensors"))
    assert len(shards) > 1
    assert torch.equal(load_component(folder, "unet").conv_out.weight, unet.conv_out.weight)
    shards[1].unlink()
    with pytest.raises(
        ModelError, match=rf"lacks 1 of the {len(shards)} files that .*index.json lists .{shards[1].name}"
    ):
        resolve(folder)
    index = folder / "unet" / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../../secret.safetensors"}}))
    with pytest.raises(ModelError, match=r"names files outside its folder .*secret.safetensors.: do not trust it"):
        resolve(folder)
    index.write_text("{}")
    with pytest.raises(ModelError, match="is damaged"):
        resolve(folder)


def test_code_of_a_folder_is_not_run(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    for part, entry, message in [
        ("scheduler", ["my_scheduler", "Mine"], r"names code of its own for its scheduler \(my_scheduler\)"),
        ("unet", ["diffusers", "UNet3DConditionModel"], "the unet of .* is a diffusers.UNet3DConditionModel: sdkd"),
        ("text_encoder", [None, None], "the text_encoder of .* is a None.None: sdkd loads CLIPTextModel"),
        ("vae", [], "the vae of .* is a None.None: sdkd loads AutoencoderKL"),
        ("_class_name", ["mine", "Pipeline"], "holds a .'mine', 'Pipeline'."),
    ]:
        (folder / "model_index.json").write_text(json.dumps(index | {part: entry}))
        with pytest.raises(ModelError, match=message):
            load_eager(folder)


def test_quantized_weights_are_refused(folder: Path) -> None:
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {"quant_method": "x"}}))
    with pytest.raises(ModelError, match=r"unet of .* is quantized, and sdkd needs the weights as they were"):
        load_component(folder, "unet")


def test_instruct_pix2pix_is_a_model(tmp_path: Path) -> None:
    parts = helpers.tiny_pipeline().components | {"unet": helpers.tiny_unet(in_channels=8)}
    pipe = StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False)
    write_pipeline(pipe, tmp_path / "model")
    loaded = load_eager(tmp_path / "model")
    assert type(loaded) is StableDiffusionInstructPix2PixPipeline
    assert loaded.unet.config.in_channels == 8
    assert torch.equal(loaded.unet.conv_in.weight, parts["unet"].conv_in.weight)


FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.mark.parametrize("chunk", [3, 1 << 20])
def test_tensors_are_those_of_the_library(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_CHUNK", chunk)
    for own in FLOATS:
        state = {"matrix": torch.randn(5, 7), "scalar": torch.tensor(0.5), "empty": torch.zeros(2, 0)}
        save_file({name: value.to(own) for name, value in state.items()}, tmp_path / "x.safetensors", {"who": "me"})
        opened = Weights.open(tmp_path / "x.safetensors")
        assert opened.metadata == {"who": "me"}
        for name, value in load_file(tmp_path / "x.safetensors").items():
            for wanted in (None, torch.float32, torch.float16, torch.bfloat16):
                read = opened.tensors[name].read(wanted)
                assert (read.dtype, read.shape) == (wanted or own, value.shape)
                assert torch.equal(read.float(), value.to(wanted or own).float())


def test_whole_numbers_stay_whole(tmp_path: Path) -> None:
    for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool):
        value = torch.arange(6).to(dtype)
        save_file({"x": value}, tmp_path / "x.safetensors")
        tensor = Weights.open(tmp_path / "x.safetensors").tensors["x"]
        assert torch.equal(tensor.read(torch.float16), value)
        for span in ((0, 2), (1, 6), (3, 3)):
            assert torch.equal(tensor.rows(*span).read(), value[slice(*span)])


def test_a_dtype_that_torch_lacks_is_named(tmp_path: Path) -> None:
    header = json.dumps({"x": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    tensor = Weights.open(tmp_path / "x.safetensors").tensors["x"]
    with pytest.raises(ModelError, match="holds weights of dtype F4: give it in float32, float16 or bfloat16"):
        tensor.read()


def test_a_header_that_begins_like_a_pickle_is_read(tmp_path: Path) -> None:
    """Its length, 640 bytes, is written as the two bytes that a pickle begins with."""
    header = json.dumps({"__metadata__": {"x": ""}}).encode().ljust(0x280)
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert (tmp_path / "x.safetensors").read_bytes().startswith(b"\x80\x02")
    assert Weights.open(tmp_path / "x.safetensors").tensors == {}


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(100)}, tmp_path / "x.safetensors")
    tensor = Weights.open(tmp_path / "x.safetensors").tensors["x"]
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"x.safetensors' is cut off; download or save it again"):
        tensor.read()


def test_an_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot be read \(No such file or directory\): check that it is there"):
        Weights.open(tmp_path / "gone.safetensors")
