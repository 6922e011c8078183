"""The model card of a trained model: what it came from and how, so that it can be made again."""

from __future__ import annotations

from collections.abc import Mapping
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


def model_card(
    config: TrainConfig, facts: Mapping[str, Any], *, size: int, counts: Mapping[str, int], command: str
) -> str:
    """The text of README.md; `facts` are those of `about`, `size` is in pixels, `counts` are UNet parameters."""
    model, last = facts.get("teacher") or facts["model"], facts["last"]
    rows = _rows(config, model, facts, size) | {
        "time": f"{last['seconds']:.0f} s",
        "last losses": ", ".join(f"{name.removeprefix('loss/')} {last[name]:.4g}" for name in _SHOWN if name in last),
    }
    if skipped := last.get("skipped"):
        rows["skipped"] = f"{skipped:g} steps, where gradients overflowed in fp16"
    titles = {"distill": f"{config.spec.name} of {model}", "finetune": f"{model}, fine-tuned"}
    return _CARD.format(
        tag=_TAGS[config.objective] + (f", {config.spec.name}" if config.objective == "distill" else ""),
        title=titles.get(config.objective, f"LoRA for {model}"),
        lead=_LEADS[config.objective].format(**counts),
        rows="\n".join(f"| {name} | {text} |" for name, text in rows.items()),
        usage=_ADAPTER if config.objective == "lora" else _PIPELINE,
        command=command,
    )


def _rows(config: TrainConfig, model: str, facts: Mapping[str, Any], size: int) -> dict[str, str]:
    weights, random = config.weights, " (random weights: for measuring only)" if facts["random_weights"] else ""
    rows = {
        "teacher" if config.objective == "distill" else "model": f"`{model}`{random}",
        "data": f"`{facts['data']}`, {facts['images']} images at {size}x{size} pixels",
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


def named(config: TrainConfig, model: str) -> dict[str, str]:
    """What was trained on what, for records: the teacher and its student, or the model."""
    return {"teacher": model, "student": config.spec.name} if config.objective == "distill" else {"model": model}


def about(
    config: TrainConfig, model: str, last: Mapping[str, float], *, data: str, images: int, random_weights: bool
) -> dict[str, Any]:
    """What goes into the folder's sdkd.json; `last` is the last record of the training log."""
    return {
        **named(config, model),
        "objective": config.objective,
        "random_weights": random_weights,
        "steps": config.steps,
        "data": data,
        "images": images,
        "settings": config.to_json(),
        "last": dict(last),
    }
