"""`--lora`: fused before the trace, recorded, another model for all that ask; what it leaves alone is used again."""

from __future__ import annotations

import shlex
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_files import kohya, kohya_text
from safetensors.torch import load_file, save_file
from small_exports import bundle_copy, small_bundle, small_pipeline
from training_runs import sdkd

from export import export_pipeline
from export.build import engines as build
from export.build_cli import build_engine, default_name
from export.cli import export
from export.pipeline import export_reasons
from sdkd.bundle.manifest import Bundle
from sdkd.bundle.onnx_weights import read_weights
from sdkd.compare.measure.planning import Wish, make_plan
from sdkd.compare.measure.subjects import open_subject
from sdkd.errors import InputError, ModelError
from sdkd.models.fused import Lora, with_loras
from sdkd.models.resolve import load_component, load_eager, resolve
from sdkd.students.lora_file import FILE
from sdkd.targets.plan import plan_for_model
from sdkd.workflow import prepare

UNET = ("up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", "conv_in")
CHEAP = ("text_encoder",)  # the component that exports in the least time


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small pipeline's folder, beside `style.safetensors` for both of its parts and `unet.safetensors` for one."""
    folder, pipe = tmp_path_factory.mktemp("fused") / "model", small_pipeline()
    pipe.save_pretrained(folder)
    save_file(kohya(pipe.unet, UNET) | kohya_text(pipe.text_encoder), folder.with_name("style.safetensors"))
    save_file(kohya(pipe.unet, UNET), folder.with_name("unet.safetensors"))
    return folder


@pytest.fixture(scope="module")
def style(model: Path) -> Lora:
    return Lora.of(model.with_name("style.safetensors"), 0.5)


def test_a_model_is_exported_with_its_loras_and_again_when_they_are_others(
    model: Path, style: Lora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "build_engine", lambda *_, **__: None)
    base, plan = resolve(model), plan_for_model("onnxruntime")

    def made(*loras: Any) -> bool:
        return prepare(base, plan, tmp_path / "work", components=CHEAP, loras=loras).exported

    assert [made(style), made(f"{style.file}:0.5")] == [True, False]
    bundle = Bundle.open(tmp_path / "work" / "fp32")
    assert bundle.manifest.source["loras"] == [asdict(style)]
    assert bundle.manifest.source["model"] == str(model)
    fused = with_loras(base, [style])
    state = load_component(fused, "text_encoder").state_dict()
    names = [name for name in state if name.endswith("q_proj.weight")]
    for name, weight in read_weights(bundle.path / "text_encoder" / "model.onnx", names).items():
        torch.testing.assert_close(torch.from_numpy(weight.copy()), state[name], rtol=0, atol=0)
    assert bundle.component("text_encoder").source_sha256 == fused.digests["text_encoder"]
    for other in (base, with_loras(base, [Lora(style.file, 0.6, style.sha256)])):
        assert export_reasons(bundle, other, plan, CHEAP) == ["other weights (text_encoder)"]
    assert export_reasons(bundle, fused, plan, CHEAP) == []


def test_a_pipeline_of_the_caller_stays_as_it_is_and_its_vae_is_used_again(style: Lora, tmp_path: Path) -> None:
    pipe = small_pipeline()
    parts = ("text_encoder", "vae_decoder")
    options: dict[str, Any] = {"reuse": [small_bundle().path], "components": parts, "loras": [style]}
    bundle = export_pipeline(pipe, tmp_path / "bundle", **options)
    found = {name: record.details.get("reused", False) for name, record in bundle.manifest.components.items()}
    assert found == {"text_encoder": False, "vae_decoder": True}
    plain = small_pipeline().text_encoder.state_dict()
    name = next(name for name in plain if name.endswith("q_proj.weight"))
    torch.testing.assert_close(pipe.text_encoder.state_dict(), plain, rtol=0, atol=0)
    assert not hasattr(pipe.text_encoder, "peft_config")
    weight = torch.from_numpy(read_weights(bundle.path / "text_encoder" / "model.onnx", [name])[name].copy())
    assert (weight - plain[name]).abs().max() > 0.1
    assert bundle.manifest.source["loras"][0]["scale"] == 0.5


