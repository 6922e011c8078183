"""Targets tensorrt and tensorrt-rtx: real plans, built without a GPU; progress; refusals; a full-size UNet (slow)."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import psutil
import pytest
from graph_bundles import ONNX_TYPES, ending, graph_bundle
from onnx import TensorProto, helper

from export import build_engine, export_pipeline
from export.build import tensorrt_plan as build_tensorrt
from export.build.job import Job, Run
from export.build.onnxruntime_graph import open_reference
from export.build.run import build_all
from export.build.tensorrt_progress import SILENT, PhaseTree, progress_monitor, silent_seconds
from sdkd.bundle.manifest import Bundle, Manifest
from sdkd.core.child import run_in_child
from sdkd.core.contract import Contract, TensorSpec
from sdkd.errors import BuildError, ValuesError
from sdkd.families import STABLE_DIFFUSION
from sdkd.targets.nvidia import gpu

RTX = "tensorrt-rtx"


@pytest.fixture(scope="module", autouse=True)
def trt() -> ModuleType:
    """The library, or skip."""
    pytest.importorskip("polygraphy")
    return pytest.importorskip("tensorrt_rtx")


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A fresh fp16 bundle of small graphs."""
    return graph_bundle(tmp_path / "bundle", "fp16")


def _versions() -> dict[str, str]:
    import tensorrt_rtx

    return {"tensorrt_rtx": tensorrt_rtx.__version__, "platform": f"{sys.platform}-{os.uname().machine}"}


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, list[tuple[str, float | None]]]:
    """An fp16 bundle of small graphs with its plans, and what was said while they were built; not to be changed."""
    seen: list[tuple[str, float | None]] = []
    bundle = graph_bundle(tmp_path_factory.mktemp("plans") / "bundle", "fp16")
    return build_engine(bundle, RTX, progress=lambda *event: seen.append(event)), seen


def test_all_components_are_built_for_every_gpu_from_ampere_on(plans: Any) -> None:
    result, _ = plans
    for name in STABLE_DIFFUSION.components:
        record = result.engine(RTX, name)
        assert (record.target, record.slot, record.precision) == (RTX, RTX, "fp16")
        assert [file.path for file in record.files] == [f"engines/{RTX}/{name}.engine"]
        assert record.total_bytes > 100_000
        assert record.environment == _versions()
        assert {"8.0", "8.6", "8.9", "12.0"} <= set(record.built_for)
        assert "7.5" not in record.built_for  # Turing must be asked for by name
        assert (record.parity["relative"] < 5e-2) if record.parity else not gpu()
        assert (record.flags["strongly_typed"], record.flags["tf32"]) == (True, False)
        assert (record.flags["plan_accelerators"], record.flags["plan_forward_compatible"]) == (["sm80"], True)
        result.verify_files(record)
        assert result.stale_reasons(record, _versions() | {"compute_capability": "8.9"}) == []
        assert "built for compute capability 8.0" in result.stale_reasons(record, {"compute_capability": "7.5"})[0]


def test_fresh_plans_are_kept(plans: Any) -> None:
    said: list[str] = []
    again = build_engine(plans[0], RTX, components=["unet"], progress=lambda message, _: said.append(message))
    assert again.manifest == plans[0].manifest
    assert said == [f"unet: {RTX} engine is fresh, reused"]


def test_progress_never_goes_back_and_ends_at_one(plans: Any) -> None:
    _, seen = plans
    fractions = [fraction for _, fraction in seen if fraction is not None]
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1]) == (0.0, 1.0)
    assert "unet: parsing the graph" in [message for message, _ in seen]
    assert "vae_decoder: building engine" in [message for message, _ in seen]


def test_a_bf16_graph_builds(tmp_path: Path) -> None:
    bundle = graph_bundle(tmp_path / "bundle", "bf16")
    assert build_engine(bundle, RTX, components=["unet"]).engine(RTX, "unet").precision == "bf16"


