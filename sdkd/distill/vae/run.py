"""A whole run that trains a small VAE: a model and data by name, a folder that fills, the finished VAE in it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdkd.core.console import Progress, quiet
from sdkd.core.files import staged_folder, write_bytes, write_json
from sdkd.distill.data.opening import open_images_or_cache
from sdkd.distill.training.run_folder import carry_over, check_output, find_checkpoint, run_folder
from sdkd.distill.vae.config import VaeConfig
from sdkd.models.diffusers_folder import PROVENANCE, quiet_libraries
from sdkd.models.replacements import TEACHER_SCALE

if TYPE_CHECKING:
    from sdkd.distill.data.disk_cache import DiskCache
    from sdkd.distill.data.latents import Latents
    from sdkd.distill.data.rows import CaptionedImages
    from sdkd.distill.vae.loop import VaeResult
    from sdkd.models.source import ModelSource

_CARD = """\
---
library_name: diffusers
tags: [{family}, vae, taesd, knowledge-distillation]
---

# Small VAE of {model}

An autoencoder of TAESD's shape ({parameters:,} parameters instead of {teacher_parameters:,}), distilled with sdkd from
the VAE of `{model}`.{random} It takes latents as the UNet makes them (scaling factor 1).

| | |
|---|---|
| shape | {width} channels, {levels} residual blocks a level |
| data | `{data}`, {images} images |
| losses of the decoder | {losses} |
| training | {steps} steps of {batch_size} images, {precision}, seed {seed}, {seconds:.0f} s |
| optimizer | {optimizer}, learning rate {learning_rate:g}, {schedule} |
| likeness | PSNR {psnr_db:.1f} dB to the images of the full VAE, mean of {shown} training images |

```python
from diffusers import AutoencoderTiny

pipe.vae = AutoencoderTiny.from_pretrained("THIS_FOLDER")
```

Made with:

```
{command}
```
"""


@dataclass(frozen=True)
class VaeJob:
    """Whose VAE to distil on what; `resume` and `overwrite` as of every training."""

    model: str
    data: str
    output: Path
    config: VaeConfig
    resume: str = "never"
    overwrite: bool = False
    image_column: str | None = None
    caption_columns: tuple[str, ...] = ()
    command: str = field(default_factory=lambda: shlex.join(["sdkd", *sys.argv[1:]]))


def run(job: VaeJob, report: Progress = quiet) -> dict[str, Any]:
    """Train and write the VAE's folder into `job.output`; returns a summary.

    An interrupted or failed run keeps the checkpoints that it saved, and leaves nothing behind when it saved none.
    Raises what `train_vae` raises, ModelError, OutputExistsError and InterruptedRunError.
    """
    from diffusers.configuration_utils import FrozenDict

    from sdkd.distill.vae.loop import train_vae
    from sdkd.models.resolve import load_component, resolve

    checkpoint = find_checkpoint(job.output, job.resume)
    check_output(job.output, job.resume, job.overwrite, (job.model, job.data), goes_on=checkpoint is not None)
    source, data = resolve(job.model), open_images_or_cache(job.data, job.image_column, job.caption_columns)
    with run_folder(job.output, checkpoint, job.resume, job.overwrite, job.config) as folder:
        report("loading the VAE", 0.0)
        teacher = load_component(source, "vae")
        _check_cache(data, teacher, job)
        done = train_vae(
            teacher, data, job.config, FrozenDict(source.unet_config),
            progress=report, folder=folder, resume=checkpoint,
        )  # fmt: skip
        summary = _summary(job, source, teacher, done)
        with staged_folder(job.output) as partial:
            with quiet_libraries():
                done.vae.cpu().save_pretrained(partial)
            write_json(partial / PROVENANCE, summary)
            write_bytes(partial / "README.md", _card(job, source, summary).encode())
            carry_over(folder, partial)
    return summary | {"unreadable": list(done.unreadable.values()), "first": done.history[0]}


def _check_cache(data: CaptionedImages | DiskCache | Latents, teacher: Any, job: VaeJob) -> None:
    """InputError when latents were made by another VAE, or for another resolution."""
    from sdkd.distill.data.disk_cache import DiskCache

    if isinstance(data, DiskCache):
        data.check_vae(teacher)
        data.check_resolution(job.config.run.resolution)


def _summary(job: VaeJob, source: ModelSource, teacher: Any, done: VaeResult) -> dict[str, Any]:
    """What is noted beside the weights."""
    return {
        "output": str(job.output),
        "objective": job.config.objective,
        "vae_of": source.name,
        TEACHER_SCALE: float(teacher.config.scaling_factor),
        "random_weights": source.random_weights,
        "parameters": done.vae.num_parameters(),
        "teacher_parameters": teacher.num_parameters(),
        "steps": job.config.run.steps,
        "data": job.data,
        "images": done.images,
        "psnr_db": done.psnr_db,
        "seconds": done.seconds,
        "settings": job.config.to_json(),
        "last": done.history[-1],
    }


def _card(job: VaeJob, source: ModelSource, facts: Mapping[str, Any]) -> str:
    from sdkd.distill.vae.loop import SHOWN

    shown = {
        "family": source.family.tag,
        "model": facts["vae_of"],
        "random": " Its weights were random: for measuring only." if facts["random_weights"] else "",
        "losses": " + ".join(f"{weight:g} x {name}" for name, weight in job.config.losses.items()),
        "shown": min(SHOWN, facts["images"]),
        "levels": ", ".join(map(str, (*job.config.blocks, 1))),
        "command": job.command,
    }
    return _CARD.format(**{**facts["settings"], **facts, **shown})
