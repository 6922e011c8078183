"""Adapters belong to a pipeline's parts: they stay through plugs, copies and unplugging, equal to weights by hand."""

from __future__ import annotations

import gc
import logging
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForImage2Image, StableDiffusionPipeline
from drawn import agree, differ, draw
from safetensors.torch import save_file
from small_exports import small_pipeline

from engines import load_pipeline, plug, unplug
from sdkd.errors import EngineError, InputError, ModelError

RANK = 4
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0."
UNET = ("conv_in", "conv_out", "time_embedding.linear_1", "down_blocks.0.resnets.0.conv1", f"{BLOCK}attn1.to_q",
        f"{BLOCK}attn1.to_out.0", f"{BLOCK}attn2.to_out.0", f"{BLOCK}attn2.to_k", f"{BLOCK}ff.net.2",
        "down_blocks.0.attentions.0.proj_in")  # fmt: skip
TEXT = ("layers.0.self_attn.q_proj", "layers.1.self_attn.out_proj", "layers.1.mlp.fc1")
Changes = dict[str, dict[str, torch.Tensor]]


class ByHand:
    """A kohya file whose alpha differs from layer to layer, and what each layer's weight becomes."""

    def __init__(self, file: Path, seed: int, unet: tuple[str, ...] = UNET, text: tuple[str, ...] = TEXT) -> None:
        pipe, self.file = small_pipeline(), file
        self.changes: Changes = {"unet": {}, "text_encoder": {}}
        self.state: dict[str, torch.Tensor] = {}
        generator = torch.Generator().manual_seed(seed)
        names = [("unet", name, name) for name in unet]
        names += [("text_encoder", name, self._text_name(pipe, name)) for name in text]
        for number, (part, name, path) in enumerate(names):
            self._add(part, name, path, getattr(pipe, part).get_submodule(path).weight, 1.0 + number, generator)
        save_file(self.state, file)

    @staticmethod
    def _text_name(pipe: Any, name: str) -> str:
        return next(path for path, _ in pipe.text_encoder.named_modules() if path.endswith(name))

    def _add(self, part: str, name: str, path: str, weight: Any, alpha: float, generator: torch.Generator) -> None:
        kernel = (1, 1)[: weight.ndim - 2]
        down = 0.3 * torch.randn(RANK, *weight.shape[1:], generator=generator)
        up = 0.3 * torch.randn(weight.shape[0], RANK, *kernel, generator=generator)
        prefix = "lora_unet_" if part == "unet" else "lora_te_text_model_encoder_"
        key = prefix + name.replace(".", "_")
        self.state |= {
            f"{key}.lora_down.weight": down,
            f"{key}.lora_up.weight": up,
            f"{key}.alpha": torch.tensor(alpha),
        }
        delta = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        self.changes[part][f"{path}.weight"] = alpha / RANK * delta

    def on(self, pipe: Any, scale: float = 1.0, parts: tuple[str, ...] = ("unet", "text_encoder")) -> Any:
        """The same eager pipeline with its weights changed."""
        for part in parts:
            own = getattr(pipe, part).state_dict()
            for name, delta in self.changes[part].items():
                own[name] += scale * delta
        return pipe


@pytest.fixture(scope="module")
def style(tmp_path_factory: pytest.TempPathFactory) -> ByHand:
    """A LoRA of both parts."""
    return ByHand(tmp_path_factory.mktemp("kohya") / "style.safetensors", 5)


@pytest.fixture(scope="module")
def drawn(style: ByHand) -> Callable[[float], np.ndarray]:
    """What the eager pipeline draws with the LoRA in its weights at a scale; 0: without it."""
    found: dict[float, np.ndarray] = {}

    def draw_at(scale: float) -> np.ndarray:
        if scale not in found:
            found[scale] = draw(style.on(small_pipeline(), scale))
        return found[scale]

    return draw_at


def test_alphas_that_differ_by_layer(engine_bundle: Path, style: ByHand, drawn: Callable[[float], np.ndarray]) -> None:
    pipe = load_pipeline(engine_bundle, "openvino")  # ONNX Runtime has its turn below
    pipe.load_lora_weights(style.file, adapter_name="style")
    agree(draw(pipe), drawn(1.0))
    differ(drawn(1.0), drawn(0.0))


