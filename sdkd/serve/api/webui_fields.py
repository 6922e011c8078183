"""What A1111's clients send with a request: the fields that count, and those that must ask for nothing.

Clients send dozens of fields with the values that mean "off". These are accepted, and any other value of them is
refused by name, as every field is that is not known.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from sdkd.errors import InputError
from sdkd.models.schedulers import SCHEDULERS
from sdkd.serve.api.fields import validated
from sdkd.serve.parameters import SAMPLERS, split_loras
from sdkd.serve.wanted import LoraWish, Wanted

# Clients send 0 and 1 as well.
Switch = Annotated[bool, BeforeValidator(lambda value: bool(value) if value in (0, 1) else value)]

# Fields for things that are not done here, and their values that ask for nothing.
OFF: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(("enable_hr", "restore_faces", "tiling", "disable_extra_networks"), (None, False)),
    **dict.fromkeys(("styles", "alwayson_scripts", "comments"), (None, [], {})),
    **dict.fromkeys(("script_name", "refiner_checkpoint", "infotext"), (None, "", "None")),
    **dict.fromkeys(("subseed_strength", "s_churn", "s_min_uncond", "resize_mode"), (None, 0)),
    **dict.fromkeys(("seed_resize_from_h", "seed_resize_from_w"), (None, 0, -1)),
    **dict.fromkeys(("eta", "s_noise", "initial_noise_multiplier"), (None, 1)),
    **dict.fromkeys(("firstpass_image", "latent_mask"), (None,)),
    "image_cfg_scale": (None, 1.5),  # what models that edit by instruction are drawn with
    "mask_round": (None, True),
    "override_settings_restore_afterwards": (None, True),
    "save_images": (None, False),
}
# Fields that act only beside one of those above, or say where A1111 would write files.
INERT = frozenset(
    (
        *("hr_scale", "hr_upscaler", "hr_second_pass_steps", "hr_resize_x", "hr_resize_y", "hr_checkpoint_name"),
        *("hr_sampler_name", "hr_scheduler", "hr_prompt", "hr_negative_prompt", "hr_cfg", "firstphase_width"),
        *("firstphase_height", "subseed", "s_tmin", "s_tmax", "script_args", "refiner_switch_at"),
        *("do_not_save_samples", "do_not_save_grid", "force_task_id"),
    )
)
_OTHER_TAGS = ("<lora:", "<lyco:", "<hypernet:")
_SCHEDULES = ("karras", "exponential", "polyexponential", "sgm uniform", "simple", "beta")  # at the end of a sampler


class TextFields(BaseModel):
    """A request for images from a prompt; what is left out is the model's own, not A1111's."""

    model_config = ConfigDict(extra="forbid")

    prompt: str | None = ""
    negative_prompt: str | None = None
    seed: int | None = None
    steps: int | None = None
    cfg_scale: float | None = None
    width: int | None = None
    height: int | None = None
    sampler_name: str | None = None
    sampler_index: str | None = None
    scheduler: str | None = None
    batch_size: int | None = Field(None, ge=1)
    n_iter: int | None = Field(None, ge=1)
    override_settings: dict[str, Any] | None = None
    send_images: bool = True

    def wanted(self, model: str) -> Wanted:
        """The request of all APIs, but for its images. InputError for what cannot be done."""
        prompt, loras = read_prompt(self.prompt or "")
        check_schedule(self.scheduler)
        return Wanted(
            prompt=prompt,
            model=model,
            loras=loras,
            negative_prompt=self.negative_prompt,
            width=self.width,
            height=self.height,
            steps=self.steps,
            guidance_scale=self.cfg_scale,
            scheduler=find_sampler(self.sampler_name or self.sampler_index),
            seed=None if self.seed == -1 else self.seed,
            n=(self.batch_size or 1) * (self.n_iter or 1),
        )


class ImageFields(TextFields):
    """A request for images that start from another, or from its masked area; defaults as A1111 has them."""

    init_images: list[str] = Field(min_length=1, max_length=1)
    denoising_strength: float = 0.75
    mask: str | None = None
    mask_blur: float | None = Field(None, ge=0, le=256)
    mask_blur_x: float = Field(4, ge=0, le=256)
    mask_blur_y: float = Field(4, ge=0, le=256)
    inpainting_mask_invert: Switch = False
    inpainting_fill: Literal[0, 1] = 0
    inpaint_full_res: Switch = True
    inpaint_full_res_padding: int = Field(0, ge=0, le=4096)
    include_init_images: bool = False

    @property
    def blur(self) -> tuple[float, float]:
        """Standard deviations of the mask's edge, pixels across and down."""
        return (self.mask_blur_x, self.mask_blur_y) if self.mask_blur is None else (self.mask_blur, self.mask_blur)


Asked = TypeVar("Asked", bound=TextFields)


def read_fields(kind: type[Asked], values: Mapping[str, Any]) -> Asked:
    """The fields of a request; InputError for one that asks for what is not done, or that is not known."""
    known = kind.model_fields
    for name, value in values.items():
        if name in OFF and value not in OFF[name]:
            raise InputError(f"{name} {value!r:.80} asks for something that this server does not do: leave it out")
    inert = INERT if "denoising_strength" in known else {*INERT, "denoising_strength"}
    return validated(kind, {name: value for name, value in values.items() if name not in OFF and name not in inert})


def read_prompt(prompt: str) -> tuple[str, tuple[LoraWish, ...]]:
    """A prompt without its `<lora:NAME:STRENGTH>`, and these; InputError for other networks and odd strengths."""
    text, tags = split_loras(prompt)
    for tag in _OTHER_TAGS:
        if tag in text:
            found = text[text.index(tag) :][:60]
            raise InputError(f"{found!r} in the prompt is not usable: write <lora:NAME:STRENGTH>, or leave it out")
    return text, tuple(LoraWish(name, _strength(name, strength)) for name, strength in tags)


def _strength(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise InputError(f"strength {text!r} of LoRA {name!r} is no number: write <lora:{name}:0.8>") from error


def check_schedule(name: str | None) -> None:
    """InputError for a noise schedule other than the model's own."""
    if (name or "automatic").lower() != "automatic":
        raise InputError(
            f"scheduler {name!r} (a noise schedule) is not possible: each model is drawn with its own, send Automatic"
        )


def find_sampler(name: str | None) -> str | None:
    """The scheduler of a sampler's name, A1111's, ours or diffusers'; None: the model's own. InputError if unknown."""
    name = name or "Automatic"
    lower = name.strip().lower()
    if lower in ("automatic", "default"):
        return None
    for schedule in _SCHEDULES:
        if lower.endswith(f" {schedule}"):
            plain = name.strip()[: -len(schedule) - 1]
            raise InputError(f"sampler {name!r} is not possible: the noise schedule is the model's own, take {plain!r}")
    names = {label.lower(): scheduler for label, scheduler in SAMPLERS.items()} | {own: own for own in SCHEDULERS}
    if lower in names:
        return names[lower]
    if name.endswith("Scheduler"):
        return name  # a class of diffusers, which is looked at with the rest of the request
    raise InputError(f"sampler {name!r} is unknown: choose one of {', '.join(SAMPLERS)}")