def test_a_graph_with_other_dtypes_than_the_contract_is_refused(bundle: Bundle) -> None:
    other = ending(bundle, "Cast", TensorProto.FLOAT, to=TensorProto.FLOAT)
    with pytest.raises(BuildError, match=r"outputs are out_sample float32.*contract says out_sample float16"):
        build_engine(other, RTX, components=["unet"])


def test_a_killed_builder_is_one_clear_message(bundle: Bundle) -> None:
    def kill(message: str, fraction: float | None) -> None:
        if message == "unet: building engine":
            for child in psutil.Process().children():
                child.send_signal(signal.SIGKILL)

    with pytest.raises(
        BuildError,
        match=r"unet could not be built for tensorrt-rtx: the process was ended by SIGKILL: "
        r"the system most likely ran out of memory. Try this: close other programs.*--components unet",
    ):
        build_engine(bundle, RTX, progress=kill)
    assert not (bundle.path / "engines").exists()
    assert Bundle.open(bundle.path).manifest.engines == {}


def _attention_job(folder: Path, width: int, precision: str) -> Job:
    """One Attention node of opset 23 with two heads of `width`, as the exporter leaves it in a UNet."""
    dtype = {"fp16": "float16", "fp32": "float32"}[precision]
    sides = {"query": "tokens", "key": "sequence", "value": "sequence"}
    inputs = tuple(TensorSpec(name, dtype, ("batch", 2, axis, width)) for name, axis in sides.items())
    contract = Contract("unet", inputs, (TensorSpec("out", dtype, ("batch", 2, "tokens", width)),))

    def infos(specs: Any) -> Any:
        return [helper.make_tensor_value_info(s.name, ONNX_TYPES[s.dtype], list(s.axes)) for s in specs]

    graph = helper.make_graph(
        [helper.make_node("Attention", list(sides), ["out"])], "attention", infos(inputs), infos(contract.outputs)
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])
    model.ir_version = 10
    home = folder / f"{precision}-{width}"
    home.mkdir()
    onnx.save_model(model, str(home / "model.onnx"))
    sizes = ({"batch": 1, "tokens": 64}, {"batch": 2, "tokens": 64}, {"batch": 8, "tokens": 256})
    profile = {spec.name: [list(spec.shape(size | {"sequence": 77})) for size in sizes] for spec in inputs}
    return Job("unet", RTX, precision, str(home / "model.onnx"), str(home), contract, (profile,), ())


# Widths of one head: 8 in tiny models, 40 to 160 in SD 1.x and 2.x, 512 in the VAE; fp16 has kernels for 12 to 256.
def test_attention_with_and_without_a_kernel_builds(tmp_path: Path) -> None:
    widths = {"fp16": (8, 40, 512), "fp32": (64,)}
    jobs = [_attention_job(tmp_path, width, precision) for precision in widths for width in widths[precision]]
    answers = run_in_child("export.build.run:build_all", {"jobs": [job.to_json() for job in jobs]})
    assert [answer["files"] for answer in answers] == [["unet.engine"]] * len(jobs)
    assert {answer["flags"]["attention"] for answer in answers} == {"1 attention layers, fused where a kernel exists"}


def _unet_job(bundle: Bundle) -> Job:
    """The small UNet, to be built and compared in this process, at 2 and at 1 latents of 16 x 16."""
    record, best = bundle.component("unet"), {"batch": 2, "height": 16, "width": 16, "sequence": 77}
    sizes = [best | {"batch": 1}, best, best | {"batch": 4}]
    profile = {spec.name: [list(spec.shape(one)) for one in sizes] for spec in record.contract.inputs}
    home = bundle.path / "built"
    home.mkdir()
    file = str(bundle.path / record.files[0].path)
    return Job("unet", RTX, "fp16", file, str(home), record.contract, (profile,), (best, sizes[0]))


