"""LoRA on plugged pipelines: equal to eager at every scale, removed exactly, on students by the layer map."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from helpers import fixed_weights, tiny_pipeline
from lora_drawing import agree, differ, draw, save_lora
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from small_exports import small_pipeline

from engines import load_pipeline, plug, swap_weights, unplug
from engines.sessions import onnxruntime_session as session_onnxruntime
from export import build_engine, export_pipeline
from sdkd.core.profiles import Range, ShapeRanges
from sdkd.errors import EngineError, InputError, ModelError
from sdkd.students.blocks import build_student, recognised, remap_lora, teacher_layout
from sdkd.targets import ort_attention as onnx_attention

TARGETS = ("onnxruntime", "openvino")
RANGES = ShapeRanges(Range(1, 1, 2), Range.fixed(32), Range.fixed(32), Range.fixed(77))
LORA_FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two LoRAs for the small pipeline, the second with a text encoder's part."""
    folder, pipe = tmp_path_factory.mktemp("loras"), small_pipeline()
    return {"a": save_lora(pipe, folder / "a", 1), "b": save_lora(pipe, folder / "b", 2, text=True)}


@pytest.fixture(scope="module")
def base() -> np.ndarray:
    """What the small pipeline draws eagerly, without a LoRA."""
    return draw(small_pipeline())


def eagerly(change: Callable[[Any], Any]) -> np.ndarray:
    """What the eager pipeline draws after a change."""
    pipe = small_pipeline()
    change(pipe)
    return draw(pipe)


@pytest.mark.parametrize("target", TARGETS)
def test_adapters_do_on_engines_what_they_do_eagerly(
    engine_bundle: Path, loras: dict[str, Path], base: np.ndarray, target: str
) -> None:
    pipe = plug(small_pipeline(), engine_bundle, target)
    before = draw(pipe)
    agree(before, base)

    def load_a(it: Any) -> None:
        it.load_lora_weights(loras["a"], adapter_name="a")

    def both(it: Any) -> None:
        load_a(it)
        it.load_lora_weights(loras["b"], adapter_name="b")
        it.set_adapters(["a", "b"], [0.4, 0.8])

    load_a(pipe)
    with_a = draw(pipe)
    agree(with_a, eagerly(load_a))
    differ(with_a, base)
    assert pipe.get_active_adapters() == ["a"]
    pipe.load_lora_weights(loras["b"], adapter_name="b")
    pipe.set_adapters(["a", "b"], [0.4, 0.8])
    agree(draw(pipe), eagerly(both))
    pipe.delete_adapters("a")
    pipe.set_adapters("b")
    agree(draw(pipe), eagerly(lambda it: it.load_lora_weights(loras["b"])))  # B after A is B, not A + B
    assert pipe.get_list_adapters() == {"unet": ["b"], "text_encoder": ["b"]}
    pipe.disable_lora()
    np.testing.assert_array_equal(draw(pipe), before)
    pipe.enable_lora()
    differ(draw(pipe), before)
    pipe.unload_lora_weights()
    np.testing.assert_array_equal(draw(pipe), before)  # exactly the engine that was opened


def test_any_scale_and_none(engine_bundle: Path, loras: dict[str, Path]) -> None:
    pipe = load_pipeline(engine_bundle, "onnxruntime")
    pipe.load_lora_weights(loras["a"], adapter_name="a")
    pipe.set_adapters("a", -0.5)

    def scaled(it: Any) -> None:
        it.load_lora_weights(loras["a"], adapter_name="a")
        it.set_adapters("a", -0.5)

    agree(draw(pipe), eagerly(scaled))
    pipe.set_adapters("a", 0.0)
    agree(draw(pipe), eagerly(lambda it: None))


@pytest.mark.parametrize("target", TARGETS)
def test_a_kohya_file_does_what_it_does_eagerly(
    engine_bundle: Path, loras: dict[str, Path], base: np.ndarray, tmp_path: Path, target: str
) -> None:
    kohya = {}
    for name, tensor in load_file(loras["a"] / LORA_FILE).items():
        path, _, kind = name.removeprefix("unet.").removesuffix(".weight").rpartition(".")
        module = f"lora_unet_{path.removesuffix('.lora').replace('.', '_')}"
        kohya[f"{module}.lora_{'down' if kind in ('lora_A', 'down') else 'up'}.weight"] = tensor
        kohya[f"{module}.alpha"] = torch.tensor(2.0)  # half of the rank
    file = tmp_path / "style.safetensors"
    save_file(kohya, file)
    pipe = load_pipeline(engine_bundle, target)
    pipe.load_lora_weights(file)
    found = draw(pipe)
    agree(found, eagerly(lambda it: it.load_lora_weights(file)))
    differ(found, base)


