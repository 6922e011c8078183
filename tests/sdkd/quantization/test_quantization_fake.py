"""A UNet that rounds as an engine does, and is as it was afterwards."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers import tiny_unet

from sdkd.errors import InputError
from sdkd.quantization.fake import fake_quantized
from sdkd.quantization.scales import to_e4m3, weight_codes
from sdkd.quantization.scheme import LayerScales, Scheme

SMOOTH = np.array([0.5, 1, 2, 4], np.float32)
GIVEN = torch.tensor([[0.3, -0.7, 1.9, 9.0], [0.1, 0.2, -0.3, 0.4]])


def model(kind: str = "linear") -> torch.nn.Sequential:
    torch.manual_seed(3)
    layer = torch.nn.Linear(4, 3) if kind == "linear" else torch.nn.Conv2d(4, 3, 3, padding=1)
    return torch.nn.Sequential(layer)


def rounded(values: np.ndarray, scales: LayerScales, scheme: Scheme) -> np.ndarray:
    """What an engine makes of an input: QuantizeLinear, DequantizeLinear."""
    if scheme.activations == "none":
        return values
    if scheme.activations == "e4m3":
        return to_e4m3(values / scales.scale) * np.float32(scales.scale)
    low, high = (0, 255) if scheme.activations == "u8" else (-127, 127)
    codes = np.clip(np.rint(values / scales.scale) + scales.zero_point, low, high)
    return ((codes - scales.zero_point) * scales.scale).astype(np.float32)


@pytest.mark.parametrize("smooth", [None, SMOOTH])
@pytest.mark.parametrize("scheme", [Scheme("u8", 7), Scheme("u8"), Scheme("s8"), Scheme("e4m3"), Scheme("none")])
def test_a_linear_layer_computes_with_codes(scheme: Scheme, smooth: np.ndarray | None) -> None:
    net, scales = model(), LayerScales(0.02, 60 if scheme.activations == "u8" else 0, smooth)
    weight, bias = (net.get_parameter(f"0.{name}").detach().numpy() for name in ("weight", "bias"))
    codes, scale = weight_codes(weight, scales, scheme)
    real = GIVEN.numpy() if smooth is None else GIVEN.numpy() / smooth
    wanted = rounded(real, scales, scheme) @ (codes * scale[:, None]).T + bias
    with fake_quantized(net, {"0": scales}, scheme), torch.no_grad():
        np.testing.assert_allclose(net(GIVEN).numpy(), wanted, atol=1e-5)


def test_a_convolution_rounds_what_it_gives_where_asked() -> None:
    net, given = model("convolution"), torch.linspace(-1, 1, 100).view(1, 4, 5, 5)
    scales = LayerScales(0.01, 128, out_scale=0.1, out_zero_point=100)
    with fake_quantized(net, {"0": scales}, Scheme("u8", outputs=True)), torch.no_grad():
        codes = net(given).numpy() / 0.1
    np.testing.assert_allclose(codes, np.rint(codes), atol=1e-4)
    assert len(np.unique(np.rint(codes))) > 3
    with torch.no_grad():
        np.testing.assert_allclose(0.1 * codes, net(given).numpy(), atol=0.08)


def test_everything_is_as_it_was_afterwards_and_names_stay_inside() -> None:
    unet = tiny_unet()
    names, before = list(unet.state_dict()), {name: dict(module.__dict__) for name, module in unet.named_modules()}
    layer = "mid_block.resnets.0.conv1"
    with fake_quantized(unet, {layer: LayerScales(1.0)}, Scheme("s8")):
        assert list(unet.state_dict()) == names
        assert unet.get_submodule(layer).__dict__ != before[layer]
    assert {name: dict(module.__dict__) for name, module in unet.named_modules()} == before


def test_only_the_layers_that_are_asked_for_round() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    coarse = {"0": LayerScales(100.0), "1": LayerScales(100.0)}
    with torch.no_grad():
        exact = net[0](GIVEN)
        with fake_quantized(net, coarse, Scheme("s8"), ["1"]):
            assert torch.equal(net[0](GIVEN), exact)
            assert torch.equal(net(GIVEN), net[1].bias.expand(2, 4))  # everything is rounded to 0


@pytest.mark.parametrize("activations", ["u8", "s8", "e4m3"])
def test_gradients_pass_straight_through_but_where_it_clips(activations: Any) -> None:
    net, given = model(), GIVEN.clone().requires_grad_(True)
    limit = {"u8": 255, "s8": 127, "e4m3": 448}[activations]
    scales = LayerScales(4 / limit, 64 if activations == "u8" else 0)  # 9.0 is clipped
    with fake_quantized(net, {"0": scales}, Scheme(activations)):
        net(given).sum().backward()
    weight = net.get_parameter("0.weight")
    assert given.grad is not None
    assert weight.grad is not None
    wanted = weight.detach().sum(0).expand(2, 4).clone()
    wanted[0, 3] = 0
    np.testing.assert_allclose(given.grad.numpy(), wanted.numpy(), atol=0.05)
    np.testing.assert_allclose(weight.grad[0, :3].numpy(), GIVEN.sum(0)[:3].numpy(), atol=0.1)


@pytest.mark.parametrize("trained", [True, False])
def test_scales_follow_the_weights(trained: bool) -> None:
    net = model().requires_grad_(trained)
    with fake_quantized(net, {"0": LayerScales(0.1)}, Scheme("none")), torch.no_grad():
        before = net(GIVEN) - net[0].bias
        net[0].weight.mul_(2)
        torch.testing.assert_close(net(GIVEN) - net[0].bias, 2 * before)


def test_half_precision_comes_out_as_it_went_in() -> None:
    net = model().to(torch.bfloat16)
    with fake_quantized(net, {"0": LayerScales(0.1, smooth=SMOOTH)}, Scheme("s8")), torch.no_grad():
        assert net(GIVEN.to(torch.bfloat16)).dtype == torch.bfloat16


def test_layers_that_are_not_there_are_refused() -> None:
    net = model()
    with pytest.raises(InputError, match=r"layer '1' is no convolution or linear layer of this UNet: calibrate"):
        fake_quantized(net, {"1": LayerScales(1.0)}, Scheme("s8")).__enter__()
    with pytest.raises(InputError, match="layer '0' has no scales: calibrate this model"):
        fake_quantized(net, {}, Scheme("s8"), ["0"]).__enter__()
