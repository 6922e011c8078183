"""Other projects' runtimes as subjects: what names them, what is refused, and OpenVINO GenAI on real engines."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from compare_models import engine_models
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

from sdkd.bundle.manifest import Bundle
from sdkd.compare import Subject, compare
from sdkd.compare.measure import refusals, sdcpp
from sdkd.compare.measure.defaults import RunsAsked
from sdkd.compare.measure.foreign import check_plain
from sdkd.compare.measure.peers import PEERS, Shape, check_graphs, open_peer, peer_of, peer_problem
from sdkd.compare.measure.planning import Wish, make_plan
from sdkd.compare.measure.refusals import check_targets, in_torch
from sdkd.compare.measure.sdcpp import check_model, parameters_of, sigmas_of, together
from sdkd.compare.measure.subjects import close_subject, open_subject, weights_of
from sdkd.compare.measure.timing import Sample
from sdkd.errors import BundleError, EngineError, InputError, ModelError
from sdkd.models.families import empty
from sdkd.models.generation import Generation
from sdkd.models.replacements import RANDOM, WithVae
from sdkd.models.resolve import resolve

DDIM = Generation(3, 5.0, "ddim")


def test_a_target_names_a_peer_and_its_precision() -> None:
    named = ("optimum", "optimum-intel", "optimum-intel-bf16", "openvino-genai-bf16", "torch-tensorrt-fp16")
    found = [peer_of(target) for target in named]
    assert [(one[0].name, one[1]) for one in found if one] == [
        ("optimum", "fp32"), ("optimum-intel", "fp32"), ("optimum-intel", "bf16"), ("openvino-genai", "bf16"),
        ("torch-tensorrt", "fp16"),
    ]  # fmt: skip
    assert [peer_of(target) for target in ("eager", "openvino-bf16", "onnxruntime")] == [None] * 3
    assert [in_torch(target) for target in ("torch-tensorrt-bf16", "compile", "optimum")] == [
        ("torch-tensorrt", "bf16"), ("compile", "fp32"), None
    ]  # fmt: skip
    with pytest.raises(InputError, match="openvino-genai computes in fp32 or bf16: give 'openvino-genai'"):
        peer_of("openvino-genai-fp16")
    with pytest.raises(InputError, match="optimum computes in what the graphs are in: give 'optimum'"):
        peer_of("optimum-fp16")


@pytest.mark.parametrize("name", sorted(PEERS))
def test_a_peer_that_is_not_there_is_refused_with_what_brings_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = PEERS[name].imports.partition(":")[0]
    monkeypatch.setitem(sys.modules, module, None)
    said = peer_problem(PEERS[name])
    assert said is not None
    assert said.startswith(f"{module} cannot be imported (")
    assert "pip install" in said
    with pytest.raises(EngineError, match=f"target '{name}' does not run here: {module} cannot be"):
        check_targets((name,))
    with pytest.raises(EngineError, match=f"target '{name}' does not run here"):
        open_peer(PEERS[name], Bundle.open(engine_models() / "bundle"), "fp32", "cpu", None)


def test_graphs_in_half_precision_are_not_for_peers_that_lower_them(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(engine_models() / "bundle")
    check_graphs(PEERS["openvino-genai"], bundle)
    monkeypatch.setattr(Bundle, "component", lambda self, name: SimpleNamespace(precision="fp16"))
    check_graphs(PEERS["optimum"], bundle)
    with pytest.raises(BundleError, match=r"openvino-genai lowers graphs in float32 by itself, .* are in fp16: give a"):
        check_graphs(PEERS["openvino-genai"], bundle)


def test_torch_tensorrt_needs_no_bundle_and_is_no_engine_of_ours() -> None:
    subject = Subject("small torch-tensorrt-fp16", engine_models() / "right", "torch-tensorrt", "fp16")
    assert (subject.in_torch, subject.has_engines, subject.is_eager) == (True, False, False)
    assert (subject.model_label, subject.runs_as) == ("small", "torch-tensorrt-fp16")
    with pytest.raises(InputError, match="runs on 'openvino-genai', which needs a bundle: give one"):
        Subject("x", "model", "openvino-genai")


# OpenVINO GenAI

genai = pytest.mark.skipif(peer_problem(PEERS["openvino-genai"]) is not None, reason="openvino-genai is not installed")


@genai
@pytest.mark.parametrize("guided", [True, False])
def test_genai_draws_what_eager_draws(guided: bool) -> None:
    run = DDIM if guided else Generation(3, 1.0, "ddim")
    model, bundle = engine_models() / "right", engine_models() / "bundle"
    subjects = [
        Subject("right eager", model, run=run),
        Subject("right openvino-genai", model, "openvino-genai", bundle=bundle, run=run),
    ]
    report = compare(subjects, prompts=["a red star"], size=32, runs=3, min_seconds=0.0, image_runs=3)
    eager, found = report.results
    assert found.against_eager is not None
    assert found.against_eager.psnr_min_db > 48  # of colours that are cut to eight bits
    assert found.repeatable is True
    assert (found.unet_calls, found.unet_batch) == (3, 2 if guided else 1)
    assert found.unet_parameters == eager.unet_parameters
    assert min(found.unet_step_ms.median, found.text_encoder_ms.median, found.vae_decode_ms.median) > 0
    assert [note for note in report.notes if note.startswith("openvino-genai: loading contains")]


@genai
def test_genai_is_opened_from_a_bundle_and_leaves_nothing_behind() -> None:
    subject = Subject("x", "right", "openvino-genai", bundle=engine_models() / "bundle", run=DDIM)
    pipe = open_subject(subject, "cpu", Shape(2, 32, 32, True))
    assert (pipe.folder / "unet" / "openvino_model.xml").is_file()
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    call = {"num_inference_steps": 2, "guidance_scale": 5.0, "height": 32, "width": 32}
    first, again = (pipe(["a star"] * 2, latents=noise, **call).images for _ in range(2))
    assert first.shape == (2, 32, 32, 3)
    assert np.array_equal(first, again)
    assert not np.array_equal(first[0], first[1])
    with pytest.raises(EngineError, match=r"asked for noise \(2, 4, 16, 16\), not \(1, 4, 16, 16\)|noise"):
        pipe(["a star"], latents=noise[:, :, :8], **call)
    folder = pipe.folder
    close_subject(subject, pipe)
    assert not Path(folder).exists()


@genai
def test_genai_gets_a_scheduler_that_it_has_with_diffusers_betas(tmp_path: Path) -> None:
    from sdkd.compare.measure.genai import scheduler_config

    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    found = scheduler_config(scheduler)
    assert found["_class_name"] == "DDIMScheduler"
    assert found["trained_betas"] == scheduler.betas.tolist()
    assert all(math.isfinite(value) for value in found.values() if isinstance(value, float))
    with pytest.raises(InputError, match="openvino-genai has no DPMSolverMultistepScheduler: give --scheduler ddim"):
        scheduler_config(DPMSolverMultistepScheduler())


@genai
def test_genai_is_planned_on_the_onnx_files_of_a_bundle(tmp_path: Path) -> None:
    bundle = engine_models() / "bundle"
    wish = Wish(("openvino-genai-bf16", "openvino-genai"), None, None, tmp_path)
    rows = make_plan([str(bundle)], wish).subjects
    assert [(row.label, row.target, row.precision, row.bundle) for row in rows] == [
        ("bundle openvino-genai-bf16", "openvino-genai", "bf16", bundle),
        ("bundle openvino-genai", "openvino-genai", "fp32", bundle),
    ]


@genai
def test_a_scheduler_that_genai_lacks_is_refused_before_anything_is_opened(tmp_path: Path) -> None:
    bundle = engine_models() / "bundle"
    wish = Wish(("openvino-genai",), None, None, tmp_path, runs=RunsAsked(scheduler="dpm++"))
    said = r"'bundle': openvino-genai has no DPMSolverMultistepScheduler: give --scheduler ddim, .* or lcm, for all"
    with pytest.raises(InputError, match=said):
        make_plan([str(bundle)], wish)
    subject = Subject("x", "right", "openvino-genai", bundle=bundle)
    with pytest.raises(InputError, match="openvino-genai has no DPMSolverMultistepScheduler"):
        compare([subject], prompts=["a red star"], scheduler="dpm++")


@genai
def test_genai_is_not_given_what_it_has_no_pipeline_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from sdkd.compare.measure import genai

    monkeypatch.setattr(genai, "INPUTS", {"sample"})
    with pytest.raises(BundleError, match=r"text to image of Stable Diffusion 1.x and 2.x alone, .* takes enc"):
        open_subject(Subject("x", "right", "openvino-genai", bundle=engine_models() / "bundle", run=DDIM))


# stable-diffusion.cpp

NOISE: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def test_stable_diffusion_cpp_gets_the_noise_levels_of_ddim_and_euler() -> None:
    euler = EulerDiscreteScheduler(**NOISE, timestep_spacing="trailing")
    found = sigmas_of(euler, 4)
    assert found == euler.sigmas.tolist()
    assert (len(euler.timesteps), round(found[0], 3), found[4]) == (4, 14.615, 0.0)
    assert sigmas_of(DDIMScheduler(**NOISE, timestep_spacing="trailing"), 4) == pytest.approx(found, rel=1e-4)
    assert sigmas_of(DDIMScheduler(**NOISE, set_alpha_to_one=False), 4)[4] == pytest.approx(0.0292, abs=1e-4)


def test_stable_diffusion_cpp_gets_what_it_draws_as_diffusers_does() -> None:
    whole = resolve("random:sd15")
    counts = parameters_of(check_model(whole))
    assert counts[0] == 859_520_964
    assert counts[1] == sum(
        weight.numel() for part in whole.parts for weight in empty(part, whole.config(part)).state_dict().values()
    )
    for model, why in (
        ("demo", r"the UNet of 'demo' .* is like that of no published model"),
        ("random:ssd-1b", "text to image of Stable Diffusion 1.x and 2.x alone"),
    ):
        with pytest.raises(ModelError, match=why):
            check_model(resolve(model))


def test_a_model_with_another_noise_is_not_for_stable_diffusion_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    rest = SimpleNamespace(scheduler=DDIMScheduler(**NOISE | {"beta_end": 0.02}))
    monkeypatch.setattr(sdcpp, "load_rest", lambda source: rest)
    with pytest.raises(ModelError, match=r"was trained with beta_end 0\.02, not with Stable Diffusion's noise"):
        check_model(resolve("random:sd15"))


def test_stable_diffusion_cpp_is_planned_on_a_models_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "peer_problem", lambda peer: None)
    wish = Wish(("stable-diffusion-cpp", "stable-diffusion-cpp-fp16"), None, (64, 64), tmp_path)
    ddim = replace(wish, runs=RunsAsked(scheduler="ddim"))
    rows = make_plan(["random:sd15-tiny"], ddim).subjects
    assert [(row.label, row.precision, row.bundle) for row in rows] == [
        ("random-sd15-tiny stable-diffusion-cpp", "fp32", None),
        ("random-sd15-tiny stable-diffusion-cpp-fp16", "fp16", None),
    ]
    pndm = replace(wish, runs=RunsAsked(scheduler="pndm"))
    with pytest.raises(InputError, match="stable-diffusion-cpp has no PNDMScheduler: give --scheduler ddim or euler"):
        make_plan(["random:sd15-tiny"], pndm)
    with pytest.raises(
        ModelError, match=r"stable-diffusion-cpp does not run 'demo': the .*; leave target 'stable-diff"
    ):
        make_plan(["demo"], ddim)


def test_what_genai_has_no_pipeline_for_is_refused_before_engines_are_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusals, "peer_problem", lambda peer: None)
    wish = Wish(("openvino-genai",), None, None, tmp_path, runs=RunsAsked(scheduler="ddim"))
    with pytest.raises(ModelError, match=r"openvino-genai does not run 'random:sdxl': it is compared on text to image"):
        make_plan(["random:sdxl"], wish)
    assert list(tmp_path.iterdir()) == []
    plain = resolve("random:sd15")
    check_plain(plain)
    for other in ({"in_channels": 9}, {"time_cond_proj_dim": 256}):
        source: Any = SimpleNamespace(family=plain.family, unet_config=plain.unet_config | other)
        with pytest.raises(ModelError, match=r"text to image of Stable Diffusion 1\.x and 2\.x alone"):
            check_plain(source)


def test_a_subject_of_weights_takes_a_vae_and_loras_and_no_controlnet() -> None:
    subject = Subject("x", "random:sd15", "stable-diffusion-cpp", replaced=(("vae", RANDOM),))
    found = weights_of(subject)
    assert isinstance(found, WithVae)
    assert weights_of(replace(subject, replaced=())) is not found
    with pytest.raises(InputError, match="stable-diffusion-cpp takes no controlnet"):
        weights_of(replace(subject, replaced=(("controlnet", RANDOM),)))


def test_samples_of_images_drawn_in_a_row_are_one() -> None:
    assert together([Sample(1.0, 2.0), Sample(0.5, 0.25)]) == Sample(1.5, 2.25)