def test_weights_change_once_however_often_adapters_do(
    engine_bundle: Path, loras: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = load_pipeline(engine_bundle, "onnxruntime")
    swaps: list[int] = []
    session = pipe.unet.session
    original = session.swap
    monkeypatch.setattr(session, "swap", lambda weights: (swaps.append(len(weights)), original(weights))[1])
    draw(pipe)
    assert swaps == []
    for scale in (0.1, 0.2, 0.3):
        if scale == 0.1:
            pipe.load_lora_weights(loras["a"], adapter_name="a")
        pipe.set_adapters("a", scale)
    draw(pipe)
    draw(pipe)
    assert swaps == [len(load_file(loras["a"] / LORA_FILE)) // 2]


def test_a_lora_of_the_teacher_fits_a_student_by_the_layer_map(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    teacher, student = tiny_pipeline(), tiny_pipeline(student="tiny")
    folder = save_lora(teacher, tmp_path / "lora", 3)
    bundle = export_pipeline(student, tmp_path / "bundle", components=("unet",), verify=False)
    student.save_config(bundle.path)
    student.vae.save_config(bundle.path / "vae_decoder")
    one = ShapeRanges(Range(1, 1, 2), Range.fixed(64), Range.fixed(64), Range.fixed(77))
    build_engine(bundle, "onnxruntime", ranges=one)
    pipe = plug(tiny_pipeline(student="tiny"), bundle.path, "onnxruntime", components=("unet",))
    pipe.load_lora_weights(folder, adapter_name="style")
    fused = tiny_pipeline()
    fused.load_lora_weights(folder)
    fused.fuse_lora()
    fused.unload_lora_weights()
    expected = tiny_pipeline(student="tiny")
    expected.unet = build_student(fused.unet, "tiny").eval()
    agree(draw(pipe, 64), draw(expected, 64))
    differ(draw(pipe, 64), draw(student, 64))
    pipe.unload_lora_weights()
    own = tiny_pipeline(student="tiny")  # a LoRA of the student itself, which begins at the student's edge
    places = {"lora_unet_conv_in": own.unet.conv_in.weight,
              "lora_unet_time_embedding_linear_1": own.unet.time_embedding.linear_1.weight,
              "lora_unet_up_blocks_0_resnets_0_conv1": own.unet.up_blocks[0].resnets[0].conv1.weight}  # fmt: skip
    state = {}
    for name, weight in places.items():
        down, up = 0.2 * torch.randn(2, *weight.shape[1:]), 0.2 * torch.randn(weight.shape[0], 2, *weight.shape[4:])
        up = up.reshape(*up.shape, *(1, 1)[: weight.ndim - 2])
        state |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.0)}
        weight += (up.flatten(1) @ down.flatten(1)).reshape(weight.shape) / 2
    with caplog.at_level(logging.INFO, "engines"):
        pipe.load_lora_weights(state)
    assert (
        "is taken for one of sd-tiny, since its layers are sd-tiny's and its teacher's at other places" in caplog.text
    )
    agree(draw(pipe, 64), draw(own, 64))


@pytest.mark.parametrize("name", ["small", "bk-small", "tiny"])
def test_a_student_is_recognised_by_its_config(name: str) -> None:
    unet = tiny_pipeline(student=name).unet
    spec = recognised(unet.config)
    assert spec is not None
    assert spec.short == name
    state = {"unet.down_blocks.1.attentions.0.proj_in.lora_A.weight": torch.zeros(1)}
    assert set(remap_lora(state, teacher_layout(unet.config), spec)) == set(state)


def test_a_teacher_is_no_student() -> None:
    assert recognised(tiny_pipeline().unet.config) is None


def test_a_fine_tuned_checkpoint_runs_in_the_same_engine(
    engine_bundle: Path, loras: dict[str, Path], base: np.ndarray
) -> None:
    other = small_pipeline()
    fixed_weights(other.unet, seed=9)
    pipe = load_pipeline(engine_bundle, "openvino")
    before = draw(pipe)
    swap_weights(pipe, other.unet.state_dict())
    agree(draw(pipe), draw(other))
    differ(draw(pipe), base)
    pipe.load_lora_weights(loras["a"], adapter_name="a")  # on top of the checkpoint's weights
    other.load_lora_weights(loras["a"], adapter_name="a")
    agree(draw(pipe), draw(other))
    pipe.unload_lora_weights()
    swap_weights(pipe, None)
    np.testing.assert_array_equal(draw(pipe), before)


def test_onnxruntime_s_own_attention_stays_when_weights_change(
    engine_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = load_pipeline(engine_bundle, "onnxruntime")
    assert pipe.unet.session.checked.record.flags["attention"] == "MultiHeadAttention"
    fused: list[int] = []
    monkeypatch.setattr(
        session_onnxruntime, "fuse_attention", lambda model: fused.append(onnx_attention.fuse_attention(model))
    )
    swap_weights(pipe, fixed_weights(small_pipeline().unet, seed=9).state_dict())
    draw(pipe)
    assert fused == [6]


def test_a_checkpoint_by_name(engine_bundle: Path, tmp_path: Path) -> None:
    other = small_pipeline()
    fixed_weights(other.unet, seed=9)
    other.save_pretrained(tmp_path / "tuned")
    pipe = load_pipeline(engine_bundle, "onnxruntime")
    swap_weights(pipe, tmp_path / "tuned")
    agree(draw(pipe), draw(other))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {**state, "more": torch.zeros(1)}, r"0 are missing and 1 unknown \(first: more\)"),
        (lambda state: {key: state[key] for key in list(state)[1:]}, r"1 are missing and 0 unknown"),
    ],
)
def test_weights_of_another_architecture_are_refused(engine_bundle: Path, change: Any, message: str) -> None:
    pipe = load_pipeline(engine_bundle, "onnxruntime")
    with pytest.raises(ModelError, match=message):
        swap_weights(pipe, change(small_pipeline().unet.state_dict()))


