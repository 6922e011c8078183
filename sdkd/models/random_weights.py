"""Full-size Stable Diffusion pipelines with random weights: for measuring builds and latency without a checkpoint."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sdkd.errors import InputError
from sdkd.families import FAMILIES, MODELS, Family, PublishedModel, StudentSpec
from sdkd.models.families import empty, part_config, pipeline_rest
from sdkd.students.blocks import full_config, student_config, student_spec

if TYPE_CHECKING:
    import torch

PREFIX = "random:"
# Students whose family has one published model, and that model.
ALONE = {spec.name: next(iter(f.models)) for f in FAMILIES if len(f.models) == 1 for spec in f.students}
_SEEDS = {"vae": 0, "text_encoder": 1, "unet": 2, "text_encoder_2": 3}


@dataclass(frozen=True)
class RandomModel:
    """A parsed name such as `random:sd15` or `random:sd21-bk-small`."""

    identity: str  # the name: equal names have equal weights
    family: Family
    model: PublishedModel
    seed: int  # the model's, so that every student of it has the same text encoder and VAE
    student: StudentSpec | None

    @property
    def unet_config(self) -> dict[str, Any]:
        """The UNet's config: the model's, or its student's."""
        config = full_config(self.model.unet)
        return student_config(config, self.student) if self.student else config

    def rest(self) -> Any:
        """The pipeline without its heavy parts."""
        return pipeline_rest(self.family, self.model, scheduler="DDIMScheduler")

    def load_part(self, part: str, dtype: torch.dtype) -> Any:
        """A part with weights in `dtype`: uniform with variance 1 / fan-in, norms 1, biases 0.

        Its weights depend on the name alone, up to rounding to `dtype`.
        """
        config = self.unet_config if part == "unet" else part_config(self.family, self.model, part)
        module = empty(part, config)
        return fill_random(module, self.seed + _SEEDS[part], dtype)


def fill_random(module: Any, seed: int, dtype: torch.dtype) -> Any:
    """An empty module with weights in `dtype`: uniform with variance 1 / fan-in, norms 1, biases 0."""
    import numpy as np
    import torch

    generator = np.random.Generator(np.random.SFC64(seed))  # faster than torch's on a CPU
    weights = {}
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            bound = (3 / parameter[0].numel()) ** 0.5
            numbers = generator.random(parameter.numel(), dtype=np.float32)
            value = torch.from_numpy(numbers).mul_(2 * bound).sub_(bound).view(parameter.shape)
        else:
            value = torch.full(parameter.shape, 1.0 if name.endswith("weight") else 0.0)
        weights[name] = value.to(dtype)
    module.load_state_dict(weights, strict=False, assign=True)
    return module


def parse(name: str) -> RandomModel:
    """Read `random:sd15`, `random:sd15-tiny`, `random:sd21-bk-small`, `random:ssd-1b`; InputError lists the forms.

    A student whose family has one published model needs no other name.
    """
    text = name.removeprefix(PREFIX)
    base, _, student = text.partition("-")
    if text in ALONE:
        base, student = ALONE[text], text
    if base not in MODELS:
        raise InputError(
            f"model {name!r} names no known model: give {PREFIX}MODEL or {PREFIX}MODEL-STUDENT with MODEL one of "
            f"{', '.join(MODELS)} and STUDENT e.g. small or tiny; or {', '.join(PREFIX + each for each in ALONE)}"
        )
    seed = int.from_bytes(hashlib.sha256(base.encode()).digest()[:4], "big")
    return RandomModel(name, *MODELS[base], seed, student_spec(student) if student else None)
