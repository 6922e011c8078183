"""A model that is open and draws: batches of pictures, with the scheduler and LoRAs that each asks for."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from engines.generate.drawing import Picture, Settings, draw_pictures, engine_batch, in_batches
from engines.generate.image_inputs import as_pipeline
from engines.generate.loading import load
from engines.generate.long_prompts import reading
from sdkd.core.profiles import Range
from sdkd.models.conditioning import family_of
from sdkd.models.schedulers import check_steps, use_scheduler
from sdkd.models.source import ModelSource
from sdkd.serve.previews import Preview


@dataclass(frozen=True)
class Batch:
    """Pictures that are drawn together, and what they have in common.

    `scheduler`: diffusers' class, None for the model's own. `loras`: file and strength of each.
    """

    settings: Settings
    pictures: tuple[Picture, ...]
    scheduler: str | None
    loras: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Painted:
    """An image of a batch by its place there: RGB rows, seconds of its call by stage, and what was not read."""

    place: int
    width: int
    height: int
    pixels: bytes
    text_s: float
    steps_s: float
    decode_s: float
    together: int
    notes: tuple[str, ...]


class Clock:
    """When the stages of one call began: the first UNet call ends the text, the last step begins the decoding."""

    def __init__(self, pipe: Any) -> None:
        self.start = self.first = self.last = time.perf_counter()
        self._hook = pipe.unet.register_forward_pre_hook(self._begin)

    def _begin(self, *_: object) -> None:
        self.first = time.perf_counter()
        self._hook.remove()

    def step(self) -> None:
        """A step is done."""
        self.last = time.perf_counter()

    def stages(self) -> tuple[float, float, float]:
        """Seconds of text, steps and decoding, now that the call is over."""
        return self.first - self.start, self.last - self.first, time.perf_counter() - self.last

    def close(self) -> None:
        """Take the hook off, also where no UNet call came."""
        self._hook.remove()


class Painter:
    """The pipeline of one engine set; `load`s it: raises what that raises."""

    def __init__(self, source: ModelSource, target: str) -> None:
        self.pipe, self.target = load(source, target)
        self.own_scheduler = self.pipe.scheduler
        self._pipelines: dict[str, Any] = {}
        self._rooms: dict[tuple[int, int, int, bool], Range] = {}
        self._steps: set[tuple[type, int]] = set()
        self._loras: tuple[tuple[str, float], ...] = ()
        self._preview: Preview | None = None

    def paint(self, batch: Batch, on_step: Callable[[Sequence[int], int, Any], None]) -> list[Painted]:
        """Draw a batch: pictures whose prompts take as many parts in one call, no more than the engines were built for.

        `on_step` gets the places that are being drawn, how many steps are done, and the latents; what it raises ends
        the work. Raises what a pipeline's call raises, ModelError and EngineError for a LoRA that does not fit.
        """
        self._use_loras(batch.loras)
        groups: dict[int, list[int]] = {}
        notes: dict[int, tuple[str, ...]] = {}
        for place, picture in enumerate(batch.pictures):
            texts = [picture.prompt, picture.negative_prompt or ""]
            parts, lines = reading(self.pipe, texts, batch.settings.height, batch.settings.width)
            groups.setdefault(parts, []).append(place)
            notes[place] = tuple(lines)
        found: list[Painted] = []
        for parts, places in groups.items():
            settings = batch.settings if parts == batch.settings.parts else replace(batch.settings, parts=parts)
            room = self._room(settings)
            for few in in_batches(places, room.max):
                found += self._call(batch, settings, few, room.min, notes, on_step)
        return found

    def _call(
        self,
        batch: Batch,
        settings: Settings,
        places: Sequence[int],
        at_least: int,
        notes: dict[int, tuple[str, ...]],
        on_step: Callable[[Sequence[int], int, Any], None],
    ) -> list[Painted]:
        pipe = self._pipeline(settings, batch.scheduler)
        self._check_steps(pipe.scheduler, settings.steps)
        clock = Clock(pipe)

        def after(done: int, latents: Any) -> None:
            clock.step()
            on_step(places, done, latents)

        try:
            pictures = [batch.pictures[place] for place in places]
            images = draw_pictures(pipe, settings, pictures, after, at_least=at_least)
        finally:
            clock.close()
        stages = clock.stages()
        return [
            Painted(place, *image.size, image.convert("RGB").tobytes(), *stages, len(places), notes[place])
            for place, image in zip(places, images, strict=True)
        ]

    def _room(self, settings: Settings) -> Range:
        """As `engine_batch`, found out once."""
        key = settings.height, settings.width, settings.parts, settings.guided
        if key not in self._rooms:
            self._rooms[key] = engine_batch(self.pipe, settings)
        return self._rooms[key]

    def _pipeline(self, settings: Settings, scheduler: str | None) -> Any:
        name = settings.kind.of(family_of(self.pipe))
        if name not in self._pipelines:
            self._pipelines[name] = as_pipeline(self.pipe, name)
        pipe = self._pipelines[name]
        if pipe.scheduler is not self.own_scheduler:  # diffusers writes a config whenever it is given one
            pipe.scheduler = self.own_scheduler
        use_scheduler(pipe, scheduler)
        return pipe

    def _check_steps(self, scheduler: Any, steps: int) -> None:
        """As `check_steps`, once for each class and number: it sets a copy of the scheduler up."""
        if (known := (type(scheduler), steps)) not in self._steps:
            check_steps(scheduler, steps)
            self._steps.add(known)

    def _use_loras(self, loras: tuple[tuple[str, float], ...]) -> None:
        """Have the model run with these LoRAs alone; without any where one does not load."""
        if loras == self._loras:
            return
        self._unload()
        try:
            for number, (file, _) in enumerate(loras):
                self.pipe.load_lora_weights(file, adapter_name=f"lora_{number}")
            if loras:
                self.pipe.set_adapters(
                    [f"lora_{number}" for number in range(len(loras))], [scale for _, scale in loras]
                )
        except Exception:
            self._unload()
            raise
        self._loras = loras

    def _unload(self) -> None:
        self._loras = ()
        if any(self.pipe.get_list_adapters().values()):
            self.pipe.unload_lora_weights()

    def preview(self, latents: Any, settings: Settings) -> bytes:
        """A small PNG of latents; the first one takes a decoding more."""
        if self._preview is None:
            self._preview = Preview(self.pipe, settings.height, settings.width)
        return self._preview.png(latents)
