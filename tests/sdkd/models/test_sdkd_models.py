"""What a model name means, and loading it."""

from __future__ import annotations

import json
from pathlib import Path

import helpers
import pytest
import torch

from sdkd.bundle.manifest import Bundle, Manifest
from sdkd.errors import BundleError, InputError, ModelError
from sdkd.families import MODELS, STABLE_DIFFUSION, PublishedModel
from sdkd.models import resolve as models
from sdkd.models.diffusers_folder import write_pipeline
from sdkd.models.resolve import load_component, load_eager, load_rest, provenance, resolve
from sdkd.students.blocks import build_student


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "teacher"
    write_pipeline(helpers.tiny_pipeline(), path)
    return path


def bundle_of(path: Path, model: str) -> Path:
    Bundle(path, Manifest(source={"model": model, "random_weights": True}, versions={})).save()
    return path


def test_kinds(folder: Path, tmp_path: Path) -> None:
    names = [folder, "segmind/tiny-sd", bundle_of(tmp_path / "b", "x/y"), "random:sd15"]
    assert [resolve(name).kind for name in names] == ["folder", "hub", "bundle", "random"]
    assert [resolve(name).random_weights for name in names] == [False, False, True, True]


def test_load_folder(folder: Path) -> None:
    pipe = load_eager(folder)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        assert not part.training
        assert not any(parameter.requires_grad for parameter in part.parameters())
        assert part.dtype == torch.float32
    assert pipe.safety_checker is None
    assert torch.equal(pipe.unet.conv_in.weight, helpers.tiny_unet().conv_in.weight)
    assert load_eager(folder, torch.float16).unet.dtype == torch.float16


PARTS: tuple[models.Part, ...] = ("unet", "vae", "text_encoder")


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_one_component_is_that_of_the_whole(folder: Path, tmp_path: Path) -> None:
    helpers.tiny_pipeline().save_pretrained(tmp_path / "half", variant="fp16")
    for model in (folder, tmp_path / "half", bundle_of(tmp_path / "bundle", str(folder))):
        whole = load_eager(model)
        assert whole.unet.dtype == torch.float32
        for part in PARTS:
            module = load_component(model, part)
            assert same_weights(module, getattr(whole, part))
            assert not module.training
            assert not any(parameter.requires_grad for parameter in module.parameters())
    assert load_component(folder, "unet", torch.float16).dtype == torch.float16


def test_the_rest_has_everything_but_weights(folder: Path) -> None:
    whole, rest = load_eager(folder), load_rest(folder)
    assert rest.unet is rest.vae is rest.text_encoder is None
    assert json.loads(rest.to_json_string()) == json.loads(whole.to_json_string()) | {
        "_name_or_path": json.loads(rest.to_json_string())["_name_or_path"]
    }
    assert rest.tokenizer("a cat").input_ids == whole.tokenizer("a cat").input_ids
    assert rest.scheduler.config == whole.scheduler.config


@pytest.mark.parametrize(
    "name", ["nothing", "models/sd.safetensors", "models/sd.ckpt", "a/b.ONNX"]
)  # what ends like a file is no hub id
def test_missing_model(name: str) -> None:
    with pytest.raises(ModelError, match=f"model '{name}' does not exist: give a diffusers folder, a hub id"):
        resolve(name)


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    for part in ("model_index.json", "unet/config.json"):
        for content, message in {"{": "json' is not JSON", "[1]": "save or download the model again"}.items():
            (tmp_path / "p" / part).write_text(content)
            with pytest.raises(ModelError, match=message):
                resolve(tmp_path / "p")
        if part == "model_index.json":
            (tmp_path / "p" / part).write_text('{"_class_name": "StableDiffusionPipeline"}')
            with pytest.raises(ModelError, match="lacks unet, vae, text_encoder, tokenizer, scheduler"):
                resolve(tmp_path / "p")
            write_pipeline(helpers.tiny_pipeline(), tmp_path / "p")


def test_an_export_of_another_tool_is_named(tmp_path: Path) -> None:
    for part in ("unet", "text_encoder", "vae_decoder"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "model.onnx").write_bytes(b"")
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(ModelError, match=r"is an export by Optimum.*give the model that it was made from"):
        resolve(tmp_path)
    with pytest.raises(BundleError, match=r"is an export by Optimum.*not a bundle"):
        Bundle.open(tmp_path)


def test_bundle_leads_to_its_original(folder: Path, tmp_path: Path) -> None:
    assert load_eager(bundle_of(tmp_path / "good", str(folder))).unet.config.cross_attention_dim == helpers.CONTEXT
    with pytest.raises(ModelError, match=r"holds ONNX graphs and engines, not PyTorch weights, .* is gone"):
        load_eager(bundle_of(tmp_path / "gone", str(tmp_path / "no-such-model")))


