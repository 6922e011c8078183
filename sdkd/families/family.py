"""What tells one family of models from another, as data; a family is one module of this folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sdkd.families.student import StudentSpec

END = "<|endoftext|>"
TOKENS = {"bos_token_id": 49406, "eos_token_id": 49407}
PADDING = {END: TOKENS["eos_token_id"], "!": 0}  # id of a pad token: of OpenAI's CLIP, of OpenCLIP
CLIP, PROJECTED = "CLIPTextModel", "CLIPTextModelWithProjection"


@dataclass(frozen=True)
class TextEncoder:
    """One text encoder of a family: where a pipeline, a file and a LoRA have it.

    `part`: of the pipeline, and the component's name; `kinds`: its classes, the usual one first; `prefixes`: what its
    weights begin with in a checkpoint of the original code; `lora`: what its layers begin with in kohya's LoRAs.
    """

    part: str
    tokenizer: str
    kinds: tuple[str, ...]
    prefixes: tuple[str, ...]
    lora: str


@dataclass(frozen=True)
class PublishedModel:
    """Configs of one published model of a family: what differs from the libraries' defaults.

    `text_encoders` and `pad_tokens` have one entry for each text encoder of the family, in its order.
    """

    unet: Mapping[str, Any]
    text_encoders: tuple[Mapping[str, Any], ...]
    pad_tokens: tuple[str, ...]
    image_size: int  # pixels
    prediction_type: str
    scheduler: str
    vae: Mapping[str, Any]


@dataclass(frozen=True)
class FewSteps:
    """Published models of few steps, known by their names: a pattern, whose group, if any, says the steps.

    They are drawn without guidance, by `scheduler` with `timestep_spacing="trailing"`.
    """

    pattern: str
    steps: int
    scheduler: str

    def of(self, name: str) -> int | None:
        """The steps that a model of this name was made for; None for another."""
        found = re.search(self.pattern, name, re.IGNORECASE)
        return None if found is None else int(next(filter(None, found.groups()), self.steps))


@dataclass(frozen=True)
class Family:
    """Models that one code path serves: their parts, what their UNets are told, their pipelines in diffusers.

    `pipelines`: the classes that a model's folder may name, and the one that it is loaded as; `by_channels`: the class
    by the number of channels that a UNet takes. `addition`: the `addition_embed_type` of its UNets' configs.
    `hidden_states`: whether its pipelines read hidden states before the last of every text encoder. `absent`: parts of
    its pipelines that sdkd leaves out, and `options` what its pipelines are told besides. `teacher`: what the config of
    a whole UNet says, which the `students` are made from.
    """

    name: str
    title: str  # as people call it
    tag: str  # of its models' cards on the hub
    text_encoders: tuple[TextEncoder, ...]
    pipelines: Mapping[str, str]
    by_channels: Mapping[int, str]
    prefix: str  # of its pipelines' names
    models: Mapping[str, PublishedModel]
    noise: Mapping[str, Any]  # config of its schedulers
    absent: tuple[str, ...]
    options: Mapping[str, Any]
    teacher: Mapping[str, Any]
    students: tuple[StudentSpec, ...]
    addition: str | None = None
    hidden_states: bool = False
    few_steps: tuple[FewSteps, ...] = ()
    embedding: tuple[str, ...] = ()  # pipelines that always give the UNet the guidance scale as an embedding
    without: Mapping[str, str] = field(default_factory=dict)  # what a model is that lacks a part, by the part

    def pipeline(self, task: str) -> str:
        """The class of its pipeline for a task, as in `Img2Img`, `ControlNetInpaint`; empty: text to image."""
        return f"{self.prefix}{task}Pipeline"

    @property
    def controlnet(self) -> str:
        """The class of its pipeline with a ControlNet, text to image."""
        return self.pipeline("ControlNet")

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of its pipelines that have weights."""
        return ("unet", "vae", *(encoder.part for encoder in self.text_encoders))

    @property
    def components(self) -> tuple[str, ...]:
        """The components of every model, in the order of an image: text, denoising, pixels."""
        return (*(encoder.part for encoder in self.text_encoders), "unet", "vae_decoder", "vae_encoder")

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """The tokenizers of its pipelines."""
        return tuple(encoder.tokenizer for encoder in self.text_encoders)
