"""Products of half precision on a CPU without units for it: what is rounded, when, and what stays PyTorch's."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny_unet
from torch import nn

from export.check.half_products import has_units, quick_half, rounded_products

HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])


def values(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@HALVES
def test_a_product_is_the_float32_product_rounded_once(dtype: torch.dtype) -> None:
    a, b, image = values(3, 40, dtype=dtype), values(40, 5, dtype=dtype, seed=1), values(2, 4, 9, 9, dtype=dtype)
    kernel, bias = values(6, 4, 3, 3, dtype=dtype, seed=2), values(6, dtype=dtype, seed=3)
    with rounded_products(dtype):
        product, convolved = a @ b, nn.functional.conv2d(image, kernel, bias, padding=1)
    assert torch.equal(product, (a.float() @ b.float()).to(dtype))
    exact = nn.functional.conv2d(image.float(), kernel.float(), bias.float(), padding=1)
    assert torch.equal(convolved, exact.to(dtype))


@HALVES
def test_attention_is_rounded_at_its_output(dtype: torch.dtype) -> None:
    query, key, value = (values(1, 2, 8, 16, dtype=dtype, seed=seed) for seed in range(3))
    with rounded_products(dtype):
        found = nn.functional.scaled_dot_product_attention(query, key, value)
    exact = nn.functional.scaled_dot_product_attention(query.float(), key.float(), value.float())
    assert found.dtype == dtype
    assert torch.equal(found, exact.to(dtype))


def test_a_unet_is_as_far_from_float32_as_with_pytorchs_own_half_precision() -> None:
    unet, dtype = tiny_unet().eval(), torch.float16
    sample, states = values(2, 4, 16, 16, dtype=dtype), values(2, 7, unet.config.cross_attention_dim, dtype=dtype)
    step = torch.tensor(500.0)
    with torch.no_grad():
        half = nn.Module.to(unet, dtype)
        own = half(sample, step, states)[0].float()
        with rounded_products(dtype):
            ours = half(sample, step, states)[0]
        exact = nn.Module.to(unet, torch.float32)(sample.float(), step, states.float())[0]
    assert ours.dtype == dtype
    error, own_error = ((found.float() - exact).square().mean().sqrt() for found in (ours, own))
    assert 0.5 * own_error < error < 1.2 * own_error


def test_float32_and_mixed_products_are_pytorchs() -> None:
    a, b = torch.randn(2, 3), torch.randn(3, 2)
    with rounded_products(torch.float16):
        assert torch.equal(a @ b, torch.mm(a, b))
        with pytest.raises(RuntimeError, match="dtype"):
            a.half() @ b


def test_wider_dtypes_need_no_units() -> None:
    assert has_units(torch.float32)
    with quick_half(torch.float32):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).tolist() == [[2, 2], [2, 2]]