def test_a_plan_is_compared_with_its_graph_where_a_gpu_is_there_for_it(
    trt: ModuleType, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime stands for the plan, which needs a GPU: first as it is, then a tenth away."""
    job, factors = _unet_job(bundle), [1.0, 1.1]

    def runner(job: Job, plan: memoryview) -> Run:
        reference, factor = open_reference(job.onnx), factors.pop(0)
        return lambda feeds: [array * factor for array in reference(feeds)]

    monkeypatch.setattr(build_tensorrt, "gpu", lambda: {"gpu": "one", "compute_capability": "8.9"})
    monkeypatch.setattr(build_tensorrt, "_runner", runner)
    monkeypatch.setattr(build_tensorrt, "_library", lambda _: trt)  # it builds in a process of its own
    monkeypatch.setattr(build_tensorrt, "_parse", lambda *_: (None, None, None))
    monkeypatch.setattr(build_tensorrt, "_allow_decomposition", lambda *_: "")
    monkeypatch.setattr(build_tensorrt, "_plan", lambda *_: memoryview(b"a plan"))
    (answer,) = build_all([job.to_json()])
    assert (answer["parity"]["relative"], answer["parity"]["shapes"]) == (0.0, ["2x4x16x16", "1x4x16x16"])
    with pytest.raises(ValuesError, match=r"engine of unet \(fp16\) is 0\.1 \(relative\) from its ONNX graph"):
        build_all([job.to_json()])


@pytest.mark.parametrize(
    ("here", "precision", "runs"),
    [
        ("8.9", "fp16", True),
        ("8.9", "bf16", False),  # no graph to compare with runs on the CPU
        ("7.5", "fp16", False),  # not built for that GPU
        (None, "fp16", False),
    ],
)
def test_plans_that_cannot_be_compared(
    monkeypatch: pytest.MonkeyPatch, here: str | None, precision: str, runs: bool
) -> None:
    monkeypatch.setattr(build_tensorrt, "gpu", lambda: here and {"gpu": "one", "compute_capability": here})
    job = Job("unet", RTX, precision, "", "", Contract("unet", (), ()), (), ())
    assert build_tensorrt._runs_here(job, ("8.6", "8.9")) == runs
    assert build_tensorrt._runs_here(job, ()) == (runs or here == "7.5")  # for the one here


def test_inputs_are_run_in_the_profile_that_holds_them() -> None:
    profiles = ({"a": [[1, 16], [1, 16], [4, 16]]}, {"a": [[1, 32], [1, 32], [2, 64]]})
    job = Job("unet", RTX, "fp16", "", "", Contract("unet", (), ()), profiles, ())
    assert [job.profile_for({"a": np.zeros(shape)}) for shape in ((4, 16), (2, 64))] == [0, 1]


@pytest.fixture
def seen() -> list[tuple[str, float]]:
    """What a phase tree reports."""
    return []


@pytest.fixture
def clock() -> list[float]:
    """A clock that the test moves."""
    return [0.0]


@pytest.fixture
def tree(seen: list[tuple[str, float]], clock: list[float]) -> PhaseTree:
    """A tree without weights: every step of a phase counts the same."""
    return PhaseTree(lambda text, done: seen.append((text, done or 0.0)), "other", 10.0, lambda: clock[0])


def test_nested_phases_become_one_fraction(tree: PhaseTree, seen: list[tuple[str, float]]) -> None:
    tree.start("Building engine", None, 2)
    tree.step("Building engine", 0)
    tree.start("Timing tactics", "Building engine", 4)
    tree.step("Timing tactics", 0)
    tree.step("Timing tactics", 1)
    assert seen == [
        ("building engine", 0.0),
        ("building engine", 0.5),
        ("timing tactics", 0.5),
        ("timing tactics", 0.625),
        ("timing tactics", 0.75),
    ]
    tree.finish("Timing tactics")
    tree.step("Building engine", 1)
    assert seen[-1] == ("building engine", 1.0)


def test_odd_phases_do_no_harm(tree: PhaseTree, seen: list[tuple[str, float]]) -> None:
    tree.step("never started", 3)
    tree.finish("never started")
    tree.tick()
    assert seen == []
    tree.start("a", "b", 0)
    tree.start("b", "a", 1)  # each other's parent
    tree.step("a", 99)
    assert all(0 <= fraction <= 1 for _, fraction in seen)


def test_the_silent_phase_moves_by_the_clock(
    tree: PhaseTree, seen: list[tuple[str, float]], clock: list[float]
) -> None:
    tree.start(SILENT, None, 1)
    for clock[0] in (5.0, 10.0, 1000.0):
        tree.tick()
    assert [round(fraction, 3) for _, fraction in seen] == [0.0, 0.393, 0.632, 1.0]
    assert silent_seconds(650_000_000) == pytest.approx(11.75)


def test_a_progress_that_fails_cancels_the_build(trt: ModuleType) -> None:
    def broken(message: str, fraction: float | None) -> None:
        raise BrokenPipeError("the parent is gone")

    with progress_monitor(trt, broken, RTX, 0) as monitor:
        assert isinstance(monitor, trt.IProgressMonitor)
        assert monitor.step_complete("unknown", 0) is True
        monitor.phase_start("Building engine", None, 6)  # fails, and may not raise here
        assert monitor.step_complete("Building engine", 0) is False


@pytest.mark.slow
@pytest.mark.parametrize(("target", "precision"), [(RTX, "fp16"), ("openvino", "fp32"), ("onnxruntime", "fp32")])
def test_all_exported_components_build(tmp_path: Path, target: str, precision: Any) -> None:
    import onnx
    from small_exports import small_pipeline

    bundle = export_pipeline(small_pipeline(), tmp_path / "bundle", precision=precision, verify=False)
    result = build_engine(bundle, target)
    for name in STABLE_DIFFUSION.components:
        record = result.engine(target, name)
        graph = onnx.load(result.path / result.component(name).files[0].path).graph
        assert record.total_bytes > sum(len(weight.raw_data) for weight in graph.initializer)
        if target != RTX or gpu():
            assert record.parity
            assert record.parity["relative"] < (5e-2 if target == RTX else 1e-5)


@pytest.mark.slow
def test_full_size_sd_tiny_unet_builds_without_a_gpu(tmp_path: Path) -> None:
    import torch
    from diffusers import UNet2DConditionModel
    from small_bundles import export_component

    blocks = 3
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    try:
        unet = UNet2DConditionModel(
            sample_size=64,
            cross_attention_dim=768,
            attention_head_dim=8,
            layers_per_block=1,
            mid_block_type=None,
            block_out_channels=(320, 640, 1280),
            down_block_types=("CrossAttnDownBlock2D",) * blocks,
            up_block_types=("CrossAttnUpBlock2D",) * blocks,
        )
    finally:
        torch.set_default_dtype(torch.float32)
    record = export_component(tmp_path, "unet", unet.eval().requires_grad_(False), "fp16")
    configs = {
        "vae_decoder": {"block_out_channels": [128, 256, 512, 512], "latent_channels": 4},
        "text_encoder": {"max_position_embeddings": 77, "hidden_size": 768, "vocab_size": 49408},
    }
    for name, config in configs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    bundle = Bundle(tmp_path, Manifest({"model": "random:sd15-tiny"}, {}, {"unet": record}))
    bundle.save()
    engine = build_engine(bundle, RTX).engine(RTX, "unet")
    assert record.parameters == 323_384_964
    assert 600e6 < engine.total_bytes < 700e6
    assert str(engine.ranges) == "batch 1..4, height 512 px, width 512 px, 77 tokens"
    assert engine.flags["attention"].startswith("18 attention layers")
    assert engine.precision == "fp16"
    assert {"8.6", "8.9", "12.0"} <= set(engine.built_for)
    assert engine.seconds < 300
