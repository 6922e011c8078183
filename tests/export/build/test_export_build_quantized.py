"""Engines of eight bits: built, held against the float graph and whole images, timed, swapped, and refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantized_builds import CPU_TARGETS, WISH, rounded_bundle, rounded_copy
from small_exports import bundle_copy, small_bundle, small_pipeline

from engines import load_pipeline, open_session
from engines.pipelines.weights import swap_weights
from export import build_engine, export_pipeline
from export.build import calibrate, gate, quantized
from export.build.calibrate import CalibrationWish, calibration_file
from export.build.job import Job
from sdkd.bundle.manifest import Bundle
from sdkd.bundle.quantized import Quantized
from sdkd.core.files import sha256
from sdkd.errors import BundleError, InputError, ModelError, NotFasterError, ValuesError
from sdkd.models.bundle_modules import component_weights, module_of, pipeline_of
from sdkd.quantization.calibration import Calibration
from sdkd.quantization.scheme import kept_reason


@pytest.mark.parametrize("target", CPU_TARGETS)
def test_an_int8_unet_is_near_the_float_graph_at_every_timestep(target: str) -> None:
    record = rounded_bundle().engine(f"{target}-int8", "unet")
    found = Quantized.of(record.flags)
    assert record.precision == "int8"
    assert found is not None
    assert found.quality.engine is not None
    assert len(found.quality.engine) == len(found.quality.simulated) > 1
    for engine, simulated in zip(found.quality.engine, found.quality.simulated, strict=True):
        assert engine.timestep == simulated.timestep
        assert engine.relative == pytest.approx(simulated.relative, rel=0.3)
    assert record.parity is not None
    assert record.parity["relative"] == max(row.relative for row in found.quality.engine) < 0.1
    assert found.quality.image_psnr_db is not None
    assert min(found.quality.image_psnr_db) > 25


def test_layers_that_stay_float_are_named_with_their_reasons() -> None:
    flags = rounded_bundle().engine("onnxruntime-int8", "unet").flags
    layers = Calibration.load(calibration_file(rounded_bundle().path)).layers
    kept = {name for name in layers if kept_reason(name)}
    assert "conv_in" in kept
    assert set(flags["float_layers"]) >= kept
    assert flags["rounded_layers"] + len(flags["float_layers"]) == len(layers)


def test_the_other_engines_of_the_slot_are_float_and_say_why() -> None:
    bundle = rounded_bundle()
    for target in CPU_TARGETS:
        vae = bundle.engine(f"{target}-int8", "vae_decoder")
        assert vae.precision != "int8"
        assert "convolutions" in vae.flags["stays_float"]
    assert bundle.engine("openvino-int8", "text_encoder").precision == "int8"
    assert bundle.engine("openvino-int8", "text_encoder").flags["quantization"]["scheme"]["activations"] == "none"
    assert bundle.engine("onnxruntime-int8", "text_encoder").precision == "fp32"


def test_one_calibration_serves_all_targets_and_nothing_is_left_beside_the_engines() -> None:
    bundle = rounded_bundle()
    digest = sha256(calibration_file(bundle.path))
    assert {bundle.engine(f"{target}-int8", "unet").flags["quantization"]["calibration"] for target in CPU_TARGETS} == {
        digest
    }
    assert not [
        path for path in bundle.path.rglob("*") if path.name.startswith(".") and not path.name.endswith(".lock")
    ]


def test_a_fresh_engine_is_kept_and_another_calibration_makes_it_stale(tmp_path: Path) -> None:
    bundle, said = rounded_copy(tmp_path / "bundle"), list[str]()
    same = build_engine(
        bundle, "onnxruntime", precision="int8", components=["unet"], progress=lambda words, _: said.append(words)
    )
    assert same.manifest == bundle.manifest
    assert "unet: onnxruntime-int8 engine is fresh, reused" in said
    wish = dataclasses.replace(WISH, images=1)
    other = build_engine(
        bundle, "onnxruntime", precision="int8", components=["unet"], calibration=wish, keep_slower=True,
        progress=lambda words, _: said.append(words),
    )  # fmt: skip
    assert any("to build for onnxruntime-int8 (built with quantization" in words for words in said)
    assert len(Calibration.load(calibration_file(other.path)).about["seeds"]) == 1


def test_a_slower_engine_is_an_answer_and_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = rounded_copy(tmp_path / "bundle")
    answer = {"kept": False, "flags": {"speed": {"against": "fp32", "times": 1.02, "seconds": {}}}}
    monkeypatch.setattr("export.build.engines._run", lambda jobs, requests, progress: [answer for _ in jobs])
    with pytest.raises(NotFasterError, match=r"onnxruntime-int8 is not faster here: 1.02x fp32.*--target onnxruntime"):
        build_engine(bundle, "onnxruntime", precision="int8", components=["unet"], force=True)
    assert Bundle.open(bundle.path).manifest == bundle.manifest


@pytest.mark.parametrize(("times", "pays"), [(0.9, False), (1.04, False), (1.05, True), (1.6, True)])
def test_what_pays(times: float, pays: bool) -> None:
    assert gate.pays({"speed": {"times": times}}) is pays
    assert gate.pays({"speed": None})


@pytest.mark.parametrize("target", CPU_TARGETS)
def test_other_weights_are_rounded_again_and_go_without_a_trace(target: str) -> None:
    pipe = load_pipeline(rounded_bundle(), f"{target}-int8")
    pipe.set_progress_bar_config(disable=True)

    def latents() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        found: torch.Tensor = pipe(
            "a red star", num_inference_steps=2, guidance_scale=1.0, generator=generator, output_type="latent",
            height=32, width=32,
        ).images  # fmt: skip
        return found

    own, weights = latents(), component_weights(rounded_bundle(), "unet")
    changed = {name: value.roll(1, 0) if name.endswith("to_out.0.weight") else value for name, value in weights.items()}
    swap_weights(pipe, changed)
    other = latents()
    swap_weights(pipe, weights)
    assert torch.equal(latents(), own)
    swap_weights(pipe, None)
    assert torch.equal(latents(), own)
    eager = pipeline_of(rounded_bundle())
    eager.unet.load_state_dict(changed)
    wanted = eager(
        "a red star", num_inference_steps=2, guidance_scale=1.0, generator=torch.Generator().manual_seed(0),
        output_type="latent", height=32, width=32,
    ).images  # fmt: skip
    assert (other - wanted).norm() < 0.7 * (own - wanted).norm()


def test_the_modules_of_a_bundle_are_the_models(tmp_path: Path) -> None:
    bundle = small_bundle()
    unet = module_of(bundle, "unet")
    session = open_session(
        build_engine(bundle_copy(tmp_path / "b"), "onnxruntime", components=["unet"]), "onnxruntime", "unet"
    )
    generator = torch.Generator().manual_seed(1)
    sample, text = torch.randn(1, 4, 16, 16, generator=generator), torch.randn(1, 77, 32, generator=generator)
    with torch.inference_mode():
        wanted = unet(sample, torch.tensor(500.0), text, return_dict=False)[0]
    given = {"sample": sample, "timestep": torch.tensor(500.0), "encoder_hidden_states": text}
    assert torch.allclose(session.run(given)["out_sample"], wanted, atol=1e-4)


# Refusals


def test_a_gate_that_cannot_be_kept_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bundle = rounded_copy(tmp_path / "bundle")
    record = bundle.engine("onnxruntime-int8", "unet")
    component = bundle.component("unet")
    job = Job(
        "unet", "onnxruntime", "int8", str(bundle.path / component.files[0].path), str(tmp_path), component.contract,
        (), ({"batch": 1, "height": 16, "width": 16, "sequence": 77},), record.flags, bundle=str(bundle.path),
    )  # fmt: skip
    monkeypatch.setattr(quantized, "LIMIT", 1e-6)
    scheme = quantized.scheme_for("onnxruntime", "int8")
    with pytest.raises(ValuesError, match=r"int8 of this UNet is .* more than 1e-06, with \d+ of \d+ layers in float"):
        quantized.decide(job, scheme, tmp_path / "rounded", lambda *_: None)


@pytest.mark.parametrize(
    ("target", "precision", "words"),
    [
        ("openvino", "fp8", r"openvino has no fp8 \(it has fp32, fp16, bf16, int8\).*tensorrt, tensorrt-rtx"),
        ("onnxruntime", "fp8", r"onnxruntime has no fp8 \(it has fp32, fp16, int8\)"),
        ("tensorrt-rtx", "int8", r"tensorrt-rtx makes int8 engines from fp16 graphs, these are fp32.*--precision fp16"),
        ("openvino", "int4", "int4"),
    ],
)
def test_precisions_that_a_target_lacks_are_refused(target: str, precision: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        build_engine(small_bundle(), target, precision=precision)


def test_a_calibration_of_another_model_is_refused(tmp_path: Path) -> None:
    own = Calibration.load(calibration_file(rounded_bundle().path))
    dataclasses.replace(own, weights="1" * 64).save(tmp_path / "other.safetensors")
    bundle = bundle_copy(tmp_path / "bundle")
    with pytest.raises(ModelError, match=r"is of another model's UNet \(weights 111111111111, these are"):
        build_engine(
            bundle, "openvino", precision="int8", calibration=CalibrationWish(file=tmp_path / "other.safetensors")
        )


def test_a_calibration_of_the_same_weights_is_taken_over(tmp_path: Path) -> None:
    bundle, given = bundle_copy(tmp_path / "bundle"), calibration_file(rounded_bundle().path)
    profile = calibrate.ShapeRanges.from_json(rounded_bundle().engine("onnxruntime-int8", "unet").ranges.to_json())
    file = calibrate.calibrated(bundle, CalibrationWish(file=given), profile, lambda *_: None)
    assert file.read_bytes() == given.read_bytes()


def test_ranges_of_training_are_not_recorded_over(tmp_path: Path) -> None:
    bundle, own = bundle_copy(tmp_path / "bundle"), Calibration.load(calibration_file(rounded_bundle().path))
    profile = calibrate.ShapeRanges.from_json(rounded_bundle().engine("onnxruntime-int8", "unet").ranges.to_json())
    file = calibration_file(bundle.path)
    file.parent.mkdir()
    dataclasses.replace(own, about={**own.about, "trained": {"steps": 4}}).save(file)
    before = file.read_bytes()
    with pytest.raises(InputError, match="was trained to be rounded with, and recording others would lose them"):
        calibrate.calibrated(bundle, CalibrationWish(images=5), profile, lambda *_: None)
    assert calibrate.calibrated(bundle, CalibrationWish(), profile, lambda *_: None).read_bytes() == before


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"prompts": ()}, "no prompts to calibrate with"),
        ({"images": 0}, "--calibrate-images 0 gives nothing"),
        ({"steps": -1}, "--calibrate-steps -1 gives nothing"),
        ({"file": Path("x"), "images": 2}, "is there already: give it, or prompts"),
    ],
)
def test_wishes_that_make_no_sense(wish: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        CalibrationWish(**wish)


def test_a_bundle_without_its_other_components_cannot_be_calibrated(tmp_path: Path) -> None:
    bundle = bundle_copy(tmp_path / "bundle")
    parts = {name: record for name, record in bundle.manifest.components.items() if name == "unet"}
    with pytest.raises(BundleError, match="has no text_encoder, vae_decoder, and a calibration draws whole images"):
        calibrate.check_calibratable(Bundle(bundle.path, dataclasses.replace(bundle.manifest, components=parts)))


def test_refit_and_eight_bits_exclude_each_other() -> None:
    from export.build.options import BuildOptions
    from export.build.request import requests_for
    from sdkd.targets.plan import plan_for_onnx

    plan = plan_for_onnx("tensorrt", "int8", "fp16", "it")
    with pytest.raises(InputError, match="--refit cannot be had with int8"):
        requests_for(small_bundle(), plan, None, ["unet"], BuildOptions(refit="lora"))


def test_a_call_is_repeated_and_cut_to_what_an_engine_takes() -> None:
    calibration = Calibration.load(calibration_file(rounded_bundle().path))
    component = rounded_bundle().component("unet")
    sizes = {"batch": 3, "height": 8, "width": 24, "sequence": 77}
    job = Job("unet", "openvino", "int8", "", "", component.contract, (), (sizes,))
    call = calibration.calls[0]
    feeds = gate.call_feeds(job, call)
    assert {name: array.shape for name, array in feeds.items()} == {
        "sample": (3, 4, 8, 24), "timestep": (), "encoder_hidden_states": (3, 77, call.text.shape[2])
    }  # fmt: skip
    assert feeds["timestep"] == np.float32(call.timestep)
    assert np.array_equal(feeds["sample"][0, :, :, :16], call.sample[0, :, :8])


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_gpu_engines_of_eight_bits_are_near_the_float_graph_and_timed(precision: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt")
    if precision == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no E4M3")
    export_pipeline(small_pipeline(), tmp_path / "bundle", precision="fp16", verify=False)
    bundle = build_engine(tmp_path / "bundle", "tensorrt", precision=precision, calibration=WISH, keep_slower=True)
    found = Quantized.of(bundle.engine(f"tensorrt-{precision}", "unet").flags)
    assert found is not None
    assert found.quality.engine is not None
    assert max(row.relative for row in found.quality.engine) < 0.1
    assert found.quality.image_psnr_db is not None
    assert found.speed is not None
    assert found.speed.against == "fp16"
