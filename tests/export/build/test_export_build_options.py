"""Options of a build: what they mean, what is refused by name and why, and that they are part of what is re-used."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from graph_bundles import CONFIGS, graph_bundle
from small_exports import half_unet

from export import build_engine
from export.build import engines, request
from export.build import tensorrt_plan as build_tensorrt
from export.build.job import Job
from export.build.options import GIB, BuildOptions, capabilities, check_options, difference
from export.build.request import plan_for, requests_for
from export.build.tensorrt_plan import config_arguments, lora_weights, mark_weights, refit_flags, touched
from sdkd.bundle.manifest import Bundle
from sdkd.core.components import component_contract
from sdkd.errors import BuildError, InputError
from sdkd.targets.plan import plan_for_model

RTX = "tensorrt-rtx"


@pytest.fixture(scope="module")
def trt() -> ModuleType:
    """The library, or skip."""
    pytest.importorskip("polygraphy")
    return pytest.importorskip("tensorrt_rtx")


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A fresh fp16 bundle of small graphs."""
    return graph_bundle(tmp_path / "bundle", "fp16")


def test_defaults_leave_no_trace() -> None:
    assert BuildOptions().changed() == {}
    options = BuildOptions(refit="lora", compute_capabilities=("12.0", "8.6", "8.6"), workspace_gb=1.5)
    assert options.changed() == {"refit": "lora", "compute_capabilities": ["8.6", "12.0"], "workspace_gb": 1.5}
    assert BuildOptions.of(json.loads(json.dumps(options.changed()))) == options


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimization_level": 6}, r"--optimization-level 6 is not one of 0 to 5"),
        ({"refit": "some"}, r"--refit 'some' is unknown: choose none, lora, all"),
        ({"hardware_compatible": "yes"}, r"--hardware-compatible 'yes' is unknown: choose none, ampere-plus, same"),
        ({"workspace_gb": 0}, r"--workspace-gb 0 is no size: give GiB, more than 0"),
        ({"memory_cap_gb": -1}, r"--memory-cap-gb -1 is no size"),
        ({"memory_cap_gb": float("nan")}, r"--memory-cap-gb nan is no size"),
        ({"compute_capabilities": ("89",)}, r"--compute-capability '89' is not understood: give numbers such as 8.6"),
        (
            {"compute_capabilities": ("current", "8.6", "8.9")},
            r"--compute-capability 'current' is this machine's GPU alone: leave out 8.6, 8.9, or name all by numbers",
        ),
    ],
)
def test_values_that_nobody_takes(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BuildOptions(**values)


@pytest.mark.parametrize(
    ("target", "values", "message"),
    [
        ("onnxruntime", {"refit": "all"}, r"--refit cannot be had for onnxruntime: it is an option of tensorrt and"),
        ("openvino", {"optimization_level": 3}, r"--optimization-level cannot be had for openvino: it is an option"),
        (
            RTX,
            {"hardware_compatible": "ampere-plus"},
            r"--hardware-compatible .* tensorrt-rtx: it is an option of tens",
        ),
        (RTX, {"compute_capabilities": ("9.9",)}, r"--compute-capability .* does not know 9.9 \(it knows 7.5, 8.0"),
    ],
)
def test_what_a_target_does_not_have(
    bundle: Bundle, trt: ModuleType, target: str, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        build_engine(bundle, target, options=BuildOptions(**values))
    assert not (bundle.path / "engines").exists()


def test_what_rtx_does_only_on_a_gpu(trt: ModuleType) -> None:
    with pytest.raises(
        InputError, match=rf"cannot be had for {RTX}: tensorrt_rtx .* only where there is an NVIDIA GPU"
    ):
        check_options(BuildOptions(refit="lora"), RTX, trt, has_gpu=False)
    with pytest.raises(InputError, match=r"such a plan is for one GPU generation: name it with --compute-capability"):
        check_options(BuildOptions(refit="lora"), RTX, trt, has_gpu=True)
    for one in ("8.9", "current"):
        check_options(BuildOptions(refit="lora", compute_capabilities=(one,)), RTX, trt, has_gpu=True)


def test_the_gpu_that_is_here_alone(trt: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    options = BuildOptions(compute_capabilities=("current",))
    assert options.changed() == {"compute_capabilities": ["current"]}
    assert BuildOptions.of(options.changed()) == options
    check_options(options, RTX, trt, has_gpu=True)
    with pytest.raises(
        InputError,
        match=r"--compute-capability cannot be had for tensorrt-rtx: 'current' is the NVIDIA GPU of this machine, and "
        r"torch sees none: name generations such as 8.6,8.9",
    ):
        check_options(options, RTX, trt, has_gpu=False)
    assert "compute_capabilities" not in config_arguments(trt, options)
    config = trt.Builder(trt.Logger(trt.Logger.INTERNAL_ERROR)).create_builder_config()
    build_tensorrt.set_checked(trt, config, (), current=True)
    assert config.num_compute_capabilities == 1
    here = {"gpu": "Example GPU", "compute_capability": "9.0"}  # one that the library does not name
    monkeypatch.setattr(build_tensorrt, "gpu", lambda: here)
    assert build_tensorrt._built_for(trt, RTX, options) == ("9.0",)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_library_itself_fails_there(bundle: Bundle, trt: ModuleType) -> None:
    """The reason for the refusal: should a later tensorrt_rtx build it, this fails, and the refusal must go."""
    code = (
        "import os, sys; os.environ['POLYGRAPHY_USE_TENSORRT_RTX'] = '1'\n"
        "import tensorrt_rtx as trt\n"
        "from polygraphy.backend.trt import EngineBytesFromNetwork, NetworkFromOnnxPath, Profile\n"
        "from polygraphy.backend.tensorrt_rtx import CreateConfigRTX\n"
        "builder, network, parser = NetworkFromOnnxPath(sys.argv[1], strongly_typed=True)()\n"
        "profile = Profile().add('sample', *[(1, 4, 16, 16)] * 3).add('encoder_hidden_states', *[(1, 77, 32)] * 3)\n"
        "config = CreateConfigRTX(profiles=[profile], compute_capabilities=[(8, 9)])(builder, network)\n"
        "config.set_flag(trt.BuilderFlag.REFIT)\n"
        "EngineBytesFromNetwork((builder, network, parser), config)()"
    )
    path = str(bundle.path / "unet/model.onnx")
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=120)
    assert "MyelinCheckException" in done.stdout + done.stderr


def test_arguments_for_polygraphy(trt: ModuleType) -> None:
    assert {"7.5", "8.0", "8.6", "8.9", "12.0"} <= set(capabilities(trt))
    plain = config_arguments(trt, BuildOptions())
    assert set(plain.values()) == {None}
    assert "compute_capabilities" not in plain
    level, pools = trt.HardwareCompatibilityLevel, trt.MemoryPoolType
    options = {"optimization_level": 1, "workspace_gb": 0.5, "memory_cap_gb": 2, "hardware_compatible": "ampere-plus"}
    assert config_arguments(trt, BuildOptions(**options, compute_capabilities=("8.6", "12.0"))) == {
        "memory_pool_limits": {pools.WORKSPACE: GIB // 2, pools.TACTIC_DRAM: 2 * GIB},
        "builder_optimization_level": 1,
        "hardware_compatibility_level": level.AMPERE_PLUS,
        "compute_capabilities": [(8, 6), (12, 0)],
    }
    assert [refit_flags(BuildOptions(refit=kind), marked) for kind, marked in (("none", False), ("all", False))] == [
        (), ("REFIT",),
    ]  # fmt: skip
    assert refit_flags(BuildOptions(refit="lora"), marked=True) == ("REFIT_INDIVIDUAL",)
    assert refit_flags(BuildOptions(refit="lora"), marked=False) == ("REFIT",)


def test_other_options_are_a_reason_to_build_again(bundle: Bundle, trt: ModuleType) -> None:
    def said(last: str = "", **values: Any) -> str:
        """The first message of a build, which goes no further than `last`."""
        heard: list[str] = []

        def hear(text: str, fraction: float | None) -> None:
            heard.append(text)
            if last and text.startswith(last):
                raise KeyboardInterrupt

        with contextlib.suppress(KeyboardInterrupt):
            build_engine(bundle, RTX, components=["unet"], options=BuildOptions(**values), progress=hear)
        return heard[0]

    assert said(optimization_level=0) == "unet: to build for tensorrt-rtx (not built yet)"
    assert said(optimization_level=0) == "unet: tensorrt-rtx engine is fresh, reused"
    assert said("unet: to build", workspace_gb=1) == (
        "unet: to build for tensorrt-rtx (built with --optimization-level 0, asked for default; "
        "built with --workspace-gb default, asked for 1)"
    )
    assert difference({"compute_capabilities": ["8.6"]}, {}) == [
        "built with --compute-capability 8.6, asked for default"
    ]


def test_a_compatible_engine_records_less_of_where_it_was_built(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = {"gpu": "Example GPU", "compute_capability": "8.9", "tensorrt": "10.9"}
    monkeypatch.setattr(engines, "built_environment", lambda _: here)
    (request,) = requests_for(bundle, plan_for(bundle, "onnxruntime"), None, ["unet"])
    for level, free in (
        ("none", set()),
        ("ampere-plus", {"gpu", "compute_capability"}),
        ("same-compute-capability", {"gpu"}),
    ):
        found = engines.recorded_environment(replace(request, flags={"options": {"hardware_compatible": level}}))
        assert set(here) - set(found) == free


# Weights that a LoRA can touch


def test_lora_weights_are_matrices_and_convolutions_of_blocks() -> None:
    file = half_unet()[3]
    names = lora_weights(_job("unet", file))
    for name in ("conv_in.weight", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"):
        assert name in names, name
    assert not [name for name in names if "norm" in name or name.endswith(".bias") or "time_embedding" in name]
    assert lora_weights(_job("vae_decoder", file)) == ()
    ranks = {
        "text_model.encoder.layers.0.self_attn.q_proj.weight": 2,
        "text_model.encoder.layers.0.mlp.fc1.weight": 2,
        "text_model.encoder.layers.0.mlp.fc1.bias": 1,
        "text_model.embeddings.token_embedding.weight": 2,
    }
    assert touched("text_encoder", ranks) == tuple(ranks)[:2]


def _job(component: str, file: Path) -> Job:
    contract = component_contract("unet", CONFIGS["unet"], "fp16")
    return Job(component, "tensorrt", "fp16", str(file), str(file.parent), contract, (), ())


def test_they_are_marked_in_the_network_of_a_real_export(trt: ModuleType) -> None:
    log = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    file = half_unet()[3]
    assert parser.parse_from_file(str(file))
    names = lora_weights(_job("unet", file))
    assert len(names) > 20
    assert mark_weights(trt, network, names) == names
    assert all(network.are_weights_marked_refittable(name) for name in names)
    assert not network.are_weights_marked_refittable("time_embedding.linear_1.weight")
    with pytest.raises(BuildError, match=r"has lost 1 of the 2 weights that a LoRA can touch, first 'gone'.*refit all"):
        mark_weights(trt, network, [names[0], "gone"])


# A memory cap


def test_a_cap_below_the_need_is_refused_with_both_numbers(bundle: Bundle) -> None:
    with pytest.raises(BuildError, match=r"need about 0.3 GB of memory, and 0.1 GB are free: close other programs"):
        build_engine(bundle, "onnxruntime", options=BuildOptions(memory_cap_gb=0.1))


def test_the_cap_is_strict() -> None:
    code = (
        "import sys, numpy; from export.build.run import cap_memory\n"
        "cap_memory({'target': sys.argv[1], 'flags': {'options': {'memory_cap_gb': 1}}})\n"
        "numpy.zeros(1 << 28)"  # 2 GiB
    )
    root = Path(__file__).parents[3]
    run = [sys.executable, "-c", code]
    capped = subprocess.run([*run, "onnxruntime"], capture_output=True, text=True, cwd=root)
    assert "MemoryError" in capped.stderr
    left_to_the_library = subprocess.run([*run, "tensorrt"], capture_output=True, text=True, cwd=root)
    assert left_to_the_library.returncode == 0


@pytest.mark.parametrize(
    ("target", "here", "asked", "found"),
    [
        (
            RTX,
            None,
            ("8.6", "8.9"),
            r"fp8 needs a GPU of compute capability 8.9 or later .*, and this is 8.6: build with",
        ),
        (RTX, "8.6", ("current",), "and this is 8.6: build with --precision int8"),
        (RTX, "8.6", ("8.9", "12.0"), ""),  # built here for others
        (RTX, None, (), ""),
        ("tensorrt", "7.0", (), "and this is 7.0: build with --precision fp16"),
        ("tensorrt", "9.0", (), ""),
    ],
)
def test_fp8_is_refused_for_a_gpu_that_has_none(
    monkeypatch: pytest.MonkeyPatch, target: str, here: str | None, asked: tuple[str, ...], found: str
) -> None:
    monkeypatch.setattr(request, "gpu", lambda: None if here is None else {"gpu": "x", "compute_capability": here})
    plan, options = plan_for_model(target, "fp8"), BuildOptions(compute_capabilities=asked)
    with pytest.raises(InputError, match=found) if found else contextlib.nullcontext():
        request.check_quantized(plan, options)
