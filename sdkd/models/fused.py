"""LoRAs fused into a model: what `--lora FILE[:SCALE]` means, and the model that has them in its weights."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from sdkd.core.files import sha256
from sdkd.core.numbers import check_number
from sdkd.core.schema import construct, problem
from sdkd.errors import InputError, MissingExtraError, ModelError
from sdkd.families import MODELS
from sdkd.models.diffusers_folder import digest
from sdkd.models.families import empty
from sdkd.models.generation import Generation, noted
from sdkd.models.replacements import WithVae
from sdkd.models.safetensors_file import Weights
from sdkd.models.source import Derived, Kind, ModelSource, Part
from sdkd.students.lora_file import FILE, lora_about, lora_file, read_lora
from sdkd.students.lora_layers import parts_of

if TYPE_CHECKING:
    import torch

LORAS = "loras"  # key in the source of a bundle's manifest
# Names of models by the width of their text embeddings, of two the first; their configs are meant.
_PUBLISHED = {
    model.unet["cross_attention_dim"]: f"random:{name}" for name, (_, model) in reversed(list(MODELS.items()))
}


@dataclass(frozen=True)
class Lora:
    """A LoRA's file (an absolute path), the factor of what it adds to the weights, and the file's SHA-256."""

    file: str
    scale: float
    sha256: str

    @staticmethod
    def of(path: str | Path, scale: float = 1.0) -> Lora:
        """Of a file, or of a folder that holds one; InputError for what is none and for a scale that is not finite."""
        check_number(f"scale of LoRA {str(path)!r}", scale)
        file = lora_file(Path(path).expanduser()).absolute()
        return Lora(str(file), float(scale), sha256(file))

    @staticmethod
    def parse(text: str) -> Lora:
        """Read `FILE[:SCALE]`; a name that exists as a whole is the file. InputError as `of` raises it."""
        path, colon, number = text.rpartition(":")
        if not colon or Path(text).expanduser().exists():
            return Lora.of(text)
        try:
            scale = float(number)
        except ValueError:
            if not Path(path).expanduser().exists():
                return Lora.of(text)
            advice = f"give a number behind the colon, such as {path}:0.8"
            raise InputError(f"LoRA {text!r}: scale {number!r} is not a number: {advice}") from None
        return Lora.of(path, scale)

    @property
    def what(self) -> str:
        """What begins a message."""
        return f"LoRA {self.file!r}"

    @property
    def name(self) -> str:
        """What people call it: the file's name, or that of its folder where all such files have the same."""
        path = Path(self.file)
        return path.parent.name if path.name == FILE else path.stem

    @cached_property
    def parts(self) -> tuple[str, ...]:
        """The parts of a pipeline that it changes: `unet`, `text_encoder`, `text_encoder_2`."""
        return parts_of(Weights.open(Path(self.file)).tensors)

    @cached_property
    def generation(self) -> Generation | None:
        """How a model is to be run with it, where `sdkd lora` noted that in it."""
        return noted(lora_about(Path(self.file)), self.what)

    def check(self) -> None:
        """ModelError when the file is not any more what it was."""
        path = Path(self.file)
        if not path.is_file() or sha256(path) != self.sha256:
            raise ModelError(
                f"{self.what} {'has changed' if path.is_file() else 'is gone'} since it was fused: restore the file, "
                "or fuse what there is now: sdkd export MODEL BUNDLE --lora FILE"
            )


Loras = Sequence[Lora | str | Path]
"""LoRAs to fuse: parsed, `FILE[:SCALE]`, or paths."""


def parse_loras(loras: Loras) -> tuple[Lora, ...]:
    """All of them as `Lora`; InputError as `Lora.parse` raises it, and for a file that is given twice."""
    found = tuple(lora if isinstance(lora, Lora) else Lora.parse(str(lora)) for lora in loras)
    for place, lora in enumerate(found):
        if any(lora.sha256 == other.sha256 for other in found[:place]):
            raise InputError(f"{lora.what} is given twice: give it once, with one scale")
    return found


def recorded_loras(source: Mapping[str, Any]) -> tuple[Lora, ...]:
    """The LoRAs that the source of a bundle's manifest names; ModelError when it does not name them rightly."""
    rows = source.get(LORAS, [])
    if wrong := problem(rows, list[Lora], LORAS):
        raise ModelError(f"the bundle's manifest is damaged ({wrong}): export the model again")
    return tuple(construct(row, Lora) for row in rows)


@dataclass(frozen=True)
class FusedSource(Derived):
    """A model with LoRAs in its weights, by its digests another one than `base`; see `with_loras`."""

    kind: ClassVar[Kind] = "fused"
    advice = "its files, or those of its LoRAs, are damaged or incomplete; download them again"

    loras: tuple[Lora, ...] = field(kw_only=True)

    @cached_property
    def generation(self) -> Generation | None:
        """As a LoRA tells, or for the base."""
        return generation_of(self.loras) or self.base.generation

    @cached_property
    def digests(self) -> dict[str, str]:
        """Of the base, with file and scale of every LoRA in those of the parts that it changes."""
        found = dict(self.base.digests)
        for lora in self.loras:
            found |= {part: digest(f"{found[part]} {lora.sha256} {lora.scale!r}") for part in lora.parts}
        return found

    def load_part(self, part: Part, dtype: torch.dtype) -> Any:
        """One module of the pipeline, its LoRAs fused."""
        return fuse(part, super().load_part(part, dtype), self.loras)


