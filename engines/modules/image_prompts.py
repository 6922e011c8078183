"""IP-Adapters (arXiv 2308.06721) of an engine, as diffusers' pipelines see them: classes and scales, no weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.models import attention_processor, embeddings

from sdkd.core.conditions import ADDED, IMAGE_EMBEDS, IMAGE_SCALES, image_specs
from sdkd.core.contract import Contract
from sdkd.core.numbers import check_number
from sdkd.errors import EngineError


def _stub(kind: Any) -> Any:
    """A module of this class without anything in it: pipelines ask for the class alone."""
    module = kind.__new__(kind)
    torch.nn.Module.__init__(module)
    return module


class ImagePrompts:
    """What pipelines find in a UNet with IP-Adapters, and what a call needs beside the embeddings that they give.

    `projection`: as `encoder_hid_proj`; `processors`: as `attn_processors`, whose `scale` has a number per adapter.
    """

    def __init__(self, contract: Contract, details: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        self.specs = image_specs(contract)
        self.projection = _stub(embeddings.MultiIPAdapterImageProjection)
        layers = [_stub(getattr(embeddings, name)) for name in details["projections"]]
        self.projection.image_projection_layers = torch.nn.ModuleList(layers)
        self.processors = {name: _stub(attention_processor.IPAdapterAttnProcessor2_0) for name in details["layers"]}
        for processor in self.processors.values():
            processor.scale = [1.0] * len(self.specs)
        self.config = config
        self._scales: tuple[Any, torch.Tensor | None] = (None, None)

    def blocks(self, side: str) -> list[SimpleNamespace]:
        """The `down` or `up` blocks: `set_ip_adapter_scale` asks which of them have attention."""
        kinds = self.config[f"{side}_block_types"]
        return [SimpleNamespace(attentions=()) if "CrossAttn" in kind else SimpleNamespace() for kind in kinds]

    def follow(self, processors: Mapping[str, Any]) -> None:
        """Have the scales of another module's adapters, and share them from now on."""
        for name, own in self.processors.items():
            if len(scale := getattr(processors.get(name), "scale", ())) == len(own.scale):
                own.scale = scale

    def completed(self, name: str, conditions: Mapping[str, Any], sample: torch.Tensor) -> dict[str, Any]:
        """The conditions of a call with the scales behind the embeddings; as they are where there are no embeddings.

        EngineError for embeddings that do not fit, and for scales that are no numbers.
        """
        added = dict(conditions.get(ADDED) or {})
        if (given := added.get(IMAGE_EMBEDS)) is None:
            return dict(conditions)
        images = [given.unsqueeze(1)] if isinstance(given, torch.Tensor) else list(given)
        wanted = [spec.axes[2:] for spec in self.specs]
        if [tuple(image.shape[2:]) for image in images] != wanted:
            shapes = ", ".join(f"(batch, images, {', '.join(map(str, axes))})" for axes in wanted)
            raise EngineError(
                f"{name} takes {IMAGE_EMBEDS} of shapes {shapes}, one for each IP-Adapter of its bundle, not "
                f"{', '.join(str(tuple(image.shape)) for image in images)}"
            )
        # An engine takes as many images of each adapter: to attend to all of them n times is to attend to them once.
        count = math.lcm(*(image.shape[1] for image in images))
        if count != (fixed := self.specs[0].axes[1]) and isinstance(fixed, int):
            raise EngineError(f"{name} was exported for {fixed} image of each IP-Adapter (--static), not {count}")
        images = [torch.cat([image] * (count // image.shape[1]), dim=1) for image in images]
        added[IMAGE_EMBEDS] = [*images, self._scale_tensor(sample.device)]
        return {**conditions, ADDED: added}

    def _scale_tensor(self, device: torch.device) -> torch.Tensor:
        """`[1, adapters, layers]`, made once for each change of the scales."""
        rows = tuple(tuple(processor.scale) for processor in self.processors.values())
        for scale in (scale for row in rows for scale in row):
            if isinstance(scale, list):
                raise EngineError(
                    "a list of scales for one IP-Adapter goes with masks, which are not exported: give one number"
                )
            check_number(IMAGE_SCALES, scale)
        if self._scales[0] != (rows, device):
            self._scales = (rows, device), torch.tensor(rows, dtype=torch.float32, device=device).T[None].contiguous()
        found = self._scales[1]
        assert found is not None
        return found
