"""A pipeline of another project's, with what a comparison asks of one of diffusers'."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.image_processor import VaeImageProcessor

from sdkd.compare.measure.calls import Request
from sdkd.compare.measure.timing import Work
from sdkd.core.conditions import guidance_width
from sdkd.errors import ModelError
from sdkd.models.source import ModelSource

PLAIN = "text to image of Stable Diffusion 1.x and 2.x"


def check_plain(source: ModelSource) -> None:
    """ModelError for a model that is not PLAIN, by its family and its UNet's config."""
    config = source.unet_config
    if len(source.family.text_encoders) > 1 or config.get("in_channels", 4) != 4 or guidance_width(config) is not None:
        raise ModelError(f"it is compared on {PLAIN} alone")


class ForeignPipeline:
    """What is read of a pipeline of diffusers: configs, tokenizer, scheduler, image processor; and a folder of its own.

    A subclass draws when it is called, and says of its parts either `works`, a call of each for a request, or `timed`,
    samples of them as images pass through. `parameter_counts`: of the UNet and of all, where the model is no bundle.
    """

    device = torch.device("cpu")
    works: Mapping[str, Callable[[Request], Work]] | None = None
    timed: Callable[..., Any] | None = None
    parameter_counts: tuple[int, int] | None = None

    def __init__(
        self, configs: Mapping[str, Mapping[str, Any]], tokenizer: Any, scheduler: Any, scale: int, prefix: str
    ) -> None:
        """`configs`: of `unet`, `vae` and `text_encoder`. `scale`: pixels to a latent. `prefix`: of the folder."""
        self.unet, self.vae, self.text_encoder = (
            SimpleNamespace(config=FrozenDict(configs[part]), dtype=torch.float32)
            for part in ("unet", "vae", "text_encoder")
        )
        self.tokenizer, self.scheduler, self.vae_scale_factor = tokenizer, scheduler, scale
        self.image_processor = VaeImageProcessor()
        self.folder = Path(tempfile.mkdtemp(prefix=prefix))

    def set_progress_bar_config(self, **_: Any) -> None:
        """It shows none."""

    def close(self) -> None:
        """Remove what was converted for it; a subclass lets go of its models first."""
        shutil.rmtree(self.folder, ignore_errors=True)