def test_adapters_stay_through_every_change_of_parts(
    engine_bundle: Path, style: ByHand, drawn: Callable[[float], np.ndarray]
) -> None:
    names = {"unet": ["style"], "text_encoder": ["style"]}
    pipe = small_pipeline()
    plug(pipe, engine_bundle, "onnxruntime", components=["vae"], keep_eager=True)
    pipe.load_lora_weights(_peft(style), adapter_name="style")  # still diffusers' own
    pipe.set_adapters("style", 0.7)
    agree(draw(pipe), drawn(0.7))
    plug(pipe, engine_bundle, "onnxruntime", components=["text_encoder", "unet"], keep_eager=True)
    assert pipe.get_list_adapters() == names
    agree(draw(pipe), drawn(0.7))
    plug(pipe, engine_bundle, "openvino", components=["unet"], keep_eager=True)
    agree(draw(pipe), drawn(0.7))
    pipe.set_adapters("style", 0.3)
    agree(draw(pipe), drawn(0.3))
    pipe.disable_lora()
    plug(pipe, engine_bundle, "onnxruntime", components=["unet"], keep_eager=True)
    agree(draw(pipe), drawn(0.0))  # disabled ones are carried over disabled
    pipe.enable_lora()
    agree(draw(pipe), drawn(0.3))
    unplug(plug(pipe, engine_bundle, "onnxruntime", components=["vae"], keep_eager=True))
    assert pipe.get_list_adapters() == names
    assert pipe.get_active_adapters() == ["style"]
    agree(draw(pipe), drawn(0.3))
    pipe.unload_lora_weights()
    agree(draw(pipe), drawn(0.0))


def _peft(style: ByHand) -> dict[str, torch.Tensor]:
    """The same LoRA in names and scales that diffusers reads rightly: PEFT's, with alpha in the up matrix."""
    found = {}
    for key in [key.removesuffix(".alpha") for key in style.state if key.endswith(".alpha")]:
        part = "unet" if key.startswith("lora_unet_") else "text_encoder"
        flat = key.removeprefix("lora_unet_").removeprefix("lora_te_text_model_encoder_")
        full = (*UNET, *TEXT)[[name.replace(".", "_") for name in (*UNET, *TEXT)].index(flat)]
        full = full if part == "unet" else f"text_model.encoder.{full}"
        found[f"{part}.{full}.lora_A.weight"] = style.state[f"{key}.lora_down.weight"]
        found[f"{part}.{full}.lora_B.weight"] = (
            style.state[f"{key}.lora_up.weight"] * style.state[f"{key}.alpha"] / RANK
        )
    return found


def test_a_copy_changes_the_adapters_that_it_shares(
    engine_bundle: Path, style: ByHand, drawn: Callable[[float], np.ndarray]
) -> None:
    pipe = load_pipeline(engine_bundle, "onnxruntime")
    pipe.load_lora_weights(style.file, adapter_name="style")
    copies = AutoPipelineForImage2Image.from_pipe(pipe), StableDiffusionPipeline(**pipe.components)
    copies[0].set_adapters("style", 0.3)
    agree(draw(pipe), drawn(0.3))
    copies[1].disable_lora()
    agree(draw(pipe), drawn(0.0))
    copies[1].enable_lora()
    for copied in copies:
        assert copied.get_list_adapters() == {"unet": ["style"], "text_encoder": ["style"]}
        with pytest.raises(EngineError, match="fuse_lora: adapters are part of the engine's weights already"):
            copied.fuse_lora()
    agree(draw(copies[1]), drawn(0.3))
    copies[0].delete_adapters("style")
    assert pipe.get_list_adapters() == {}
    agree(draw(pipe), drawn(0.0))
    copies[0].load_lora_weights(style.file)
    agree(draw(pipe), drawn(1.0))
    pipe.unload_lora_weights()
    agree(draw(copies[1]), drawn(0.0))


def test_a_module_put_in_by_hand_takes_the_adapters_that_are_loaded_then(engine_bundle: Path, style: ByHand) -> None:
    pipe = load_pipeline(engine_bundle, "onnxruntime")
    pipe.load_lora_weights(style.file, adapter_name="old")
    pipe.unet = small_pipeline().unet
    assert pipe.get_list_adapters() == {"text_encoder": ["old"]}
    agree(draw(pipe), draw(style.on(small_pipeline(), parts=("text_encoder",))))
    pipe.unload_lora_weights()
    pipe.load_lora_weights(style.file, adapter_name="style")
    assert pipe.get_list_adapters() == {"unet": ["style"], "text_encoder": ["style"]}
    pipe.set_adapters("style", 0.5)
    agree(draw(pipe), draw(style.on(small_pipeline(), 0.5)))


