"""The model card of a distilled student: what it came from and how, so that it can be made again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdkd.distill.config import DistillConfig
from sdkd.distill.pairs import feature_pairs

_CARD = """\
---
library_name: diffusers
pipeline_tag: text-to-image
tags: [stable-diffusion, knowledge-distillation, {student}]
---

# {student} of {teacher}

A block-removed student ({parameters:,} UNet parameters instead of {teacher_parameters:,}), built from its teacher's own
weights and distilled with sdkd.

| | |
|---|---|
| teacher | `{teacher}`{random} |
| data | `{data}`, {images} images at {size}x{size} pixels |
| losses | {task:g} x task + {output:g} x output KD + {feature:g} x feature KD ({pairs}, {pair_count} pairs) |
| training | {steps} steps of {per_step} images, {precision}, seed {seed} |
| optimizer | AdamW, learning rate {learning_rate:g}, {schedule} |
| time | {seconds:.0f} s |
| last losses | {last} |

Use it like any Stable Diffusion pipeline:

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("THIS_FOLDER")
```

Made with:

```
{command}
```
"""


@dataclass(frozen=True)
class Origin:
    """What the trainer itself does not know."""

    teacher: str
    data: str
    images: int
    size: int  # pixels
    random_weights: bool
    command: str


def model_card(
    origin: Origin,
    config: DistillConfig,
    *,
    parameters: int,
    teacher_parameters: int,
    seconds: float,
    last: Mapping[str, float],
) -> str:
    """The text of README.md; `last` is the last record of the training log."""
    shown = ("loss/total", "loss/task", "loss/output", "loss/feature")
    return _CARD.format(
        student=config.spec.name,
        teacher=origin.teacher,
        random=" (random weights: for measuring only)" if origin.random_weights else "",
        data=origin.data,
        images=origin.images,
        size=origin.size,
        command=origin.command,
        parameters=parameters,
        teacher_parameters=teacher_parameters,
        seconds=seconds,
        pairs=config.pair_preset,
        pair_count=len(feature_pairs(config.spec, config.pair_preset)),
        per_step=config.batch_size * config.accumulation,
        last=", ".join(f"{name.removeprefix('loss/')} {last[name]:.4g}" for name in shown),
        **config.weights._asdict(),
        **{name: getattr(config, name) for name in ("steps", "learning_rate", "schedule", "precision", "seed")},
    )


def about(origin: Origin, config: DistillConfig, last: Mapping[str, float]) -> dict[str, Any]:
    """What goes into the folder's sdkd.json."""
    return {
        "teacher": origin.teacher,
        "student": config.spec.name,
        "random_weights": origin.random_weights,
        "steps": config.steps,
        "data": origin.data,
        "images": origin.images,
        "settings": config.to_json(),
        "last": dict(last),
    }
