"""The text `parameters` that A1111 writes into images: from an image's settings, and back.

A prompt with its LoRAs as `<lora:NAME:STRENGTH>`, a line `Negative prompt: ...`, and a last line of fields. Values that
hold a comma, colon or line break are quoted as JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

import sdkd
from sdkd.models.schedulers import SCHEDULERS

# A1111's names of samplers: the scheduler by its name here, or diffusers' class.
SAMPLERS: dict[str, str] = {
    "Euler a": "euler-a",
    "Euler": "euler",
    "LMS": "lms",
    "Heun": "heun",
    "DPM2": "KDPM2DiscreteScheduler",
    "DPM2 a": "KDPM2AncestralDiscreteScheduler",
    "DPM++ 2M": "dpm++",
    "DPM++ SDE": "dpm-sde",
    "DDIM": "ddim",
    "PLMS": "pndm",
    "UniPC": "unipc",
    "LCM": "lcm",
    "DDPM": "ddpm",
    "DEIS": "deis",
    "TCD": "tcd",
}
LORA = re.compile(r"<lora:([^:<>]+)(?::([^:<>]*))?>")
# A name is short: without a limit, a long text without colons would be searched from each of its letters to the end.
_FIELD = re.compile(r'(?P<name>\w[\w /-]{1,40}):[ ]*(?P<value>"(?:[^"\\]|\\.)*"|[^,]*)(?:,|$)')
_FEWEST = 3  # fields of a last line: a prompt may hold a colon, too
_NEGATIVE = "Negative prompt:"
_NAMES = {  # of fields whose values are written as they are
    "steps": "Steps",
    "guidance_scale": "CFG scale",
    "seed": "Seed",
    "model": "Model",
    "strength": "Denoising strength",
    "target": "Target",
}
_CLASSES = {SCHEDULERS.get(name, name): label for label, name in SAMPLERS.items()}


def sampler_name(scheduler: str) -> str:
    """What A1111 calls a scheduler's class; the class itself where it has no name for it."""
    return _CLASSES.get(scheduler, scheduler)


def write(settings: Mapping[str, str]) -> str:
    """The text for an image's settings, as `Drawn.settings` has them."""
    prompt = " ".join(filter(None, (settings.get("prompt", ""), _tags(settings.get("loras", "")))))
    lines = [prompt]
    if settings.get("negative_prompt"):
        lines.append(f"{_NEGATIVE} {settings['negative_prompt']}")
    fields = {name: settings[key] for key, name in _NAMES.items() if key in settings}
    if "scheduler" in settings:
        fields["Sampler"] = sampler_name(settings["scheduler"])
    if "size" in settings:
        height, _, width = settings["size"].partition("x")
        fields["Size"] = f"{width}x{height}"
    fields["Version"] = f"sdkd {sdkd.__version__}"
    order = ("Steps", "Sampler", "CFG scale", "Seed", "Size", "Model")
    names = [*(name for name in order if name in fields), *(name for name in fields if name not in order)]
    return "\n".join([*lines, ", ".join(f"{name}: {_quoted(fields[name])}" for name in names)])


def read(text: str) -> dict[str, str]:
    """The settings in such a text, of A1111's or ours; what has no name here is left out."""
    found = parse(text)
    settings = {key: found[name] for key, name in _NAMES.items() if name in found}
    prompt, loras = split_loras(found["Prompt"])
    settings["prompt"] = prompt
    if found["Negative prompt"]:
        settings["negative_prompt"] = found["Negative prompt"]
    if "Sampler" in found:
        name = SAMPLERS.get(found["Sampler"], found["Sampler"])
        settings["scheduler"] = SCHEDULERS.get(name, name)
    if "Size-1" in found:
        settings["size"] = f"{found['Size-2']}x{found['Size-1']}"
    if loras:
        settings["loras"] = ", ".join(f"{name}:{strength}" for name, strength in loras)
    return settings


def parse(text: str) -> dict[str, str]:
    """The fields of such a text by A1111's names: Prompt, Negative prompt, and of a Size both numbers by themselves."""
    *lines, last = text.strip().split("\n")
    fields = [(match["name"], _unquoted(match["value"].strip())) for match in _FIELD.finditer(last)]
    if len(fields) < _FEWEST:
        fields, lines = [], [*lines, last]
    at = next((number for number, line in enumerate(lines) if line.startswith(_NEGATIVE)), len(lines))
    negative = "\n".join(lines[at:]).removeprefix(_NEGATIVE)
    found = {"Prompt": "\n".join(lines[:at]).strip(), "Negative prompt": negative.strip()}
    for name, value in fields:
        if size := re.fullmatch(r"(\d+)x(\d+)", value):
            found |= {f"{name}-1": size[1], f"{name}-2": size[2]}
        else:
            found[name] = value
    return found


def split_loras(prompt: str) -> tuple[str, list[tuple[str, str]]]:
    """A prompt without its LoRAs, and their names and strengths as they are written, 1 where none is."""
    return LORA.sub("", prompt).strip(), [(name, strength or "1") for name, strength in LORA.findall(prompt)]


def _tags(loras: str) -> str:
    return " ".join(f"<lora:{lora}>" for lora in loras.split(", ") if lora)


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r"[,:\n]", value) else value


def _unquoted(value: str) -> str:
    if not (value[:1] == value[-1:] == '"' and len(value) > 1):
        return value
    try:
        return str(json.loads(value))
    except ValueError:
        return value
