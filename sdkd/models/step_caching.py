"""Step caching (DeepCache, arXiv 2312.00858): most of a UNet computed every few calls, its last layer in every call.

What reaches the last layer of the last up block from below, the deep feature, changes little from one denoising step
to the next. A whole call gives it beside the prediction; the calls after it run conv_in, that layer and conv_out alone,
with their own latents, timestep and text (DeepCache's branch 0). Engines and the eager reference count calls with the
same `StepCache`.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sdkd.core.components import CACHED_UNET
from sdkd.core.conditions import guidance_width
from sdkd.core.numbers import DRAWING, check_numbers
from sdkd.errors import BundleError, InputError, ModelError
from sdkd.models.generation import FEW, Generation

if TYPE_CHECKING:
    import torch

    from sdkd.bundle.manifest import Bundle

_EXPORT = "leave out step caching"


def check_interval(interval: int, steps: int | None = None) -> None:
    """InputError unless `interval` is a whole number of at least 1, and of at most the `steps` of an image."""
    check_numbers({"cache_interval": interval}, DRAWING)
    if steps is not None and interval > steps:
        raise InputError(
            f"cache interval {interval} is larger than the {steps} step{'' if steps == 1 else 's'} of an image, of "
            f"which only the first would be computed as a whole: give 2 to 5, and at most {steps}"
        )


def check_cachable(
    config: Mapping[str, Any], generation: Generation | None = None, *, controlnet: bool = False
) -> None:
    """ModelError for a UNet, by its config, that step caching does not suit, or a model made for few steps."""
    if generation is not None and generation.few_steps:
        raise ModelError(
            f"step caching reuses what neighbouring steps have in common, and this model was made for {generation}: "
            f"few steps have little in common; {_EXPORT}"
        )
    if guidance_width(config) is not None:
        raise ModelError(
            "step caching is for models of many steps, and this UNet takes a guidance embedding (time_cond_proj_dim), "
            f"as models of few steps do; {_EXPORT}"
        )
    if controlnet:
        raise ModelError(
            "step caching does not go with a ControlNet, whose residuals change what would be reused at every step: "
            f"{_EXPORT}, or the ControlNet"
        )
    if (last := (config.get("up_block_types") or ["CrossAttnUpBlock2D"])[-1]) != "CrossAttnUpBlock2D":
        raise ModelError(
            f"step caching needs a UNet whose last up block is a CrossAttnUpBlock2D, as Stable Diffusion's is, and "
            f"this one's is {last!r}; {_EXPORT}"
        )


def check_cached(bundle: Bundle) -> None:
    """BundleError unless a bundle was exported for step caching."""
    if CACHED_UNET not in bundle.manifest.components:
        raise BundleError(
            f"bundle {str(bundle.path)!r} has no graphs for step caching: export its model again with --step-caching, "
            "or leave the cache interval out"
        )


def few_steps_note(steps: int, interval: int) -> list[str]:
    """What a user should know who caches steps where there are few; a line, or none."""
    if interval == 1 or steps > FEW:
        return []
    return [f"cache interval {interval} at {steps} steps: few steps have little in common, so the images are poorer"]


# When a deep feature may be used again


@dataclass(frozen=True)
class Call:
    """What tells one UNet call's image from another's; `version` counts the changes of the weights."""

    sample: torch.Tensor
    timestep: Any
    text: torch.Tensor
    version: int = 0

    def follows(self, last: Call) -> bool:
        """Whether this is a later call of the same image: the same text tensor, sizes and weights, a later timestep.

        A pipeline encodes its prompt anew for every image, and gives the same tensor in each of its steps.
        """
        kind, before = ((one.shape, one.dtype, one.device) for one in (self.sample, last.sample))
        same = self.text is last.text and kind == before and self.version == last.version
        return same and _later(self.timestep, last.timestep)


def _later(timestep: Any, last: Any) -> bool:
    """Whether a timestep comes after the last one in the denoising of one image.

    A pipeline takes them one after the other from its scheduler's tensor, made anew for every image: their place in it
    tells, also of schedulers that name a timestep twice (Heun, PNDM), and nothing waits for a GPU. Numbers must fall.
    """
    place, before = _place(timestep), _place(last)
    if place is None and before is None:
        return float(_first(timestep)) < float(_first(last))
    return place is not None and before is not None and place[0] == before[0] and place[1] > before[1]


def _place(timestep: Any) -> tuple[int, int] | None:
    """Which tensor of several timesteps this one is part of, and where; None for one by itself."""
    if not hasattr(timestep, "untyped_storage"):
        return None
    storage = timestep.untyped_storage()
    alone = storage.nbytes() <= timestep.element_size() * timestep.numel()
    return None if alone else (storage.data_ptr(), timestep.storage_offset())


def _first(timestep: Any) -> Any:
    return timestep.flatten()[0] if hasattr(timestep, "flatten") else timestep


@dataclass(frozen=True)
class _Kept:
    call: Call
    feature: torch.Tensor
    used: int = 0


class StepCache:
    """The deep feature of the image that a thread is drawing, and for how many more calls it is good.

    `interval` counts UNet calls: of N, one is whole. Schedulers that call the UNet twice a step (Heun) have it whole
    every N calls, too.
    """

    def __init__(self, interval: int = 1) -> None:
        check_interval(interval)
        self.interval = interval
        self._mine = threading.local()  # images that several threads draw have nothing in common

    def feature(self, call: Call) -> torch.Tensor | None:
        """The kept feature, counted as used once more; None where this call must be whole."""
        kept: _Kept | None = getattr(self._mine, "kept", None)
        if kept is None or kept.used + 1 >= self.interval or not call.follows(kept.call):
            return None
        self._mine.kept = replace(kept, call=call, used=kept.used + 1)
        return kept.feature

    def keep(self, call: Call, feature: torch.Tensor) -> None:
        """Keep the feature that a whole call gave."""
        self._mine.kept = _Kept(call, feature)

    def clear(self) -> None:
        """Make the next call of this thread a whole one."""
        self._mine.kept = None


# In PyTorch


@contextlib.contextmanager
def deep_features(unet: Any) -> Iterator[list[torch.Tensor]]:
    """Inside, every forward pass of a UNet2DConditionModel appends its deep feature `[batch, width, height, width]`."""
    found: list[torch.Tensor] = []

    def note(_: Any, __: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    handle = list(list(unet.up_blocks.children())[-1].attentions.children())[-2].register_forward_hook(note)
    try:
        yield found
    finally:
        handle.remove()


def last_layer(
    unet: Any, sample: torch.Tensor, timestep: Any, text: torch.Tensor, feature: torch.Tensor
) -> torch.Tensor:
    """A UNet's prediction from a deep feature of an earlier step: `sample`, `timestep` and `text` as it takes them.

    `unet`: a UNet2DConditionModel, or a module with its conv_in, last layer and conv_out. The order of its forward.
    """
    import torch

    if unet.config.center_input_sample:
        sample = 2 * sample - 1.0
    time = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=timestep))
    if unet.time_embed_act is not None:
        time = unet.time_embed_act(time)
    block = list(unet.up_blocks.children())[-1]
    resnet, attention = (list(layers.children())[-1] for layers in (block.resnets, block.attentions))
    hidden = resnet(torch.cat([feature, unet.conv_in(sample)], dim=1), time)
    hidden = attention(hidden, encoder_hidden_states=text, return_dict=False)[0]
    if unet.conv_norm_out is not None:
        hidden = unet.conv_act(unet.conv_norm_out(hidden))
    found: torch.Tensor = unet.conv_out(hidden)
    return found


class CachedForward:
    """The forward pass of an eager UNet with step caching: the reference for engines."""

    def __init__(self, unet: Any, interval: int) -> None:
        check_cachable(unet.config)
        self.unet, self.cache = weakref.ref(unet), StepCache(interval)  # it is an attribute of the UNet

    def __call__(
        self, sample: torch.Tensor, timestep: Any, encoder_hidden_states: torch.Tensor, *more: Any,
        return_dict: bool = True, **others: Any,
    ) -> Any:  # fmt: skip
        """As UNet2DConditionModel; ModelError for an argument that the last layer by itself does not take."""
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

        given = [name for name, value in others.items() if value is not None and value != {}]
        if given or more:
            raise ModelError(f"step caching takes no {[*given, 'class_labels'][0]} of the UNet: {_EXPORT}")
        unet: Any = self.unet()
        call = Call(sample, timestep, encoder_hidden_states)
        feature = self.cache.feature(call)
        if feature is None:
            with deep_features(unet) as found:
                result = type(unet).forward(unet, sample, timestep, encoder_hidden_states, return_dict=False)[0]
            self.cache.keep(call, found[0])
        else:
            result = last_layer(unet, sample, timestep, encoder_hidden_states, feature)
        return UNet2DConditionOutput(sample=result) if return_dict else (result,)


def cache_steps(unet: Any, interval: int) -> None:
    """Let an eager UNet2DConditionModel cache steps, in place; 1: as it was.

    Raises what `check_cachable` raises, and ModelError for a UNet whose forward pass is patched already.
    """
    check_interval(interval)
    if isinstance(vars(unet).get("forward"), CachedForward):
        del unet.forward
    if interval > 1:
        if "forward" in vars(unet):
            raise ModelError(
                "step caching needs the UNet's own forward pass, and this one was patched or hooked (offloading, "
                f"another cache): take that off first, or {_EXPORT}"
            )
        unet.forward = CachedForward(unet, interval)
