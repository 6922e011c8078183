"""Tiled VAE on engines: the same image as eager tiling, at sizes that no engine was built for."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from engines.modules.tiles import fades, fitting_tile, in_tiles, starts
from engines.modules.vae import EngineVAE
from engines.pipelines.pipeline import build_module
from sdkd.bundle.manifest import Bundle
from sdkd.core.profiles import Range
from sdkd.errors import RangeError

CPU = torch.device("cpu")


@pytest.fixture
def vae(engine_bundle: Path) -> EngineVAE:
    """A VAE whose engines take 32 to 64 pixels, 16 to 32 latents."""
    return build_module(Bundle.open(engine_bundle), "onnxruntime", "vae", torch.float32, CPU)  # type: ignore[return-value]


def test_tiles_cover_an_axis_from_edge_to_edge() -> None:
    found = {length: starts(length, 16) for length in (12, 16, 17, 28, 40, 41)}
    assert found == {12: [0], 16: [0], 17: [0, 1], 28: [0, 12], 40: [0, 12, 24], 41: [0, 8, 17, 25]}


def test_neighbours_fade_as_diffusers_blends() -> None:
    first, second = fades([0, 12], 16)
    assert first.tolist() == [1] * 12 + [1, 0.75, 0.5, 0.25]
    assert second.tolist() == [0, 0.25, 0.5, 0.75] + [1] * 12
    assert [weights.tolist() for weights in fades([0], 3)] == [[1, 1, 1]]


@pytest.mark.parametrize("scale", [Fraction(1), Fraction(2), Fraction(1, 2)])
@pytest.mark.parametrize(("height", "width"), [(16, 44), (50, 18), (42, 42)])
def test_tiles_of_a_pointwise_function_are_the_function(height: int, width: int, scale: Fraction) -> None:
    image = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def resize(part: torch.Tensor) -> torch.Tensor:
        if scale < 1:
            return part[..., ::2, ::2]
        return part.repeat_interleave(int(scale), -2).repeat_interleave(int(scale), -1)

    found = in_tiles(resize, image, (16, 16), scale)
    assert found.dtype == torch.float64
    assert torch.allclose(found, resize(image), atol=1e-5)


@pytest.mark.parametrize(
    ("sides", "sizes", "wanted", "tile"),
    [
        ([(Range(8, 8, 64), Range(8, 8, 64))], (96, 40), 32, (32, 32)),
        ([(Range(64, 64, 64), Range(64, 64, 64))], (96, 128), 32, (64, 64)),
        ([(Range(8, 8, 24), Range(8, 8, 16))], (96, 96), 32, (24, 16)),
        ([(Range(8, 8, 8), Range(8, 8, 8)), (Range(16, 16, 24), Range(16, 16, 24))], (20, 96), 32, (20, 24)),
        ([(Range(64, 64, 64), Range(64, 64, 64))], (32, 128), 64, (32, 64)),  # too small: for the engine to refuse
    ],
)
def test_a_tile_is_what_the_engine_takes(
    sides: list[tuple[Range, Range]], sizes: tuple[int, int], wanted: int, tile: tuple[int, int]
) -> None:
    assert fitting_tile(sides, sizes, wanted) == tile


@pytest.mark.parametrize("shape", [(16, 52), (28, 16), (28, 28)])
def test_tiled_decoding_and_encoding_equal_eager_tiling(
    vae: EngineVAE, eager: StableDiffusionPipeline, shape: tuple[int, int]
) -> None:
    latents = torch.randn(1, 4, *shape, generator=torch.Generator().manual_seed(3))
    picture = torch.rand(1, 3, shape[0] * 2, shape[1] * 2, generator=torch.Generator().manual_seed(4)) * 2 - 1
    eager.vae.enable_tiling()
    vae.enable_tiling()
    assert (vae.tile_latent_min_size, vae.tile_sample_min_size) == (16, 32)
    with torch.no_grad():
        expected, moments = eager.vae.decode(latents).sample, eager.vae.encode(picture).latent_dist.parameters
    decoded, encoded = vae.decode(latents).sample, vae.encode(picture).latent_dist.parameters
    assert decoded.shape == expected.shape == (1, 3, shape[0] * 2, shape[1] * 2)
    assert encoded.shape == moments.shape == (1, 8, *shape)
    comparable = _comparable(shape)
    assert comparable.float().mean() > 0.6
    doubled = comparable.repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert _psnr(decoded[..., doubled], expected[..., doubled]) > 60
    assert _psnr(encoded[..., comparable], moments[..., comparable]) > 60


def _comparable(shape: tuple[int, int]) -> torch.Tensor:
    """Where both do the same: not in diffusers' last tile, a sliver of 4, nor where four tiles meet.

    There it fades the same neighbour in twice.
    """
    places = torch.ones(shape, dtype=torch.bool)
    places[-4:], places[:, -4:] = False, False
    rows, columns = (
        torch.isin(torch.arange(size) % 12, torch.arange(4)) & (torch.arange(size) >= 12) for size in shape
    )
    return places & ~(rows[:, None] & columns[None, :])


def _psnr(found: torch.Tensor, expected: torch.Tensor) -> float:
    error = float(((found - expected) ** 2).mean())
    return math.inf if error == 0 else 10 * float(np.log10(float(expected.abs().max()) ** 2 / error))


def test_tiling_reaches_sizes_that_the_engine_was_not_built_for(vae: EngineVAE) -> None:
    latents = torch.randn(1, 4, 48, 20, generator=torch.Generator().manual_seed(5))
    with pytest.raises(RangeError, match=r"was asked for batch 1, height 96 px, width 40 px, and was built for"):
        vae.decode(latents)
    vae.enable_tiling()
    assert vae.decode(latents).sample.shape == (1, 3, 96, 40)
    with pytest.raises(RangeError, match=r"was asked for batch 1, height 32 px, width 24 px"):  # smaller than a tile
        vae.decode(latents[..., :12])
    one = latents[..., :16, :16]
    tiled = vae.decode(one).sample
    vae.disable_tiling()
    assert torch.equal(vae.decode(one).sample, tiled)  # an image of one tile is not tiled
    with pytest.raises(RangeError, match=r"height 96 px"):
        vae.decode(latents)