def loras_of(model: object) -> tuple[Lora, ...]:
    """The LoRAs that a model has in its weights already."""
    model = model.base if isinstance(model, WithVae) else model
    return model.loras if isinstance(model, FusedSource) else ()


def with_loras(source: ModelSource, loras: Loras) -> ModelSource:
    """The model with LoRAs fused into its weights when they are loaded; itself where there are none.

    Nothing of it is loaded, the LoRAs are read and held against its configs. Raises InputError for a bundle, whose
    weights are in its graphs, and as `parse_loras` and `check_loras` do.
    """
    if not loras:
        return source
    if isinstance(source, WithVae):
        base = with_loras(source.base, loras)
        return replace(source, base=base, notes=(*base.notes, *source.notes[len(source.base.notes) :]))
    base = source.base if isinstance(source, FusedSource) else source
    if base.kind == "bundle":
        raise InputError(
            f"{base.name!r} is a bundle, and LoRAs are fused before an export: give the model that it was made from "
            "with --lora, or load the LoRA when the bundle runs, with pipe.load_lora_weights(FILE)"
        )
    found = parse_loras((*loras_of(source), *loras))
    teacher = base.provenance.get("teacher")

    def text_encoder(part: str) -> Any:
        config = base.config(part)
        return empty(part, config) if config else None

    notes = check_loras(found, base.unet_config, text_encoder, teacher, base.generation)
    return FusedSource(base.name, base.path, base.random_weights, (*base.notes, *notes), base=base, loras=found)


def check_loras(
    loras: Iterable[Lora],
    unet_config: Mapping[str, Any],
    text_encoder: Callable[[str], Any],
    teacher: str | None = None,
    made: Generation | None = None,
) -> list[str]:
    """Refuse LoRAs that are not for this model; notes on those that may be another's.

    `text_encoder` gives the module of a part, on any device, None where there is none. `teacher`: of a student;
    `made`: how the model is to be run. Raises ModelError for a file that has changed, adapters of another kind, other
    widths, unknown layers, a LoRA of a student's teacher (with the command that fits it), one for few steps on a
    few-step model; InputError for no LoRA; MissingExtraError without PEFT.
    """
    try:
        from sdkd.students.lora_adapter import fit_text, fit_unet
    except ImportError as error:
        raise MissingExtraError("peft", "train", "fusing a LoRA") from error
    from sdkd.students.lora_fit import check_text_width
    from sdkd.students.lora_layers import read_layers

    notes = []
    for lora in loras:
        lora.check()
        state, settings = read_lora(Path(lora.file))
        check_text_width(state, unet_config, lora.what)
        layers = read_layers(state, lora.what, settings)
        if "unet" in layers:
            fit = fit_unet(layers["unet"], unet_config, settings, lora.what)[1]
            if fit.owner == "teacher":
                raise ModelError(_fit_first(lora, unet_config, teacher, fit.why))
            notes += [] if fit.sure else [f"{lora.what} is taken for one of this student's own, since {fit.why}"]
        for part in (part for part in layers if part != "unet"):
            fit_text(part, layers[part], text_encoder(part), settings, lora.what)
        if made is not None and made.few_steps and lora.generation:
            raise ModelError(
                f"{lora.what} makes a model one of few steps, and this one is that already: give its base model, or "
                "leave the LoRA out"
            )
        made = lora.generation or made
    return notes


def _fit_first(lora: Lora, config: Mapping[str, Any], teacher: str | None, why: str) -> str:
    """What to say of a teacher's LoRA for a student."""
    from sdkd.students.blocks import recognised

    spec = recognised(config)
    assert spec is not None
    teacher = teacher or _PUBLISHED.get(config["cross_attention_dim"], "TEACHER")
    output = str(Path(lora.file).with_name(f"{Path(lora.file).stem}-{spec.short}.safetensors"))
    command = shlex.join(["sdkd", "remap-lora", lora.file, output, "--student", spec.short, "--teacher", teacher])
    return f"{lora.what} is for the teacher of {spec.name} ({why}): make it fit first, and give the new file: {command}"


def generation_of(loras: Iterable[Lora]) -> Generation | None:
    """How a model is to be run with these LoRAs; None where none of them says it."""
    return next((found for lora in loras if (found := lora.generation)), None)


def fuse(part: str, module: Any, loras: Iterable[Lora]) -> Any:
    """Add LoRAs to the weights of a pipeline's part, in place, by PEFT's own mathematics; returns the module."""
    from sdkd.students.lora_adapter import fit_text, fit_unet
    from sdkd.students.lora_layers import read_layers

    for lora in (lora for lora in loras if part in lora.parts):
        state, settings = read_lora(Path(lora.file))
        layers = read_layers(state, lora.what, settings)[part]
        if part == "unet":
            adapter = fit_unet(layers, dict(module.config), settings, lora.what)[0]
        else:
            adapter = fit_text(part, layers, module, settings, lora.what)
        adapter.fuse_into(module, lora.scale)
    return module
