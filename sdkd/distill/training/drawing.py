"""The pipeline and the scheduler that a run draws with, for validation images and for a calibration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sdkd.models.clip_tokenizer import bounded
from sdkd.models.conditioning import family_of
from sdkd.models.families import new_pipeline
from sdkd.models.generation import Generation
from sdkd.models.schedulers import scheduler_class, scheduler_like

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

    from sdkd.distill.training.config import TrainConfig


def drawing_pipeline(pipe: StableDiffusionPipeline, parts: Mapping[str, Any], scheduler: Any) -> Any:
    """The text-to-image pipeline of the family of `parts` (all that have weights) and another's rest, quiet."""
    import diffusers

    family = family_of(pipe)
    tokenizers = {
        encoder.tokenizer: bounded(getattr(pipe, encoder.tokenizer), parts[encoder.part].config.max_position_embeddings)
        for encoder in family.text_encoders
    }
    rest = {**pipe.components, **dict.fromkeys(family.absent), **tokenizers, "scheduler": scheduler}
    kind = getattr(diffusers, family.by_channels[4])
    made = new_pipeline(kind, {**rest, **parts}, {**pipe.config, **family.options})
    made.set_progress_bar_config(disable=True)
    return made


def result_scheduler(scheduler: Any, config: TrainConfig, made: Generation | None) -> Any:
    """The scheduler that draws with what a run has trained: the model's, `made` so, or LCMScheduler for few steps."""
    if config.kind.consistency:
        return scheduler_like(scheduler, scheduler_class("lcm"), original_inference_steps=config.solver_steps)
    named = made and made.scheduler
    return scheduler_like(scheduler, scheduler_class(named) if named else type(scheduler))
