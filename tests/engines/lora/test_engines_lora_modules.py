"""The adapter methods of a single module do on its engine what they do eagerly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from drawn import agree, differ, draw
from peft import LoHaConfig, LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from small_exports import small_pipeline

from engines import load_pipeline, plug, unplug
from sdkd.errors import EngineError


def add(pipe: Any, name: str, seed: int = 1) -> None:
    """An adapter of both parts, the same for an engine as for an eager module."""
    for part, targets in (("unet", ["to_q", "conv1"]), ("text_encoder", ["q_proj"])):
        torch.manual_seed(seed)
        config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False)
        getattr(pipe, part).add_adapter(config, adapter_name=name)


def layers(module: torch.nn.Module) -> int:
    """How many adapter layers PEFT and diffusers see."""
    return sum(isinstance(layer, BaseTunerLayer) for layer in module.modules())


@pytest.fixture(scope="module")
def plugged(engine_bundle: Path) -> Any:
    """The small pipeline on engines of ONNX Runtime."""
    return load_pipeline(engine_bundle, "onnxruntime")


@pytest.fixture
def pipe(plugged: Any) -> Any:
    """That pipeline with two adapters, of which the second is active."""
    plugged.unload_lora_weights()
    add(plugged, "a")
    add(plugged, "b", seed=2)
    return plugged


@pytest.fixture(scope="module")
def drawn() -> Callable[..., np.ndarray]:
    """What the eager pipeline draws with some of the two adapters at these scales."""
    eager = small_pipeline()
    add(eager, "a")
    add(eager, "b", seed=2)

    def drawn_with(**scales: float) -> np.ndarray:
        if not scales:
            eager.disable_lora()
            return draw(eager)
        eager.enable_lora()
        eager.set_adapters(list(scales), list(scales.values()))
        return draw(eager)

    return drawn_with


def test_adapters_are_added_chosen_scaled_and_deleted(pipe: Any, drawn: Callable[..., np.ndarray]) -> None:
    agree(draw(pipe), drawn(b=1.0))
    assert pipe.unet.active_adapters() == pipe.text_encoder.active_adapters() == ["b"]
    assert pipe.get_list_adapters() == {"unet": ["a", "b"], "text_encoder": ["a", "b"]}
    pipe.unet.set_adapter("a")
    pipe.text_encoder.set_adapter("a")
    agree(draw(pipe), drawn(a=1.0))
    pipe.unet.set_adapters(["a", "b"], [0.4, 0.7])
    pipe.text_encoder.disable_adapters()
    with_both = draw(pipe)
    pipe.text_encoder.enable_adapters()
    differ(draw(pipe), with_both)
    pipe.set_adapters(["a", "b"], [0.4, 0.7])
    agree(draw(pipe), drawn(a=0.4, b=0.7))
    pipe.unet.delete_adapters("a")
    pipe.text_encoder.delete_adapter("a")
    agree(draw(pipe), drawn(b=0.7))
    assert list(pipe.unet.peft_config) == ["b"]
    for change in (pipe.unet.disable_adapters, pipe.text_encoder.disable_adapters):
        change()
    agree(draw(pipe), drawn())
    pipe.unet.unload_lora()
    assert layers(pipe.unet) == 0
    assert layers(pipe.text_encoder) == 1


def test_adapters_are_saved_and_loaded_by_their_module(
    pipe: Any, drawn: Callable[..., np.ndarray], tmp_path: Path
) -> None:
    state, config = pipe.text_encoder.get_adapter_state_dict("b"), pipe.text_encoder.peft_config["b"]
    assert {name for name in state if "layers.0" in name} == {
        f"{next(iter(state)).partition('layers')[0]}layers.0.self_attn.q_proj.lora_{half}.weight" for half in "AB"
    }
    pipe.unet.save_lora_adapter(tmp_path, adapter_name="b")
    pipe.unload_lora_weights()
    assert layers(pipe.unet) == layers(pipe.text_encoder) == 0
    agree(draw(pipe), drawn())
    pipe.unet.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True, adapter_name="again")
    pipe.text_encoder.load_adapter(adapter_state_dict=state, peft_config=config, adapter_name="again")
    agree(draw(pipe), drawn(b=1.0))


def test_what_peft_reads_of_an_engine_is_its_adapters(pipe: Any, tmp_path: Path) -> None:
    kept = get_peft_model_state_dict(pipe.unet, adapter_name="b")
    assert set(pipe.unet.state_dict()) == {
        name.replace(".weight", f".{adapter}.weight") for name in kept for adapter in "ab"
    }
    before = draw(pipe)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=kept,
        text_encoder_lora_layers=get_peft_model_state_dict(pipe.text_encoder, adapter_name="b"),
        unet_lora_adapter_metadata=pipe.unet.peft_config["b"].to_dict(),
        text_encoder_lora_adapter_metadata=pipe.text_encoder.peft_config["b"].to_dict(),
    )
    pipe.unload_lora_weights()
    assert pipe.unet.state_dict() == {}
    pipe.load_lora_weights(tmp_path)
    agree(draw(pipe), before)


def test_an_adapter_of_a_module_goes_back_with_it(engine_bundle: Path) -> None:
    pipe = plug(small_pipeline(), engine_bundle, "onnxruntime", keep_eager=True)
    add(pipe, "b")
    pipe.unet.set_adapters("b", 0.5)
    on_engines = draw(pipe)
    unplug(pipe)
    agree(draw(pipe), on_engines)
    assert pipe.unet.active_adapters() == ["b"]


def test_where_there_is_no_adapter_it_is_as_on_an_eager_module(pipe: Any) -> None:
    pipe.unload_lora_weights()
    assert getattr(pipe.unet, "peft_config", None) is None
    with pytest.raises(ValueError, match="No adapter loaded"):
        pipe.unet.active_adapters()
    with pytest.raises(ValueError, match="No adapter loaded"):
        pipe.text_encoder.set_adapter("a")
    with pytest.raises(EngineError, match="EngineUNet has no 'fuse_lora': adapters are part of the engine's weights"):
        pipe.unet.fuse_lora()
    assert layers(pipe.unet) == 0


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (LoraConfig(r=2, target_modules=["to_q"], use_dora=True), r"to_q would have something else \(DoRA\)"),
        (LoHaConfig(r=2, target_modules=["to_q"]), r"to_q would have something else \(loha\)"),
        (LoraConfig(r=2, target_modules=["to_q"], modules_to_save=["conv_out"]), r"ModulesToSaveWrapper"),
        (LoraConfig(r=2, target_modules=["to_q"], init_lora_weights="pissa"), r"'pissa' takes the layers' weights"),
    ],
)
def test_an_adapter_of_another_kind_is_refused_and_leaves_nothing(pipe: Any, config: Any, reason: str) -> None:
    before = pipe.unet.weights.version
    with pytest.raises(EngineError, match=reason):
        pipe.unet.add_adapter(config, adapter_name="other")
    with pytest.raises(EngineError, match=r"load_lora_adapter\(hotswap=True\): engines take adapters of any rank"):
        pipe.unet.load_lora_adapter({}, hotswap=True)
    assert pipe.unet.weights.version == before
    assert pipe.get_list_adapters()["unet"] == ["a", "b"]
    assert pipe.unet.active_adapters() == ["b"]
