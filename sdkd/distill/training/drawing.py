"""The pipeline and the scheduler that a run draws with, for validation images and for a calibration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdkd.models.clip_tokenizer import bounded
from sdkd.models.generation import Generation
from sdkd.models.schedulers import scheduler_class, scheduler_like

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

    from sdkd.distill.training.config import TrainConfig


def drawing_pipeline(pipe: StableDiffusionPipeline, unet: Any, vae: Any, text_encoder: Any, scheduler: Any) -> Any:
    """A pipeline of these parts and another's tokenizer, without a progress bar."""
    from diffusers import StableDiffusionPipeline

    made = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=bounded(pipe.tokenizer, text_encoder.config.max_position_embeddings),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


def result_scheduler(scheduler: Any, config: TrainConfig, made: Generation | None) -> Any:
    """The scheduler that draws with what a run has trained: the model's, `made` so, or LCMScheduler for few steps."""
    if config.kind.consistency:
        return scheduler_like(scheduler, scheduler_class("lcm"), original_inference_steps=config.solver_steps)
    named = made and made.scheduler
    return scheduler_like(scheduler, scheduler_class(named) if named else type(scheduler))
