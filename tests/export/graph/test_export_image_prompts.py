"""IP-Adapters with scales that are a tensor compute what diffusers' own do, layer by layer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small_exports import small_pipeline
from small_ip_adapter import HIDDEN, TOKENS, WIDTH, ip_adapter, prompted
from small_sdxl import sdxl_pipeline

from export.graph.components import graph_module, module_contract
from export.graph.image_prompts import scalable
from sdkd.core.conditions import Extras


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("scale", [1.0, 0.35, 0.0, [0.2, 0.9], {"up": {"block_0": [0.0, 1.0]}, "down": 0.5}])
def test_the_traced_form_computes_what_diffusers_does(scale: Any) -> None:
    pipe = prompted(sdxl_pipeline(), *(ip_adapter(sdxl_pipeline().unet, kind) for kind in ("plain", "plus")))
    pipe.set_ip_adapter_scale(scale if isinstance(scale, list) else [scale, scale])
    unet = pipe.unet
    images = [random(2, 3, WIDTH), random(2, 1, TOKENS, HIDDEN)]
    sample, text, sizes = random(2, 4, 8, 8), random(2, 7, 64), {"text_embeds": random(2, 16), "time_ids": random(2, 6)}
    added = {**sizes, "image_embeds": images}
    expected = unet(sample, 300, text, added_cond_kwargs=added).sample
    rows = [processor.scale for processor in unet.attn_processors.values() if hasattr(processor, "scale")]
    traced = scalable(copy.deepcopy(unet))
    contract = module_contract("unet", traced, "fp32", Extras(image_tokens=TOKENS))
    scales = torch.tensor(rows).T.expand(2, -1, -1)
    assert [spec.name for spec in contract.inputs[5:]] == ["image_embeds.0", "image_embeds.1", "ip_adapter_scale"]
    assert contract.inputs[7].axes[1:] == scales.shape[1:]
    found = graph_module(contract, traced)(sample, torch.tensor(300.0), text, *sizes.values(), *images, scales)[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert any(map(any, rows)) == bool((found - _plain(sample, text, sizes)).abs().max() > 1e-3)


def _plain(sample: torch.Tensor, text: torch.Tensor, sizes: dict[str, torch.Tensor]) -> torch.Tensor:
    result: torch.Tensor = sdxl_pipeline().unet(sample, 300, text, added_cond_kwargs=sizes).sample
    return result


def test_a_unet_without_adapters_stays_as_it_is() -> None:
    unet = small_pipeline().unet
    before = list(unet.attn_processors.values())
    assert scalable(unet) is unet
    assert list(unet.attn_processors.values()) == before
    assert unet.encoder_hid_proj is None
