"""`export_pipeline`: a whole bundle or nothing, checked, and the pipeline left as it was."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AsymmetricAutoencoderKL, ConsistencyDecoderVAE
from helpers import tiny_pipeline
from small_exports import bundle_copy, small_bundle, small_pipeline

from engines.pipelines.pipeline import bundle_scheduler
from export import export_pipeline
from export.component import ExportOptions, reusable
from export.pipeline import export_reasons, versions
from export.source import open_source, state_digest
from sdkd.bundle.manifest import Bundle, Manifest
from sdkd.core.components import component_contract
from sdkd.core.files import lock, read_json, write_json
from sdkd.errors import BusyError, InputError, ModelError, OutputExistsError, ValuesError
from sdkd.families import STABLE_DIFFUSION
from sdkd.models.diffusers_folder import PROVENANCE
from sdkd.models.generation import FEW_STEPS, Generation, entry
from sdkd.models.resolve import load_eager, resolve
from sdkd.targets.plan import plan_for_model

CHEAP = ("text_encoder",)  # the component that exports in the least time


def left_in(folder: Path) -> set[str]:
    """What is in a folder, lock files aside."""
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


def test_the_bundle_has_optimums_layout() -> None:
    root = small_bundle().path
    files = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    graphs = {
        f"{name}/{file}"
        for name in STABLE_DIFFUSION.components
        for file in ("model.onnx", "config.json", "initializers.json")
    }
    assert graphs | {"bundle.json", "model_index.json", "scheduler/scheduler_config.json"} <= files
    assert {name for name in files - graphs if "/" not in name} == {"bundle.json", "model_index.json"}
    index = read_json(root / "model_index.json")
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert "_name_or_path" not in index


def test_the_manifest_says_what_was_done() -> None:
    bundle = small_bundle()
    assert tuple(bundle.manifest.components) == STABLE_DIFFUSION.components
    assert bundle.manifest.source["kind"] == "pipeline"
    assert bundle.manifest.source["random_weights"] is False
    assert set(bundle.manifest.versions) >= {"sdkd", "torch", "onnx", "onnxruntime", "diffusers", "transformers"}
    unet = bundle.component("unet")
    assert (unet.precision, unet.opset) == ("fp32", 23)
    assert unet.parameters == sum(weight.numel() for weight in small_pipeline().unet.parameters())
    assert unet.details["nodes"] == sum(unet.details["operators"].values())
    assert unet.details["unmatched_weights"] == []
    assert unet.parity is not None
    assert unet.parity["relative"] < 1e-5
    assert unet.seconds >= unet.details["export_seconds"] > 0
    assert Manifest.from_json(json.loads(json.dumps(bundle.manifest.to_json()))) == bundle.manifest
    for name, record in bundle.manifest.components.items():
        bundle.verify_files(record)
        assert component_contract(name, bundle.config(name), "fp32") == record.contract
    assert bundle.config("vae_decoder") == bundle.config("vae_encoder")


def test_digests_are_of_the_weights() -> None:
    bundle, pipe = small_bundle(), small_pipeline()
    digests = bundle.manifest.source["sha256"]
    assert digests["unet"] == bundle.component("unet").source_sha256 == state_digest(pipe.unet.state_dict())
    assert len(set(digests.values())) == len(STABLE_DIFFUSION.components)
    pipe.unet.conv_in.bias.data[0] += 1
    assert digests["unet"] != state_digest(pipe.unet.state_dict())


def test_the_same_component_of_another_bundle_is_copied(tmp_path: Path) -> None:
    pipe, steps = small_pipeline(), []
    pipe.unet = small_pipeline(seed=5).unet  # a student: another UNet, the same text encoder and VAE
    options = {"components": ("text_encoder", "vae_decoder"), "reuse": [tmp_path / "none", small_bundle().path]}
    bundle = export_pipeline(pipe, tmp_path / "b", progress=lambda text, _: steps.append(text), **options)
    for name in ("text_encoder", "vae_decoder"):
        taken, own = bundle.component(name), small_bundle().component(name)
        assert (taken.files, taken.parity, taken.details["reused"]) == (own.files, own.parity, True)
        bundle.verify_files(taken)
        assert bundle.config(name) == small_bundle().config(name)
    assert f"text_encoder: the same as in {small_bundle().path.name}, re-used" in steps
    assert not any("exporting to ONNX" in step for step in steps)


def test_other_weights_opset_precision_or_damage_are_not_reused(tmp_path: Path) -> None:
    bundle = bundle_copy(tmp_path / "bundle")

    def found(seed: int = 0, versions: Any = bundle.manifest.versions, **options: Any) -> bool:
        wanted = ExportOptions(**{"precision": "fp32", "reuse": (tmp_path, bundle.path), **options})
        return reusable(open_source(small_pipeline(seed), {}), "unet", wanted, versions) is not None

    assert found()
    assert not found(seed=5)
    assert not found(versions={})
    changes: list[dict[str, Any]] = [{"opset": 22}, {"precision": "fp16"}, {"keep_float": ("unet.conv_in",)}]
    assert not any(found(**change) for change in changes)
    record = replace(bundle.component("unet"), parity=None)
    manifest = replace(bundle.manifest, components={"unet": record})
    replace(bundle, manifest=manifest).save()
    assert not found()
    assert found(verify=False)
    os.truncate(bundle.path / "unet" / "model.onnx", 1000)
    assert not found(verify=False)


def test_a_named_model_is_loaded_and_its_source_recorded(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    small_pipeline().save_pretrained(folder)
    bundle = export_pipeline(folder, tmp_path / "bundle", components=CHEAP, reuse=[small_bundle().path])
    assert bundle.manifest.source["model"] == str(folder)
    assert bundle.manifest.source["kind"] == "folder"
    assert bundle.component("text_encoder").source_sha256 == resolve(folder).digests["text_encoder"]


def test_an_existing_output_is_refused_before_any_work_and_replaced_when_asked(tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    bundle_copy(output)
    (output / "model_index.json").write_text("old")
    with pytest.raises(OutputExistsError, match="already exists: choose another folder or pass --overwrite"):
        export_pipeline(small_pipeline(), output)
    options: dict[str, Any] = {"components": CHEAP, "reuse": [small_bundle().path], "overwrite": True}
    bundle = export_pipeline(small_pipeline(), output, **options)
    assert (output / "model_index.json").read_text() != "old"
    assert Bundle.open(output).manifest == bundle.manifest
    (output / "mine.txt").write_text("keep")
    with pytest.raises(OutputExistsError, match=r"holds 'mine\.txt' beside the bundle that sdkd wrote there"):
        export_pipeline(small_pipeline(), output, components=CHEAP, overwrite=True)
    assert (output / "mine.txt").read_text() == "keep"


def test_no_bundle_replaces_what_it_is_made_from(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    small_pipeline().save_pretrained(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for output, word in ((folder, "is"), (tmp_path, "holds"), (folder / "onnx", "lies in")):
        with pytest.raises(InputError, match=f"output .* {word} the input"):
            export_pipeline(folder, output, components=CHEAP, overwrite=True)
        for part in ("vae", "controlnet"):
            with pytest.raises(InputError, match=f"output .* {word} the input"):
                export_pipeline("demo", output, components=CHEAP, overwrite=True, **{part: folder})
    with pytest.raises(OutputExistsError, match="sdkd did not write what is in it"):
        export_pipeline("demo", folder, components=CHEAP, overwrite=True)
    with pytest.raises(InputError, match=r"output .* is the input"):  # a pipeline knows where it comes from
        export_pipeline(load_eager(folder), folder, components=CHEAP, overwrite=True)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(message: str, fraction: float | None) -> None:
        if message.startswith("text_encoder: "):  # the decoder's files are there
            raise KeyboardInterrupt

    options: dict[str, Any] = {"components": ("text_encoder", "vae_decoder"), "reuse": [small_bundle().path]}
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        export_pipeline(small_pipeline(), tmp_path / "bundle", progress=interrupt, **options)
    assert left_in(tmp_path) == set()


def test_a_failed_export_keeps_the_old_bundle(tmp_path: Path) -> None:
    bundle = bundle_copy(tmp_path / "bundle")
    pipe = small_pipeline()
    pipe.text_encoder.final_layer_norm.weight.data[:] = 3e38  # too large when it is multiplied
    steps: list[str] = []
    with pytest.raises(ValuesError, match=r"text_encoder was not exported: .*PyTorch itself gives NaN or infinity in"):
        export_pipeline(
            pipe, bundle.path, components=CHEAP, overwrite=True, progress=lambda text, _: steps.append(text)
        )
    assert not any("exporting to ONNX" in step for step in steps)  # nothing was traced in vain
    assert Bundle.open(bundle.path).manifest == bundle.manifest
    assert left_in(tmp_path) == {"bundle"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int8"}, "precision 'int8' is unknown: choose one of fp32, fp16, bf16"),
        (
            {"components": ("unet", "safety_checker")},
            "component 'safety_checker' is unknown: choose from text_encoder, text_encoder_2",
        ),
        ({"components": ()}, "component 'none' is unknown: choose from text_encoder"),
        ({"opset": 24}, "opset 24 is not between 18 and 23"),
    ],
)
def test_bad_options_are_refused_before_any_work(options: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        export_pipeline("no-such-model", tmp_path / "bundle", **options)  # type: ignore[arg-type]
    assert left_in(tmp_path) == set()


def test_two_exports_to_one_folder_are_refused(tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    with lock(output), pytest.raises(BusyError, match="is being written by another process"):
        export_pipeline(small_pipeline(), output)


@pytest.mark.slow
@pytest.mark.parametrize("student", [None, "bk-small", "tiny"])
def test_a_teacher_and_its_students_export_through_the_same_code(student: str | None, tmp_path: Path) -> None:
    pipe = tiny_pipeline(student=student)
    bundle = export_pipeline(pipe, tmp_path / "bundle", components=("unet",))
    record = bundle.component("unet")
    assert (pipe.unet.mid_block is None) == (student is not None)
    assert record.parity is not None
    assert record.parity["relative"] < 1e-5
    assert record.details["unmatched_weights"] == []


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (AsymmetricAutoencoderKL, "the vae of .* is an AsymmetricAutoencoderKL, which is not exported"),
        (ConsistencyDecoderVAE, "the vae of .* is a ConsistencyDecoderVAE.*AutoencoderKL or AutoencoderTiny"),
    ],
)
def test_what_no_graph_stands_for_is_refused_before_anything_is_traced(tmp_path: Path, kind: Any, reason: str) -> None:
    pipe = small_pipeline()
    folder = tmp_path / "model"
    pipe.save_pretrained(folder)
    index = read_json(folder / "model_index.json") | {"vae": ["diffusers", kind.__name__]}
    (folder / "model_index.json").write_text(json.dumps(index))
    with torch.device("meta"):
        pipe.vae = kind()
    for model in (pipe, folder):
        with pytest.raises(ModelError, match=reason if model is pipe else kind.__name__):
            export_pipeline(model, tmp_path / "bundle")
    assert left_in(tmp_path) == {"model"}


def test_every_reason_not_to_use_a_bundle_again_is_given(tmp_path: Path) -> None:
    small_pipeline().save_pretrained(tmp_path / "model")
    source, plan, manifest = resolve(tmp_path / "model"), plan_for_model("onnxruntime"), small_bundle().manifest
    records = {  # as if exported from the folder
        name: replace(record, source_sha256=source.digests[name]) for name, record in manifest.components.items()
    }

    def reasons(**changes: Any) -> list[str]:
        found = replace(manifest, **{"components": records, **changes})
        return export_reasons(replace(small_bundle(), manifest=found), source, plan)

    assert reasons() == []
    other = records | {"unet": replace(records["unet"], source_sha256="0", precision="fp16", opset=24)}
    del other["vae_encoder"]
    assert reasons(components=other, versions=versions() | {"torch": "2.0"}) == [
        "other weights (unet, vae_encoder)",
        "precision fp16, not fp32",
        "unet in opset 24, later than 23",
        f"torch 2.0, here it is {versions()['torch']}",
    ]
    write_json(tmp_path / "model" / PROVENANCE, entry(FEW_STEPS))
    source = resolve(tmp_path / "model")
    assert reasons() == ["a model to run with any settings, not 4 steps, guidance 1, LCMScheduler"]


def test_the_bundle_keeps_how_it_is_to_be_run_and_that_scheduler(tmp_path: Path) -> None:
    pipe, told = small_pipeline(), Generation(2, 1.0, "TCDScheduler")
    options = {"components": CHEAP, "reuse": (small_bundle().path,)}
    bundle = export_pipeline(pipe, tmp_path / "told", generation=told, **options)
    scheduler = bundle_scheduler(bundle)
    assert type(scheduler).__name__ == "TCDScheduler"
    assert torch.equal(scheduler.betas, pipe.scheduler.betas)
    assert type(pipe.scheduler).__name__ == "DDIMScheduler"
    assert resolve(bundle.path).generation == told
    pipe.scheduler = scheduler
    found = resolve(export_pipeline(pipe, tmp_path / "implied", **options).path)
    assert found.generation == Generation(4, 1.0, "TCDScheduler")
    assert export_reasons(found.bundle, found, plan_for_model("onnxruntime"), CHEAP, told) == [
        "a model to run with 4 steps, guidance 1, TCDScheduler, not 2 steps, guidance 1, TCDScheduler"
    ]