def test_the_demo_is_a_folder_of_the_installation(
    monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(models, "DEMO_WEIGHTS", folder)
    assert resolve("demo").kind == "demo"
    assert load_eager("demo").unet.config.sample_size == 8
    monkeypatch.setattr(models, "DEMO_WEIGHTS", tmp_path)
    with pytest.raises(ModelError, match="the demo's teacher is not in this installation"):
        resolve("demo")


@pytest.mark.parametrize("name", ["random:sd3", "random:sd15-micro", "random:"])
def test_random_names(name: str) -> None:
    with pytest.raises(InputError, match=r"names no known model: give random:MODEL|student 'micro' is unknown"):
        resolve(name)


def test_random_pipeline_is_the_same_in_every_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vae = {key: value for key, value in helpers.VAE.items() if key != "sample_size"}
    model = PublishedModel(helpers.TEACHER_UNET, (text,), ("!",), 64, "epsilon", "DDIMScheduler", vae)
    monkeypatch.setitem(MODELS, "mini", (STABLE_DIFFUSION, model))
    pipe, half = load_eager("random:mini-tiny"), load_eager("random:mini-tiny", torch.float16)
    assert pipe.unet.config.layers_per_block == 1
    assert torch.equal(pipe.unet.conv_in.weight.half(), half.unet.conv_in.weight)
    assert half.text_encoder.dtype == half.vae.dtype == torch.float16
    for part in PARTS:
        assert same_weights(load_component("random:mini-tiny", part), getattr(pipe, part))
    assert json.loads(load_rest("random:mini-tiny").to_json_string()) == json.loads(pipe.to_json_string())
    image = pipe("a red star", num_inference_steps=2, output_type="np").images
    assert image.shape == (1, 64, 64, 3)
    assert image.std() > 0


def test_random_models_are_those_of_their_family() -> None:
    for name, pad, width, mid in (
        ("random:sd15", 49407, 768, "UNetMidBlock2DCrossAttn"),
        ("random:sd21-bk-small", 0, 1024, None),
    ):
        assert load_rest(name).tokenizer.pad_token_id == pad
        config = resolve(name).unet_config
        assert (config["cross_attention_dim"], config["mid_block_type"]) == (width, mid)


@pytest.mark.slow
def test_random_student_of_full_size() -> None:
    pipe = load_eager("random:sd15-tiny", torch.float16)
    counts = [sum(parameter.numel() for parameter in part.parameters()) for part in (pipe.unet, pipe.vae)]
    assert counts == [323_384_964, 83_653_863]
    assert pipe.unet.dtype == pipe.text_encoder.dtype == torch.float16


def test_a_saved_student_is_noted_and_digests_follow_the_weights(folder: Path, tmp_path: Path) -> None:
    pipe = helpers.tiny_pipeline()
    unet, about = pipe.unet, {"student": "sd-tiny", "random_weights": True}
    write_pipeline(pipe, tmp_path / "same", about={"note": 1})
    write_pipeline(pipe, tmp_path / "student", unet=build_student(unet, "tiny"), about=about, readme="card")
    assert pipe.unet is unet
    first, same, student = (resolve(path) for path in (folder, tmp_path / "same", tmp_path / "student"))
    assert first.digests == same.digests
    assert {name for name in first.digests if first.digests[name] != student.digests[name]} == {"unet"}
    assert resolve("random:sd15").digests["unet"] != resolve("random:sd15-tiny").digests["unet"]
    assert student.notes == ("its UNet has the blocks of the student sd-tiny or bk-tiny",)
    assert (first.notes, first.random_weights, student.random_weights) == ((), False, True)
    assert provenance(tmp_path / "student") == about
    assert (tmp_path / "student" / "README.md").read_text() == "card"
    assert json.loads((tmp_path / "student" / "unet" / "config.json").read_text())["layers_per_block"] == 1


def test_a_bundle_cannot_have_its_original_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, bool]] = []

    def downloaded(name: str, *, local_only: bool = False) -> Path:
        asked.append((name, local_only))
        raise FileNotFoundError(name)

    monkeypatch.setattr("sdkd.models.kinds.downloaded", downloaded)
    with pytest.raises(ModelError, match=r"made from \('somebody/model'\) is gone"):
        load_eager(bundle_of(tmp_path / "bundle", "somebody/model"))
    assert asked == [("somebody/model", True)]