def test_what_has_no_weights_to_swap_says_so(engine_bundle: Path) -> None:
    with pytest.raises(EngineError, match="unet of this StableDiffusionPipeline runs eagerly: plug an engine first"):
        swap_weights(small_pipeline(), None)
    with pytest.raises(InputError, match="part 'vae' has no weights to swap"):
        swap_weights(load_pipeline(engine_bundle, "onnxruntime"), None, part="vae")


@pytest.mark.parametrize("name", ["fuse_lora", "unfuse_lora", "set_lora_device", "enable_lora_hotswap"])
def test_what_engines_cannot_do_with_adapters_is_refused(engine_bundle: Path, name: str) -> None:
    pipe = load_pipeline(engine_bundle, "onnxruntime")
    with pytest.raises(EngineError, match=rf"{name}: .*Leave it out"):
        getattr(pipe, name)()


def test_a_dora_is_refused(engine_bundle: Path, tmp_path: Path) -> None:
    unet = small_pipeline().unet
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], use_dora=True, init_lora_weights=False))
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=state)
    pipe = load_pipeline(engine_bundle, "onnxruntime")
    with pytest.raises(EngineError, match=r"adapter '.*' is a DoRA"):
        pipe.load_lora_weights(tmp_path)


def test_unplugging_gives_the_eager_modules_the_adapters_that_there_are(
    engine_bundle: Path, loras: dict[str, Path]
) -> None:
    pipe = plug(small_pipeline(), engine_bundle, "onnxruntime", keep_eager=True)
    pipe.load_lora_weights(loras["b"], adapter_name="b")
    pipe.set_adapters("b", 0.5)
    plugged = draw(pipe)
    unplug(pipe)
    assert type(pipe.unet).__name__ == "UNet2DConditionModel"
    assert pipe.get_list_adapters() == {"unet": ["b"], "text_encoder": ["b"]}
    agree(draw(pipe), plugged)
    pipe.unload_lora_weights()  # diffusers' own
    agree(draw(pipe), eagerly(lambda it: None))
