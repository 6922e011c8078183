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
from drawn import agree, differ, draw, save_lora
from helpers import fixed_weights, tiny_pipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from small_exports import small_pipeline

from engines import load_pipeline, plug, swap_weights
from engines.modules.components import EngineUNet
from engines.sessions import onnxruntime_session as session_onnxruntime
from sdkd.errors import EngineError, InputError, ModelError
from sdkd.students.blocks import build_student
from sdkd.targets import ort_attention as onnx_attention


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


def test_adapters_do_on_engines_what_they_do_eagerly(
    engine_bundle: Path, loras: dict[str, Path], base: np.ndarray
) -> None:
    pipe = plug(small_pipeline(), engine_bundle, "openvino")
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


@pytest.mark.parametrize("alphas", [None, {"up_blocks.1.resnets.2.conv1": 2, "mid_block.resnets.0.conv1": 2}])
def test_a_lora_of_the_teacher_fits_a_student_by_the_layer_map(
    alphas: dict[str, float] | None, engine_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    teacher, pipe = tiny_pipeline(), tiny_pipeline(student="tiny")
    student = pipe.unet
    session = load_pipeline(engine_bundle, "onnxruntime").unet.session  # never run: what is added to it counts
    pipe.unet = EngineUNet(session, student.config, torch.float32, torch.device("cpu"))

    def added() -> dict[str, torch.Tensor]:
        return {name: delta() for name, delta in pipe.unet.weights._wanted.deltas.items()}

    pipe.load_lora_weights(save_lora(teacher, tmp_path / "lora", 3, alphas=alphas), adapter_name="style")
    teacher.load_lora_weights(tmp_path / "lora")
    teacher.fuse_lora()
    teacher.unload_lora_weights()
    fused, plain = build_student(teacher.unet, "tiny").state_dict(), student.state_dict()
    changed = {name: fused[name] - plain[name] for name in plain if not torch.equal(fused[name], plain[name])}
    torch.testing.assert_close(added(), changed, atol=1e-6, rtol=1e-4)
    assert "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight" in changed
    pipe.unload_lora_weights()
    assert added() == {}
    state, expected = {}, {}  # a LoRA of the student itself, which begins at the student's edge
    for path in ("conv_in", "time_embedding.linear_1", "up_blocks.0.resnets.0.conv1"):
        weight, name = student.get_submodule(path).weight, f"lora_unet_{path.replace('.', '_')}"
        down, up = torch.randn(2, *weight.shape[1:]), torch.randn(weight.shape[0], 2, *(1, 1)[: weight.ndim - 2])
        state |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.0)}
        expected[f"{path}.weight"] = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape) / 2
    with caplog.at_level(logging.INFO, "engines"):
        pipe.load_lora_weights(state)
    assert "is taken for one of sd-tiny, since its layers are sd-tiny's and its teacher's at other pl" in caplog.text
    torch.testing.assert_close(added(), expected, atol=1e-5, rtol=1e-4)


def test_weights_of_a_checkpoint_by_name_or_of_another_architecture(engine_bundle: Path, tmp_path: Path) -> None:
    other = small_pipeline(seed=9)
    other.text_encoder, other.vae = small_pipeline().text_encoder, small_pipeline().vae
    other.save_pretrained(tmp_path / "tuned")
    pipe = load_pipeline(engine_bundle, "onnxruntime")
    swap_weights(pipe, tmp_path / "tuned")
    agree(draw(pipe), draw(other))
    state = small_pipeline().unet.state_dict()
    with pytest.raises(ModelError, match=r"0 are missing and 1 unknown \(first: more\)"):
        swap_weights(pipe, {**state, "more": torch.zeros(1)})
    with pytest.raises(ModelError, match=r"1 are missing and 0 unknown"):
        swap_weights(pipe, dict(list(state.items())[1:]))
    with pytest.raises(EngineError, match="unet of this StableDiffusionPipeline runs eagerly: plug an engine first"):
        swap_weights(other, None)
    with pytest.raises(InputError, match="part 'vae' has no weights to swap"):
        swap_weights(pipe, None, part="vae")


def test_what_engines_cannot_do_with_adapters_is_refused(engine_bundle: Path, tmp_path: Path) -> None:
    pipe = load_pipeline(engine_bundle, "onnxruntime")
    with pytest.raises(EngineError, match=r"hotswap: an engine takes adapters of any rank.* after delete_adapters"):
        pipe.load_lora_weights({}, hotswap=True)
    for name in ("fuse_lora", "unfuse_lora", "set_lora_device", "enable_lora_hotswap"):
        with pytest.raises(EngineError, match=rf"{name}: .*Leave it out"):
            getattr(pipe, name)()
    unet = small_pipeline().unet
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], use_dora=True, init_lora_weights=False))
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=state)
    with pytest.raises(EngineError, match=r"adapter '.*' is a DoRA"):
        pipe.load_lora_weights(tmp_path)