def test_the_scale_of_one_call(engine_bundle: Path, style: ByHand, drawn: Callable[[float], np.ndarray]) -> None:
    pipe = load_pipeline(engine_bundle, "onnxruntime")
    swaps: list[int] = []
    for session in (pipe.unet.session, pipe.text_encoder.session):
        original = session.swap
        session.swap = lambda weights, swap=original: (swaps.append(len(weights)), swap(weights))[1]
    pipe.load_lora_weights(style.file, adapter_name="style")
    for scale in (0.5, -1.0, 1.0):  # weights change once, however often adapters do
        pipe.set_adapters("style", scale)

    def scaled(scale: float) -> np.ndarray:
        return draw(pipe, cross_attention_kwargs={"scale": scale})

    agree(scaled(0.3), drawn(0.3))
    agree(scaled(0.3), drawn(0.3))
    assert sorted(swaps) == [len(TEXT), len(UNET)]  # once for each engine, not for each step or image
    agree(scaled(0.0), drawn(0.0))
    agree(draw(pipe), drawn(1.0))  # the scale is that of the call
    plain, full = (style.on(small_pipeline(), scale).encode_prompt("a cat", "cpu", 1, False)[0] for scale in (0, 1))
    torch.testing.assert_close(
        pipe.encode_prompt("a cat", "cpu", 1, False, lora_scale=0.0)[0], plain, atol=1e-4, rtol=0
    )
    torch.testing.assert_close(pipe.encode_prompt("a cat", "cpu", 1, False)[0], full, atol=1e-4, rtol=0)
    assert (plain - full).abs().max() > 0.01


def test_what_is_refused_leaves_nothing_behind(engine_bundle: Path, style: ByHand) -> None:
    pipe = load_pipeline(engine_bundle, "onnxruntime")
    pipe.load_lora_weights(style.file, adapter_name="style")
    before = pipe.get_list_adapters()
    key = f"lora_unet_{BLOCK.replace('.', '_')}attn2_to_k"
    narrow = {f"{key}.lora_down.weight": torch.zeros(4, 2048), f"{key}.lora_up.weight": torch.zeros(32, 4)}
    more = {"lora_unet_conv_in.alphabet": torch.zeros(1)}
    one_bad = style.state | {"lora_unet_conv_in.lora_down.weight": torch.full((RANK, 4, 3, 3), float("nan"))}
    wide = style.state | {"lora_unet_conv_in.lora_down.weight": torch.zeros(RANK, 9, 3, 3)}
    deep = "lora_te_text_model_encoder_layers_7_mlp_fc1"
    text = {f"{deep}.{name}.weight": torch.zeros(4, 4) for name in ("lora_down", "lora_up")}
    second = {key.replace("lora_te_", "lora_te2_"): value for key, value in style.state.items()}
    dora = style.state | {"lora_unet_conv_in.dora_scale": torch.ones(1, 16)}
    for state, error, message in (
        (dora, EngineError, r"adapter 'new' is a DoRA \(by 'lora_unet_conv_in\.dora_scale'\)"),
        (narrow, ModelError, r"is for text embeddings 2048 \(sdxl\) wide, this model's are 32 wide"),
        (style.state | more, ModelError, r"has 1 of 40 weights whose names belong to no layer .*conv_in\.alphabet"),
        (one_bad, ModelError, r"no finite numbers, at 'lora_unet_conv_in"),
        (wide, ModelError, r"other widths: 'lora_unet_conv_in.* 16 x 9 x 3 x 3, conv_in is one of 16 x 4 x 3 x 3"),
        (second, ModelError, "layers for the text_encoder_2, and this pipeline has none"),
        (style.state | text, ModelError, "layers_7_mlp_fc1.*, a layer that this text encoder lacks"),
        ({f"unet.{BLOCK}attn1.to_x.lora_A.weight": torch.zeros(4, 16)}, ModelError, "without the up matrix"),
    ):
        with pytest.raises(error, match=message):
            pipe.load_lora_weights(state, adapter_name="new")
        assert pipe.get_list_adapters() == before
    with pytest.raises(InputError, match=r"adapter name 'style' is in use in the unet already"):
        pipe.load_lora_weights(style.file, adapter_name="style")
    with pytest.raises(InputError, match=r"adapter name 'style\.1' has a dot"):
        pipe.load_lora_weights(style.file, adapter_name="style.1")
    with pytest.raises(InputError, match="LoRA 'new' has no weights"):
        pipe.load_lora_weights({}, adapter_name="new")
    with pytest.raises(InputError, match=r"LoRA 'nowhere\.safetensors' does not exist: give a file"):
        pipe.load_lora_weights("nowhere.safetensors")
    with pytest.raises(InputError, match="adapter_weights nan is not finite"):
        pipe.set_adapters("style", float("nan"))
    assert pipe.get_list_adapters() == before
    assert pipe.get_active_adapters() == ["style"]