def recorded(folder: Path, model: Path, *loras: Lora) -> Bundle:
    """The small bundle, as if the model had been exported with LoRAs."""
    bundle = bundle_copy(folder)
    source = {**bundle.manifest.source, "model": str(model), "kind": "folder", "loras": [asdict(one) for one in loras]}
    found = replace(bundle, manifest=replace(bundle.manifest, source=source))
    found.save()
    return found


def test_what_stands_for_such_a_bundle_has_its_loras(
    model: Path, style: Lora, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = recorded(tmp_path / "bundle", model, style)
    expected = load_component(with_loras(resolve(model), [style]), "unet").state_dict()
    wish = Wish(("eager",), None, None, tmp_path / "bundles")
    (subject,) = make_plan([bundle.path], wish).subjects
    for unet in (open_subject(subject).unet, load_eager(bundle.path).unet, load_component(bundle.path, "unet")):
        torch.testing.assert_close(unet.state_dict(), expected, rtol=0, atol=0)
    (plain,) = make_plan([model], wish).subjects
    assert plain.model_key != subject.model_key
    assert f"--lora {shlex.quote(f'{style.file}:0.5')} --overwrite" in bundle.repair(bundle.component("unet"))
    sdkd("inspect", bundle.path)
    shown = capsys.readouterr().out.replace("\n", "")
    assert f"LoRA {style.file}, scale 0.5, fused (sha256 {style.sha256[:12]})" in shown
    moved = replace(style, file=str(tmp_path / "gone.safetensors"))
    with pytest.raises(ModelError, match=r"'.*gone\.safetensors' is gone since it was fused: restore the file"):
        load_component(recorded(tmp_path / "moved", model, moved).path, "unet")
    plan = make_plan([tmp_path / "moved", model], wish)
    assert [one.label for one in plan.subjects] == ["model eager"]
    assert "no eager baseline (LoRA '" in plan.notes[0]


def test_loras_are_refused_before_anything_is_made(model: Path, style: Lora, tmp_path: Path) -> None:
    bundle, out, style_word = recorded(tmp_path / "bundle", model), tmp_path / "out", style.file
    with pytest.raises(InputError, match="is a bundle, and LoRAs are fused before an export: give the model that it"):
        build_engine(str(bundle.path), "onnxruntime", lora=[style_word])
    wide = load_file(style.file) | {"lora_unet_conv_in.lora_up.weight": torch.ones(17, 4, 1, 1)}
    save_file(wide, tmp_path / "wide.safetensors")
    for command in (
        lambda lora: export(str(model), out, lora=lora),
        lambda lora: build_engine(str(model), "onnxruntime", output=out, lora=lora),
    ):
        with pytest.raises(InputError, match="scale 'x' is not a number"):
            command([f"{style_word}:x"])
        with pytest.raises(ModelError, match="is for a model of other widths"):
            command([style_word, str(tmp_path / "wide.safetensors")])
    with pytest.raises(ModelError, match="is for a model of other widths"):
        export_pipeline(small_pipeline(), tmp_path / "out", loras=[tmp_path / "wide.safetensors"])
    run = tmp_path / "run"  # as `sdkd lora` leaves it: only because it is an input it is not replaced
    run.mkdir()
    (run / "sdkd.json").write_text('{"objective": "lora", "settings": {}}')
    shutil.copy(style.file, run / FILE)
    with pytest.raises(InputError, match="input"):
        export_pipeline(model, run, loras=[run], overwrite=True)
    assert (run / FILE).is_file()
    assert not (tmp_path / "out").exists()
    assert default_name("segmind/tiny-sd", [style]) == "tiny-sd-style"
