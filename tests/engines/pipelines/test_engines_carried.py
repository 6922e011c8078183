"""What a pipeline carries beyond a bundle is refused by name before an engine is opened; nothing is lost at a seam."""

from __future__ import annotations

import copy
import pickle
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderTiny,
    MultiControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from diffusers.models.attention_processor import AttnProcessor, SlicedAttnProcessor
from drawn import agree, draw
from helpers import fixed_weights
from small_bundles import TINY_VAE, small_controlnet
from small_exports import small_pipeline

from engines import load_pipeline, plug, swap_weights, unplug
from engines.modules.base import EngineModule
from engines.modules.components import EngineControlNet, EngineUNet
from engines.sessions.opening import open_session
from engines.sessions.weights import EngineWeights
from sdkd.bundle.manifest import Bundle
from sdkd.bundle.onnx_index import stored_weights_of
from sdkd.bundle.onnx_weights import read_weights
from sdkd.errors import EngineError, InputError, ModelError
from sdkd.workflow import rebuild

TO_V = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v.weight"


@pytest.fixture
def pipe() -> StableDiffusionPipeline:
    """The pipeline that `engine_bundle` was exported from."""
    return small_pipeline()


def tuned(pipe: Any, part: str = "unet", name: str = TO_V, factor: float = 1.01) -> None:
    getattr(pipe, part).get_parameter(name).data.mul_(factor)


def patched_class(pipe: Any) -> None:
    """As token merging patches blocks."""
    block = next(m for m in pipe.unet.modules() if type(m).__name__ == "BasicTransformerBlock")
    block.__class__ = type("ToMeBlock", (type(block),), {})


def more_tokens(pipe: Any) -> None:
    """As textual inversion adds them."""
    pipe.tokenizer = copy.deepcopy(pipe.tokenizer)
    pipe.tokenizer.add_tokens([f"<cat-{index}>" for index in range(90)])
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer), mean_resizing=False)


def asymmetric_vae() -> AsymmetricAutoencoderKL:
    """What inpainting pipelines may have."""
    return AsymmetricAutoencoderKL(norm_num_groups=4, down_block_out_channels=(8,), up_block_out_channels=(8,))


def own_attention(pipe: Any) -> None:
    pipe.unet.set_attn_processor(type("Prompt2Prompt", (AttnProcessor,), {})())


