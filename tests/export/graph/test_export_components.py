"""Components as tensor-only modules, their example sizes and dynamic axes."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny_unet
from small_exports import small_pipeline

from export.graph.components import (
    axis_factors,
    component_module,
    component_state,
    dynamic_shapes,
    example_inputs,
    example_sizes,
    graph_module,
    module_contract,
    standard_attention,
)
from sdkd.errors import ModelError
from sdkd.models.exportable import module_config

LEVELS = {
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (16, 32, 32),
    "attention_head_dim": (1, 2, 2),
}


@torch.no_grad()
def test_the_vae_halves_compute_what_autoencoderkl_does() -> None:
    vae = small_pipeline().vae
    image = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    encode, decode = (graph_module(module_contract(name, vae, "fp32"), vae) for name in ("vae_encoder", "vae_decoder"))
    (moments,) = encode(image)
    torch.testing.assert_close(moments, vae.encode(image).latent_dist.parameters)
    (decoded,) = decode(moments[:, :4])
    torch.testing.assert_close(decoded, vae.decode(moments[:, :4]).sample)


@torch.no_grad()
def test_the_text_encoder_gives_both_outputs() -> None:
    encoder = small_pipeline().text_encoder
    ids = torch.tensor([[512, 3, 4, 513]])
    hidden, pooled = graph_module(module_contract("text_encoder", encoder, "fp32"), encoder)(ids)
    expected = encoder(ids)
    torch.testing.assert_close(hidden, expected.last_hidden_state)
    torch.testing.assert_close(pooled, expected.pooler_output)


@pytest.mark.parametrize(("changes", "multiple"), [({}, 8), (LEVELS, 4), (LEVELS | {"mid_block_type": None}, 4)])
def test_latents_are_multiples_of_what_the_unet_halves(changes: dict[str, object], multiple: int) -> None:
    unet = tiny_unet(**changes)
    config = module_config(unet)
    contract = module_contract("unet", unet, "fp32")
    assert axis_factors(contract, config)["height"] == ("height", multiple)
    sizes = example_sizes(contract, config)
    assert sizes == {"batch": 2, "height": 3 * multiple, "width": 5 * multiple, "sequence": 11}


def test_dynamic_shapes_share_one_dim_per_axis_name() -> None:
    unet = tiny_unet()
    sample, timestep, context = dynamic_shapes(module_contract("unet", unet, "fp32"), module_config(unet))
    assert timestep is None
    assert sample[0] is context[0]
    assert sorted(sample) == [0, 2, 3]
    assert sorted(context) == [0, 1]


def test_state_of_the_vae_halves_is_disjoint_and_complete() -> None:
    vae = small_pipeline().vae
    decoder, encoder = (component_state(name, vae) for name in ("vae_decoder", "vae_encoder"))
    assert not set(decoder) & set(encoder)
    assert set(decoder) | set(encoder) == set(vae.state_dict())


def test_inputs_are_the_same_question_in_every_precision() -> None:
    unet = tiny_unet()
    sizes = example_sizes(module_contract("unet", unet, "fp32"), module_config(unet))
    full, half = (example_inputs(module_contract("unet", unet, kind), sizes) for kind in ("fp32", "fp16"))
    assert [tensor.dtype for tensor in half] == [torch.float16, torch.float32, torch.float16]
    torch.testing.assert_close(half[0].float(), full[0], atol=2e-3, rtol=1e-3)
    assert half[1] == full[1] == 500.5


def test_a_pipeline_without_the_component_is_refused() -> None:
    pipe = small_pipeline()
    pipe.unet = None
    with pytest.raises(ModelError, match="the pipeline has no PyTorch unet"):
        component_module(pipe, "unet")


def test_memory_saving_attention_is_undone() -> None:
    pipe = small_pipeline()
    pipe.enable_attention_slicing(1)
    assert {type(it).__name__ for it in pipe.unet.attn_processors.values()} == {"SlicedAttnProcessor"}
    standard_attention(pipe.unet)
    assert {type(it).__name__ for it in pipe.unet.attn_processors.values()} == {"AttnProcessor2_0"}
    assert standard_attention(pipe.text_encoder) is pipe.text_encoder


def test_a_compiled_module_is_exported_as_what_it_wraps() -> None:
    pipe = small_pipeline()
    unet = pipe.unet
    pipe.unet = torch.compile(unet)
    assert component_module(pipe, "unet") is unet
