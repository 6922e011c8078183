"""The model card of a trained model: what it came from and how, so that it can be made again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdkd.distill.training.config import TrainConfig
from sdkd.distill.training.pairs import feature_pairs
from sdkd.families import Family
from sdkd.models.generation import GENERATION, Generation, entry

_CARD = """\
---
library_name: diffusers
pipeline_tag: text-to-image
tags: [{family}, {tag}]
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
    "consistency": "A UNet of {parameters:,} parameters (its teacher has {teacher_parameters:,}) that draws in few "
    "steps,\nby consistency distillation with sdkd.",
    "consistency-lora": "A LoRA for a UNet of {parameters:,} parameters that lets it draw in few steps, by "
    "consistency\ndistillation with sdkd.",
}
_TAGS = {
    "distill": "knowledge-distillation",
    "finetune": "fine-tuned",
    "lora": "lora",
    "consistency": "knowledge-distillation, lcm",
    "consistency-lora": "lora, lcm-lora",
}
_PIPELINE = """\
Use it like any pipeline of its family:

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("THIS_FOLDER")
{call}```"""
_ADAPTER = """\
Use it on the model that it was trained on:

```python
{scheduler}pipe.load_lora_weights("THIS_FOLDER")
{call}```"""
_CALL = "image = pipe(PROMPT, num_inference_steps={steps}, guidance_scale={guidance_scale:g}).images[0]\n"
_SCHEDULER = "pipe.scheduler = {scheduler}.from_config(pipe.scheduler.config)\n"
_SHOWN = ("loss/total", "loss/consistency", "loss/task", "loss/output", "loss/feature")


@dataclass(frozen=True)
class Origin:
    """What a run starts from, for its records: the model, the other teacher of a LoRA, and how the model is run whose
    weights are trained or taught.
    """

    model: str = ""
    teacher: str | None = None
    generation: Generation | None = None


def model_card(
    config: TrainConfig, facts: Mapping[str, Any], family: Family, *, size: int, counts: Mapping[str, int], command: str
) -> str:
    """The text of README.md; `facts` are those of `about`, `size` is in pixels, `counts` are UNet parameters."""
    model, last = facts["teacher"] if "student" in facts else facts["model"], facts["last"]
    rows = _rows(config, model, facts, size) | {
        "time": f"{last['seconds']:.0f} s",
        "last losses": ", ".join(f"{name.removeprefix('loss/')} {last[name]:.4g}" for name in _SHOWN if name in last),
    }
    if skipped := last.get("skipped"):
        rows["skipped"] = f"{skipped:g} steps, where gradients overflowed in fp16"
    taught = "student" in facts
    titles = {"distill": f"{config.student_name} of {model}", "finetune": f"{model}, fine-tuned"}
    titles |= {"consistency": f"{config.student_name} of {model}, for few steps", "lora": f"LoRA for {model}"}
    return _CARD.format(
        family=family.tag,
        tag=_TAGS[config.objective] + (f", {config.student_name}" if taught else ""),
        title=titles.get(config.objective, f"LoRA for {model} in few steps"),
        lead=_LEADS[config.objective].format(**counts),
        rows="\n".join(f"| {name} | {text} |" for name, text in rows.items()),
        usage=_usage(config, facts),
        command=command,
    )


def _usage(config: TrainConfig, facts: Mapping[str, Any]) -> str:
    text, told = _ADAPTER if config.kind.lora else _PIPELINE, facts.get(GENERATION)
    return text.format(call=_CALL.format(**told) if told else "", scheduler=_SCHEDULER.format(**told) if told else "")


def _rows(config: TrainConfig, model: str, facts: Mapping[str, Any], size: int) -> dict[str, str]:
    weights, random = config.weights, " (random weights: for measuring only)" if facts["random_weights"] else ""
    rows = {
        "teacher" if "student" in facts else "model": f"`{model}`{random}",
        "data": f"`{facts['data']}`, {facts['images']} images at {size}x{size} pixels",
    }
    if config.objective == "distill":
        pairs = f"{config.pair_preset}, {len(feature_pairs(config.spec, config.pair_preset))} pairs"
        rows["losses"] = (
            f"{weights.task:g} x task + {weights.output:g} x output KD + {weights.feature:g} x feature KD ({pairs})"
        )
    if config.kind.consistency:
        low, high = config.guidance
        teacher = facts.get("teacher", "the model itself")
        rows["few steps"] = (
            f"consistency distillation from {teacher}: w {low:g} to {high:g}, DDIM solver of {config.solver_steps} "
            f"points, min-SNR gamma {config.snr_gamma:g}, target EMA {config.target_ema:g}, feature KD "
            f"{weights.feature:g}"
        )
    if config.kind.lora:
        alpha = config.lora_alpha or config.lora_rank
        rows["LoRA"] = f"rank {config.lora_rank}, alpha {alpha:g}, targets {config.lora_targets}"
    if config.scheme is not None:
        rows["rounding"] = _rounding(config)
    per_step = config.batch_size * config.accumulation
    rows["training"] = f"{config.steps} steps of {per_step} images, {config.precision}, seed {config.seed}"
    rows["optimizer"] = f"{config.optimizer}, learning rate {config.learning_rate:g}, {config.schedule}"
    return rows


def _rounding(config: TrainConfig) -> str:
    """How forward passes were rounded, and where what they were rounded by is."""
    scheme = config.scheme
    assert scheme is not None
    words = (
        "E4M3 weights and activations"
        if scheme.activations == "e4m3"
        else f"8-bit activations, weights of {scheme.weight_bits} bits"
    )
    return (
        f"forward passes as {config.quantize} engines compute ({words}); the weights are float ones, and the ranges "
        "that they were trained with are in `unet/calibration.safetensors`"
    )


def named(config: TrainConfig, model: str, teacher: str | None = None) -> dict[str, str]:
    """What was trained on what, for records: the teacher and its student, or the model and another teacher."""
    if config.kind.student:
        return {"teacher": model, "student": config.student_name}
    return {"model": model} | ({"teacher": teacher} if teacher else {})


def about(
    config: TrainConfig, origin: Origin, last: Mapping[str, float], *, data: str, images: int, random_weights: bool
) -> dict[str, Any]:
    """What goes into the folder's sdkd.json; `last` is the last record of the training log."""
    return {
        **named(config, origin.model, origin.teacher),
        **entry(config.generation(origin.generation)),
        "objective": config.objective,
        "random_weights": random_weights,
        "steps": config.steps,
        "data": data,
        "images": images,
        "settings": config.to_json(),
        "last": dict(last),
    }
