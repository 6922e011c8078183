"""Target inductor: what a build needs, and what is refused before minutes are spent."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from graph_bundles import graph_bundle
from traced_programs import GraphUNet, with_program

from export import build_engine
from export.build import inductor_package
from export.build.job import Job
from export.build.options import BuildOptions
from sdkd.bundle.manifest import Bundle
from sdkd.bundle.onnx_weights import torch_weights
from sdkd.bundle.program import PROGRAM_FILE
from sdkd.core.profiles import Range, ShapeRanges
from sdkd.errors import BuildError, BundleError, EngineError, InputError
from sdkd.targets import inductor
from sdkd.targets.plan import plan_for_model, plan_for_onnx
from sdkd.targets.registry import TARGETS, availability

SMALL = ShapeRanges(Range.fixed(1), Range.fixed(32), Range.fixed(32), Range.fixed(77))


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """The hand-written UNet with its traced program."""
    return with_program(graph_bundle(tmp_path / "bundle", components=("unet", "vae_decoder", "text_encoder")))


def built(bundle: Bundle, **options: Any) -> Bundle:
    return build_engine(bundle, "inductor", ranges=SMALL, components=("unet",), **options)


def nothing_was_left(bundle: Bundle) -> bool:
    return not Bundle.open(bundle.path).manifest.engines and not (bundle.path / "engines").exists()


def test_bf16_is_compared_with_the_program_itself(tmp_path: Path) -> None:
    bundle = with_program(graph_bundle(tmp_path / "bundle", "bf16", components=("unet", "vae_decoder", "text_encoder")))
    record = built(bundle).engine("inductor", "unet")
    assert record.precision == "bf16"
    assert record.parity is not None
    assert 0 <= record.parity["relative"] < 1e-2


def test_a_bundle_without_its_program_is_refused(bundle: Bundle) -> None:
    (bundle.path / "unet" / PROGRAM_FILE).unlink()
    with pytest.raises(BundleError, match=r"unet/program.pt2 is missing: export the model again"):
        built(bundle)
    without = replace(bundle.component("unet"), program=None)
    bundle = Bundle(bundle.path, replace(bundle.manifest, components={**bundle.manifest.components, "unet": without}))
    bundle.save()
    with pytest.raises(BuildError, match=r"unet .*without its traced program \(program.pt2\).*export the model again"):
        built(bundle)
    assert nothing_was_left(bundle)


def test_a_program_that_somebody_else_made_is_not_run(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other-home"))
    with pytest.raises(EngineError, match=r"the traced program .* is code that would run .*SDKD_TRUSTED=[0-9a-f]{64}"):
        built(bundle)
    assert nothing_was_left(bundle)


def test_a_program_of_another_model_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    class Wider(GraphUNet):
        def forward(self, sample: Any, timestep: Any, encoder_hidden_states: Any) -> Any:
            return (super().forward(sample, timestep, encoder_hidden_states)[0] * self.conv.shape[0],)

    weights = torch_weights(bundle.path / "unet" / "model.onnx")
    other = Wider({"conv": weights["conv"].half(), "to_out": weights["to_out"].half()})
    copy = Bundle.open(Path(shutil.copytree(bundle.path, tmp_path / "other")))
    with pytest.raises(
        BundleError, match=r"takes the weight 'module.conv' as .*float16.*has .*float32: export the model"
    ):
        built(with_program(copy, other.float().to(torch.float16)))


def test_without_a_compiler_the_need_is_named_before_anything_starts(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    found = availability("inductor")
    assert (found.can_build, found.can_run) == (False, True)
    with pytest.raises(
        BuildError,
        match=r"no C\+\+ compiler \(CXX is 'no-such-compiler', which is not there\). To do: .*apt install g\+\+",
    ):
        built(bundle)
    assert nothing_was_left(bundle)


def test_on_a_gpu_triton_is_needed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "gpu", lambda: {"gpu": "NVIDIA H200", "compute_capability": "9.0"})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert inductor.missing() == ("triton is not installed, which writes the kernels for a GPU", "pip install triton")


def test_the_usual_precision_is_half_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan_for_model("inductor").precision == "fp32"
    monkeypatch.setattr("sdkd.targets.registry.gpu", lambda: {"gpu": "NVIDIA H200", "compute_capability": "9.0"})
    assert plan_for_model("inductor").precision == "fp16"
    assert plan_for_onnx("inductor", None, "bf16", "it").slot == "inductor"
    with pytest.raises(InputError, match=r"it is fp32, which inductor would build as a slow fp32 engine"):
        plan_for_onnx("inductor", None, "fp32", "it")


@pytest.mark.parametrize(
    ("device", "level", "added"),
    [
        ("cpu", None, set()),
        ("cuda", None, {"max_autotune", "coordinate_descent_tuning"}),
        ("cuda", 2, set()),
        ("cuda", 5, {"max_autotune", "coordinate_descent_tuning", "max_autotune_gemm_search_space"}),
    ],
)
def test_kernels_are_timed_on_a_gpu_from_the_usual_level_on(
    bundle: Bundle, device: str, level: int | None, added: set[str]
) -> None:
    options = BuildOptions(optimization_level=level).changed()
    job = Job("unet", "inductor", "fp16", "", "", bundle.component("unet").contract, (), (), {
        "device": device, "options": options,
    })  # fmt: skip
    assert set(inductor_package._options(job)) - set(inductor_package.PACKAGE) == added


def test_options_of_other_targets_are_refused_by_name(bundle: Bundle) -> None:
    with pytest.raises(InputError, match=r"--refit cannot be had for inductor: it is an option of tensorrt"):
        built(bundle, options=BuildOptions(refit="lora"))


def test_eight_bits_are_refused(bundle: Bundle) -> None:
    with pytest.raises(InputError, match=r"inductor has no int8 \(it has fp32, fp16, bf16\)"):
        built(bundle, precision="int8")


def test_every_target_has_a_builder_and_one_that_opens_it() -> None:
    from engines.pipelines.layers import _READERS
    from engines.pipelines.parts import ORDER
    from engines.sessions.opening import OPENERS
    from export.build.run import BUILDERS

    assert set(TARGETS) == set(BUILDERS) == set(OPENERS) == set(ORDER) == set(_READERS)