def test_the_eager_fallback_counts_the_adapters_once(engine_bundle: Path, style: ByHand) -> None:
    pipe = small_pipeline()
    pipe.load_lora_weights(_peft(style), adapter_name="style")
    plug(pipe, engine_bundle, "onnxruntime", eager_fallback=True)
    pipe.set_adapters("style", 0.2)
    agree(draw(pipe, height=96, width=96), draw(style.on(small_pipeline(), 0.2), height=96, width=96))
    with pytest.raises(EngineError, match="cannot be saved with adapters on it"):
        pipe.unet.save_pretrained("nowhere")
    pipe.unload_lora_weights()
    agree(draw(pipe, height=96, width=96), draw(small_pipeline(), height=96, width=96))


def test_a_fused_adapter_is_refused_before_an_engine_opens(engine_bundle: Path, style: ByHand) -> None:
    pipe = small_pipeline()
    pipe.load_lora_weights(_peft(style), adapter_name="style")
    pipe.fuse_lora()
    with pytest.raises(ModelError, match=r"'style' is fused into unet\.conv_in.*pipe\.unfuse_lora\(\) first"):
        plug(pipe, engine_bundle, "onnxruntime")
    assert type(pipe.unet).__name__ == "UNet2DConditionModel"
    pipe.unfuse_lora()
    agree(draw(plug(pipe, engine_bundle, "onnxruntime")), draw(style.on(small_pipeline())))


def test_an_adapter_of_another_kind_is_refused_at_the_plug(engine_bundle: Path) -> None:
    from peft import LoHaConfig, LoraConfig

    for config, kind in (
        (LoraConfig(r=2, target_modules=["to_q"], use_dora=True), "DoRA"),
        (LoHaConfig(r=2, target_modules=["to_q"]), "loha"),
        (LoraConfig(r=2, target_modules=["to_q"], modules_to_save=["conv_out"]), "a whole layer, ModulesToSaveWrapper"),
    ):
        pipe = small_pipeline()
        pipe.unet.add_adapter(config)
        with pytest.raises(ModelError, match=rf"(to_q|conv_out) has an adapter that engines do not take \({kind}\)"):
            plug(pipe, engine_bundle, "onnxruntime")


def test_a_load_prints_nothing_that_misleads(
    engine_bundle: Path, style: ByHand, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = load_pipeline(engine_bundle, "onnxruntime")
    unet = {name: value for name, value in style.state.items() if name.startswith("lora_unet_")}
    logger = logging.getLogger("diffusers")
    logger.propagate, before = True, logger.propagate
    try:
        with caplog.at_level(logging.WARNING), warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            for name in ("a", "b"):
                pipe.load_lora_weights(unet, adapter_name=name)
    finally:
        logger.propagate = before
    assert not caplog.records
    assert not warned
    assert pipe.get_list_adapters() == {"unet": ["a", "b"]}


@pytest.mark.parametrize("low_memory", [False, True])
def test_engines_with_adapters_go_with_their_pipeline(engine_bundle: Path, style: ByHand, low_memory: bool) -> None:
    pipe = load_pipeline(engine_bundle, "onnxruntime", low_memory=low_memory)
    pipe.load_lora_weights(style.file)
    draw(pipe)
    kept = [weakref.ref(pipe.unet), weakref.ref(pipe.text_encoder.session)]
    gc.collect()
    gc.disable()
    try:
        del pipe
        assert [ref() for ref in kept] == [None, None]
    finally:
        gc.enable()