CARRIED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "fine-tuned UNet": (tuned, rf"unet of this pipeline \(UNet2DConditionModel\) .*than unet of .*: {TO_V} differs\."),
    "text encoder": (
        lambda p: tuned(p, "text_encoder", "encoder.layers.1.self_attn.q_proj.weight"),
        r"text_encoder of .*encoder\.layers\.1\.self_attn\.q_proj\.weight differs",
    ),
    "another VAE": (
        lambda p: fixed_weights(p.vae, seed=8),
        r"vae of .*AutoencoderKL.* differs \(\d+ more\)\. Export this pipeline.*check_weights='none'.*swap_weights",
    ),
    "encoder of the VAE": (lambda p: tuned(p, "vae", "quant_conv.bias"), r"vae_encoder .*quant_conv\.bias differs"),
    "TAESD": (lambda p: setattr(p, "vae", AutoencoderTiny(**TINY_VAE)), r"vae of this .* \(AutoencoderTiny\) has"),
    "asymmetric VAE": (
        lambda p: setattr(p, "vae", asymmetric_vae()),
        r"the vae of this StableDiffusionPipeline is an AsymmetricAutoencoderKL, which is not exported: sdkd exports "
        r"AutoencoderKL or AutoencoderTiny",
    ),
    "DeepCache": (lambda p: setattr(p.unet, "forward", p.unet.forward), r"unet of .* a forward of its own.*DeepCache"),
    "ToMe": (patched_class, r"unet\.down_blocks.* code of its own \(.*ToMeBlock\).*tomesd\.remove_patch"),
    "circular padding": (
        lambda p: setattr(p.unet.conv_in, "padding_mode", "circular"),
        r"unet\.conv_in .* another padding_mode than its config says.*circular padding",
    ),
    "activation": (lambda p: setattr(p.unet, "conv_act", torch.nn.GELU()), r"unet\.conv_act .* another class than its"),
    "epsilon": (
        lambda p: setattr(p.text_encoder.encoder.layers[0].layer_norm1, "eps", 0.1),
        r"text_encoder\.encoder\.layers\.0\.layer_norm1 .* another eps than",
    ),
    "one number": (
        lambda p: p.unet.conv_out.weight.data[1, 2, 0, 1].add_(0.1),
        r"unet of bundle .*: conv_out\.weight differs\.",
    ),
    "attention": (own_attention, r"attention of its own \(Prompt2Prompt\).*set_default_attn_processor"),
    "textual inversion": (
        more_tokens,
        r"knows 4 tokens more than the 600 of .*\('<cat-86>', '<cat-87>', '<cat-88>'\).*unload_textual_inversion",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", CARRIED)
def test_what_an_engine_would_be_without_is_refused_by_name(
    engine_bundle: Path, pipe: StableDiffusionPipeline, what: str
) -> None:
    change, message = CARRIED[what]
    change(pipe)
    before = dict(pipe.components)
    with pytest.raises(ModelError, match=message):
        plug(pipe, engine_bundle, "onnxruntime")
    assert pipe.components == before


def harmless(pipe: Any) -> None:
    """Other kernels, memory for time, and what transformers leaves behind when it captures hidden states."""
    pipe.unet.set_attn_processor(SlicedAttnProcessor(1))
    pipe.vae.set_attn_processor(AttnProcessor())
    pipe.unet.enable_gradient_checkpointing()
    pipe.text_encoder(torch.zeros(1, 77, dtype=torch.long), output_hidden_states=True)
    pipe.fuse_qkv_projections()
    pipe.unfuse_qkv_projections()
    pipe.text_encoder.config.vocab_size += 1  # as unload_textual_inversion leaves it
    pipe.unet = torch.compile(pipe.unet)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_other_kernels_and_rounding_are_no_other_weights(
    engine_bundle: Path, pipe: StableDiffusionPipeline, dtype: torch.dtype
) -> None:
    harmless(pipe)
    plug(pipe.to(dtype), engine_bundle, "onnxruntime", check_weights="all", keep_eager=True)
    assert isinstance(pipe.unet, EngineUNet)
    assert type(unplug(pipe).unet).__name__ == "UNet2DConditionModel"


def test_how_much_is_compared_is_ones_choice(engine_bundle: Path, pipe: StableDiffusionPipeline) -> None:
    pipe.text_encoder.get_input_embeddings().weight.data[100, 7] += 1  # of 19,200 numbers: no sample has it
    plug(pipe, engine_bundle, "onnxruntime", components="vae", check_weights="sample")
    with pytest.raises(ModelError, match=r"token_embedding\.weight differs\."):
        plug(pipe, engine_bundle, "onnxruntime", check_weights="all")
    assert isinstance(plug(pipe, engine_bundle, "onnxruntime", check_weights="none").unet, EngineUNet)
    with pytest.raises(InputError, match=r"check_weights is 'some': choose from sample, all, none"):
        plug(pipe, engine_bundle, "onnxruntime", check_weights="some")  # type: ignore[arg-type]


def test_the_index_finds_every_weight_where_it_lies(engine_bundle: Path) -> None:
    file = engine_bundle / "unet" / "model.onnx"
    found = stored_weights_of(file)
    state = small_pipeline().unet.state_dict()
    assert set(found) == set(state)
    for name in (TO_V, "conv_in.weight", "conv_norm_out.bias"):
        values = found[name].read([(0, state[name].numel())]).reshape(found[name].stored)
        assert torch.equal(
            values.T if found[name].transposed else values, torch.tensor(read_weights(file, [name])[name])
        )
        assert found[name].shape == tuple(state[name].shape)


# Which parts


def test_parts_are_named_in_any_form(engine_bundle: Path, pipe: Any) -> None:
    for wrong, error, message in (
        ([], InputError, r"components is empty: choose from unet, vae"),
        ("vae_decoder", InputError, r"component 'vae_decoder' is unknown: choose from unet, vae, text_encoder"),
        (["controlnet"], ModelError, r"StableDiffusionPipeline has no controlnet to plug: leave it out"),
    ):
        with pytest.raises(error, match=message):
            plug(pipe, engine_bundle, "onnxruntime", components=wrong)
    nets = MultiControlNetModel([small_controlnet(), small_controlnet(6)])
    many = StableDiffusionControlNetPipeline(**pipe.components, controlnet=nets, requires_safety_checker=False)
    with pytest.raises(ModelError, match=r"has 2 ControlNets, and a bundle holds one: leave controlnet out"):
        plug(many, engine_bundle, "onnxruntime", components=["vae", "controlnet"])
    for components in ("unet", ["unet", "unet"], (name for name in ("unet",))):
        plug(pipe, engine_bundle, "onnxruntime", components=components, keep_eager=True)
        found = [name for name in ("unet", "vae", "text_encoder") if isinstance(getattr(pipe, name), EngineModule)]
        assert found == ["unet"]
        unplug(pipe)


def test_a_pipeline_without_text_encoder_draws_from_embeddings(engine_bundle: Path, pipe: Any) -> None:
    positive, negative = pipe.encode_prompt("a cat", "cpu", 1, True)
    given = {"prompt_embeds": positive, "negative_prompt_embeds": negative}
    expected = draw(pipe)
    pipe.text_encoder = None
    plug(pipe, engine_bundle, "onnxruntime")
    agree(draw(pipe, None, **given), expected)
    pipe.load_lora_weights  # noqa: B018 - there, though there is no text encoder
    with pytest.raises(ModelError, match=r"has no text_encoder to plug"):
        plug(pipe, engine_bundle, "onnxruntime", components=["text_encoder"])


# Engine modules


def test_engine_modules_have_no_parameters_and_draw_no_random_numbers(engine_bundle: Path) -> None:
    config = dict(small_controlnet().config)
    before = torch.get_rng_state()
    pipe = load_pipeline(engine_bundle, "onnxruntime")
    bundle = Bundle.open(engine_bundle)
    with open_session(bundle, "onnxruntime", "unet") as session:
        control = EngineControlNet(session, config, torch.float32, torch.device("cpu"))
        assert sum(parameter.numel() for parameter in control.parameters()) == 0
        for name in ("conv_in", "enable_layerwise_casting", "set_attn_processor", "add_adapter", "num_parameters"):
            with pytest.raises(EngineError, match=rf"EngineControlNet has no '{name}'"):
                getattr(control, name)
    assert torch.equal(torch.get_rng_state(), before)
    assert sum(p.numel() for name in ("unet", "vae", "text_encoder") for p in getattr(pipe, name).parameters()) == 0


AFTER: list[tuple[Callable[[Any], Any], str]] = [
    (lambda p: p.enable_freeu(0.9, 0.2, 1.2, 1.4), r"EngineUNet has no 'enable_freeu': FreeU scales"),
    (lambda p: p.fuse_qkv_projections(vae=False), r"EngineUNet has no 'fuse_qkv.*attention is fixed"),
    (lambda p: p.unet.enable_layerwise_casting(torch.float16), r"precision is fixed when it is exported"),
    (lambda p: p.unet.set_attn_processor(AttnProcessor()), r"attention is fixed when it is built"),
    (lambda p: setattr(p.unet, "forward", draw), r"EngineUNet keeps its own forward: .*DeepCache"),
    (lambda p: setattr(p.unet, "_tome_info", {}), r"EngineUNet takes no token merging"),
    (lambda p: p.unet.load_state_dict({}, strict=False), r"no parameters to load.*swap_weights\(pipe"),
    (
        lambda p: p.load_textual_inversion({"<cat>": torch.zeros(32)}, token="<cat>"),
        r"EngineTextEncoder has no 'get_input_embeddings': the vocabulary of an engine is fixed",
    ),
]  # fmt: skip


def test_what_cannot_reach_an_engine_says_so(plugged: StableDiffusionPipeline) -> None:
    tokens = len(plugged.tokenizer)
    for change, message in AFTER:
        with pytest.raises(EngineError, match=message):
            change(plugged)
    assert len(plugged.tokenizer) == tokens


@pytest.fixture(scope="module")
def plugged(engine_bundle: Path) -> StableDiffusionPipeline:
    """A plugged pipeline; tests must leave it as it is."""
    return plug(small_pipeline(), engine_bundle, "onnxruntime")


def test_copies_are_refused_with_what_to_do(plugged: StableDiffusionPipeline) -> None:
    for copied in (copy.deepcopy, pickle.dumps):
        for one in (plugged, plugged.unet):
            with pytest.raises(
                EngineError, match=r"cannot be copied or pickled.*load_pipeline\('.*'\) or engines\.plug.*from_pipe"
            ):
                copied(one)
        with pytest.raises(EngineError, match=r"OnnxRuntimeSession cannot be copied or pickled.*open_session"):
            copied(plugged.unet.session)


# Weights that change


def test_weights_asked_for_while_others_are_taken_over_are_not_lost(engine_bundle: Path) -> None:
    state = {name: tensor * 1.1 for name, tensor in small_pipeline().unet.state_dict().items()}
    with open_session(engine_bundle, "onnxruntime", "unet") as session:
        weights, swap = EngineWeights(session), session.swap
        given: list[set[str]] = []

        def slowly(changed: Any) -> None:
            given.append(set(changed))
            if len(given) == 1:  # another thread asks in the meantime
                thread = threading.Thread(target=weights.add, args=({"conv_out.bias": lambda: torch.ones(4)},))
                thread.start()
                thread.join()
            swap(changed)

        session.swap = slowly  # type: ignore[method-assign]
        weights.use({"conv_in.bias": state["conv_in.bias"]})
        weights.apply_pending()
        weights.apply_pending()
        weights.apply_pending()
        assert given == [{"conv_in.bias"}, {"conv_in.bias", "conv_out.bias"}]


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_weights_come_back_after_engines_were_built_again(engine_bundle: Path, tmp_path: Path, target: str) -> None:
    session = open_session(shutil.copytree(engine_bundle, tmp_path / "bundle"), target, "unet")
    feeds = {"sample": torch.ones(1, 4, 16, 16), "timestep": torch.tensor(5.0)}
    feeds["encoder_hidden_states"] = torch.ones(1, 77, 32)
    before = session.run(feeds)["out_sample"]
    session.swap({"conv_out.bias": torch.ones(4)})
    changed = session.run(feeds)["out_sample"]
    session.checked.path.unlink()  # as a builder takes away what it replaced
    session.swap({})
    torch.testing.assert_close(session.run(feeds)["out_sample"], before, atol=1e-5, rtol=0)
    assert (changed - before).abs().max() > 0.1


# Saving


def test_a_plugged_pipeline_without_eager_modules_is_not_saved(engine_bundle: Path, tmp_path: Path) -> None:
    pipe = plug(small_pipeline(), engine_bundle, "onnxruntime", components=["text_encoder"])
    copied = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    for save in (pipe.save_pretrained, copied.save_pretrained, pipe.text_encoder.save_pretrained):
        with pytest.raises(
            EngineError,
            match=r"EngineTextEncoder cannot be saved: its weights live in the engine of bundle '.*'.*keep_eager=True",
        ):
            save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_plugged_pipeline_with_its_eager_modules_saves_the_weights_that_count(
    engine_bundle: Path, pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    own = pipe.unet.get_parameter(TO_V).detach().clone()
    plug(pipe, engine_bundle, "onnxruntime", eager_fallback=True)
    swap_weights(pipe, {name: tensor * 0.9 for name, tensor in pipe.unet.original.state_dict().items()})
    pipe.save_pretrained(tmp_path / "saved")
    found = StableDiffusionPipeline.from_pretrained(tmp_path / "saved", requires_safety_checker=False)
    agree(draw(found), draw(pipe))
    assert torch.equal(pipe.unet.original.get_parameter(TO_V), own)
    assert isinstance(pipe.unet, EngineUNet)
    pipe.unet.save_pretrained(tmp_path / "unet")
    assert torch.equal(type(found.unet).from_pretrained(tmp_path / "unet").get_parameter(TO_V), own * 0.9)


# Seams


def test_what_was_changed_goes_along_to_the_next_engine_and_back(
    engine_bundle: Path, pipe: StableDiffusionPipeline
) -> None:
    first, second = "openvino", "onnxruntime"  # the other way in test_one_pipeline_through_everything
    other = small_pipeline()
    fixed_weights(other.unet, seed=9)
    pipe.vae.enable_slicing()
    plug(pipe, engine_bundle, first, eager_fallback=True, rebuild=rebuild)
    assert pipe.vae.use_slicing
    pipe.vae.enable_tiling()
    swap_weights(pipe, other.unet.state_dict())
    agree(draw(pipe), expected := draw(other))
    plug(pipe, engine_bundle, second)
    assert (pipe.vae.use_slicing, pipe.vae.use_tiling, pipe.unet.falls_back) == (True, True, True)
    assert pipe.unet.session.rebuild is rebuild
    agree(draw(pipe), expected)
    unplug(pipe)
    assert (pipe.vae.use_slicing, pipe.vae.use_tiling) == (True, True)
    agree(draw(pipe), expected)
    with pytest.raises(ModelError, match=r"unet of this pipeline .* differs"):  # they are its own weights now
        plug(pipe, engine_bundle, first)


def test_eager_modules_that_are_gone_cannot_be_kept(engine_bundle: Path, pipe: StableDiffusionPipeline) -> None:
    plug(pipe, engine_bundle, "onnxruntime", components="vae")
    plug(pipe, engine_bundle, "openvino", components="unet", keep_eager=True)
    with pytest.raises(
        EngineError, match=r"the vae of this .* runs on an engine already, and its eager module was not"
    ):
        plug(pipe, engine_bundle, "onnxruntime", keep_eager=True)
    with pytest.raises(EngineError, match=r"has no eager modules, since .* \(vae\): nothing"):
        unplug(pipe)
