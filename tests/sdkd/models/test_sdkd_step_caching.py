"""Step caching: when a deep feature may be used again, the eager reference, and models that it does not suit."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, HeunDiscreteScheduler, PNDMScheduler
from small_bundles import UNET
from small_exports import ONE_LEVEL, small_pipeline

from sdkd.errors import InputError, ModelError
from sdkd.models.generation import FEW_STEPS
from sdkd.models.step_caching import Call, StepCache, cache_steps, check_cachable, check_interval, few_steps_note

TEXT, SAMPLE, FEATURE = torch.zeros(2, 7, 8), torch.zeros(2, 4, 8, 8), torch.ones(2, 16, 8, 8)


def pattern(cache: StepCache, timesteps: Any, text: torch.Tensor = TEXT, sample: torch.Tensor = SAMPLE) -> str:
    """Of one image's calls: w for a whole one, l for one of the last layer."""
    found = ""
    for timestep in timesteps:
        call = Call(sample, timestep, text)
        if cache.feature(call) is None:
            cache.keep(call, FEATURE)
            found += "w"
        else:
            found += "l"
    return found


@pytest.mark.parametrize(
    ("kind", "calls"),
    [(DDIMScheduler, "wllwllw"), (PNDMScheduler, "wllwllwl"), (HeunDiscreteScheduler, "wll" * 4 + "w")],
)
def test_calls_are_counted_from_the_first_of_every_image(kind: Any, calls: str) -> None:
    scheduler, cache = kind(**({"skip_prk_steps": True} if kind is PNDMScheduler else {})), StepCache(3)
    for _ in range(2):  # the same text tensor, as in a loop of one's own
        scheduler.set_timesteps(7)
        assert pattern(cache, scheduler.timesteps) == calls
    assert pattern(cache, scheduler.timesteps[3:5]) == "wl"  # an image that begins half-way, after a whole one
    scheduler.set_timesteps(1)
    assert [pattern(cache, scheduler.timesteps)[0] for _ in range(3)] == ["w"] * 3
    assert pattern(StepCache(1), scheduler.timesteps) == "w" * len(scheduler.timesteps)


def test_another_text_size_or_weight_is_another_image_though_time_goes_on() -> None:
    cache, times = StepCache(10), torch.arange(900, 0, -100)
    assert pattern(cache, times[:2]) == "wl"
    assert pattern(cache, times[2:4], TEXT.clone()) == "wl"  # a call that was interrupted, and the next one
    assert pattern(cache, times[4:6], TEXT, SAMPLE[:1]) == "wl"
    assert cache.feature(Call(SAMPLE[:1], times[6], TEXT, version=1)) is None
    assert pattern(cache, times[6:], TEXT, SAMPLE[:1]) == "lll"[: len(times[6:])]
    cache.clear()
    assert pattern(cache, [5.0, 4, torch.tensor(3.0), torch.tensor([3.0]), 2.5, 7]) == "wllwlw"  # numbers must fall


def test_the_eager_reference_is_pytorchs_own_unet_with_the_feature_of_an_earlier_step() -> None:
    unet: Any = small_pipeline().unet
    first, second = (torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    text = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(3))
    held: list[torch.Tensor] = []

    def hold(_: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
        """Give the last layer what came from below in the first call."""
        held.append(given[0][:, :16])
        return torch.cat([held[0], given[0][:, 16:]], dim=1), *given[1:]

    with torch.no_grad():
        whole = unet(first, 900.0, text).sample
        handle = unet.up_blocks[-1].resnets[-1].register_forward_pre_hook(hold)
        unet(first, 900.0, text)
        expected = unet(second, 800.0, text).sample
        handle.remove()
        apart = unet(second, 800.0, text).sample
        cache_steps(unet, 2)
        assert torch.equal(unet(first, 900.0, text, return_dict=False)[0], whole)
        torch.testing.assert_close(unet(second, 800.0, text).sample, expected, atol=1e-6, rtol=0)
        assert float((expected - apart).abs().max()) > 1e-2
        with pytest.raises(ModelError, match=r"step caching takes no mid_block_additional_residual of the UNet"):
            unet(first, 700.0, text, mid_block_additional_residual=first)
        cache_steps(unet, 1)
        assert torch.equal(unet(second, 800.0, text).sample, apart)
    cache_steps(unet, 3)
    there = weakref.ref(unet)
    gc.disable()
    try:
        del unet
        assert there() is None  # freed at once, with the memory of its weights
    finally:
        gc.enable()


def test_what_step_caching_does_not_suit_is_refused_by_name() -> None:
    check_cachable(UNET | {"in_channels": 9})
    with pytest.raises(ModelError, match=r"was made for 4 steps, guidance 1, LCMScheduler: few steps have little in"):
        check_cachable(UNET, FEW_STEPS)
    with pytest.raises(ModelError, match=r"takes a guidance embedding \(time_cond_proj_dim\)"):
        check_cachable(UNET | {"time_cond_proj_dim": 8})
    with pytest.raises(ModelError, match=r"does not go with a ControlNet, .*: leave out step caching, or the Control"):
        check_cachable(UNET, controlnet=True)
    with pytest.raises(ModelError, match=r"last up block is a CrossAttnUpBlock2D, .* and this one's is 'UpBlock2D'"):
        cache_steps(small_pipeline(**ONE_LEVEL).unet, 2)
    patched: Any = small_pipeline().unet
    patched.forward = own = lambda *_: None
    cache_steps(patched, 1)
    assert patched.forward is own
    with pytest.raises(ModelError, match=r"needs the UNet's own forward pass, and this one was patched or hooked"):
        cache_steps(patched, 2)


@pytest.mark.parametrize(("interval", "steps", "words"), [
    (0, None, "cache interval 0 is too small: give a whole number from 1 to"),
    (2.0, None, "cache interval 2.0 is not a whole number"),
    (9, 8, "cache interval 9 is larger than the 8 steps of an image, of which only the first .*: give 2 to 5, and at"),
    (2, 1, "larger than the 1 step of an image"),
])  # fmt: skip
def test_an_interval_is_a_whole_number_of_steps(interval: Any, steps: int | None, words: str) -> None:
    check_interval(8, 8)
    with pytest.raises(InputError, match=words):
        check_interval(interval, steps)


def test_few_steps_are_warned_of() -> None:
    assert few_steps_note(25, 3) == few_steps_note(8, 1) == []
    assert few_steps_note(8, 3) == [
        "cache interval 3 at 8 steps: few steps have little in common, so the images are poorer"
    ]
