"""The model card of a trained model: what it came from and how, so that it can be made again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdkd.distill.training.config import TrainConfig
from sdkd.distill.training.pairs import feature_pairs

_CARD = """\
---
library_name: diffusers
pipeline_tag: text-to-image
tags: [stable-diffusion, {tag}]
---

# {title}

{lead}

| | |
|---|---|
{rows}

{usage}

Made with:

```
{command}
```
"""
_LEADS = {
    "distill": "A block-removed student ({parameters:,} UNet parameters instead of {teacher_parameters:,}), "
    "built from its\nteacher's own weights and distilled with sdkd.",
    "finetune": "A UNet of {parameters:,} parameters, fine-tuned with sdkd.",
    "lora": "A LoRA for a UNet of {parameters:,} parameters, trained with sdkd.",
}
_TAGS = {"distill": "knowledge-distillation", "finetune": "fine-tuned", "lora": "lora"}
_PIPELINE = """\
Use it like any Stable Diffusion pipeline:

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("THIS_FOLDER")
```"""
_ADAPTER = """\
Use it on the model that it was trained on:

```python
pipe.load_lora_weights("THIS_FOLDER")
```"""
_SHOWN = ("loss/total", "loss/task", "loss/output", "loss/feature")


@dataclass(frozen=True)
class Origin:
    """What the trainer itself does not know; `model` is the teacher's name, or the trained model's."""

    model: str
    data: str
    images: int
    size: int  # pixels
    random_weights: bool
    command: str


def model_card(
    origin: Origin, config: TrainConfig, *, counts: Mapping[str, int], seconds: float, last: Mapping[str, float]
) -> str:
    """The text of README.md; `counts` are UNet parameters, `last` is the last record of the training log."""
    rows = _rows(origin, config) | {
        "time": f"{seconds:.0f} s",
        "last losses": ", ".join(f"{name.removeprefix('loss/')} {last[name]:.4g}" for name in _SHOWN if name in last),
    }
    if skipped := last.get("skipped"):
        rows["skipped"] = f"{skipped:g} steps, where gradients overflowed in fp16"
    titles = {"distill": f"{config.spec.name} of {origin.model}", "finetune": f"{origin.model}, fine-tuned"}
    return _CARD.format(
        tag=_TAGS[config.objective] + (f", {config.spec.name}" if config.objective == "distill" else ""),
        title=titles.get(config.objective, f"LoRA for {origin.model}"),
        lead=_LEADS[config.objective].format(**counts),
        rows="\n".join(f"| {name} | {text} |" for name, text in rows.items()),
        usage=_ADAPTER if config.objective == "lora" else _PIPELINE,
        command=origin.command,
    )


def _rows(origin: Origin, config: TrainConfig) -> dict[str, str]:
    weights, random = config.weights, " (random weights: for measuring only)" if origin.random_weights else ""
    rows = {
        "teacher" if config.objective == "distill" else "model": f"`{origin.model}`{random}",
        "data": f"`{origin.data}`, {origin.images} images at {origin.size}x{origin.size} pixels",
    }
    if config.objective == "distill":
        pairs = f"{config.pair_preset}, {len(feature_pairs(config.spec, config.pair_preset))} pairs"
        rows["losses"] = (
            f"{weights.task:g} x task + {weights.output:g} x output KD + {weights.feature:g} x feature KD ({pairs})"
        )
    if config.objective == "lora":
        alpha = config.lora_alpha or config.lora_rank
        rows["LoRA"] = f"rank {config.lora_rank}, alpha {alpha:g}, targets {config.lora_targets}"
    per_step = config.batch_size * config.accumulation
    rows["training"] = f"{config.steps} steps of {per_step} images, {config.precision}, seed {config.seed}"
    rows["optimizer"] = f"{config.optimizer}, learning rate {config.learning_rate:g}, {config.schedule}"
    return rows


def about(origin: Origin, config: TrainConfig, last: Mapping[str, float]) -> dict[str, Any]:
    """What goes into the folder's sdkd.json."""
    named = {"teacher": origin.model, "student": config.spec.name} if config.objective == "distill" else {}
    return {
        **(named or {"model": origin.model}),
        "objective": config.objective,
        "random_weights": origin.random_weights,
        "steps": config.steps,
        "data": origin.data,
        "images": origin.images,
        "settings": config.to_json(),
        "last": dict(last),
    }
