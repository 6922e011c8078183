"""A request on its way: its images, how far they are, and who waits for them."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from sdkd.serve.caption import Caption
from sdkd.serve.errors import CancelledJobError
from sdkd.serve.orders import Order

State = Literal["waiting", "running", "done", "failed", "cancelled"]
ENDED = ("done", "failed", "cancelled")


@dataclass(frozen=True)
class Timing:
    """Seconds of an image or a request: in the queue, in the three stages of drawing, and in all.

    `text_s` is everything before the first step: prompts, and images that are started from. `batch`: images that were
    drawn in the same call, whose seconds they share.
    """

    queued_s: float
    text_s: float
    steps_s: float
    decode_s: float
    total_s: float
    batch: int

    def to_json(self) -> dict[str, float]:
        """It, as answers have it."""
        return dict(vars(self))


@dataclass(frozen=True)
class Drawn:
    """One image: rows of RGB pixels, what it was drawn from, and how long it took."""

    index: int
    seed: int
    width: int
    height: int
    pixels: bytes
    caption: Caption
    timing: Timing
    notes: tuple[str, ...] = ()  # what of its prompts was not read


@dataclass(frozen=True)
class Result:
    """All images of a request."""

    images: tuple[Drawn, ...]
    timing: Timing


@dataclass(frozen=True)
class Event:
    """Something that happened to a job: `data` is a Drawn for `image`, the error for `error`, else a dictionary."""

    kind: Literal["queued", "progress", "image", "done", "error", "cancelled"]
    data: Any


@dataclass(eq=False)
class Item:
    """One image of a job on its way."""

    job: Job
    index: int
    step: int = 0
    alone: bool = False  # what drew it among others failed

    @property
    def seed(self) -> int:
        """The seed of the image."""
        return self.job.order.seed + self.index

    @cached_property
    def caption(self) -> Caption:
        """What its file will say about it."""
        return Caption({**self.job.order.about, "seed": str(self.seed)})


@dataclass(eq=False)
class Job:
    """One request; lives on the server's event loop and is changed by the service alone."""

    order: Order
    api: str
    id: str = field(default_factory=lambda: secrets.token_hex(16))
    state: State = "waiting"
    created: float = field(default_factory=time.time)
    started: float | None = None  # of the monotonic clock, as `asked`
    asked: float = field(default_factory=time.monotonic)
    position: int = 0  # images of others that are drawn before its next one
    preview: bytes | None = None
    error: BaseException | None = None
    items: list[Item] = field(default_factory=list)
    drawn: list[Drawn] = field(default_factory=list)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _over: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.items = [Item(self, index) for index in range(self.order.n)]

    @property
    def steps(self) -> int:
        """Steps of all its images together."""
        return self.order.settings.done_steps * len(self.items)

    @property
    def step(self) -> int:
        """How many of them are done."""
        return sum(item.step for item in self.items)

    @property
    def fraction(self) -> float:
        """How much is done, 0 to 1; the last hundredth is decoding."""
        return 1.0 if self.state == "done" else 0.99 * self.step / max(1, self.steps)

    @property
    def eta_s(self) -> float | None:
        """Seconds left, going by the steps so far; None before the first one."""
        if self.state != "running" or self.started is None or not self.step:
            return None
        return (time.monotonic() - self.started) * (1 - self.fraction) / self.fraction

    @property
    def over(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.state in ENDED

    def changed(self) -> None:
        """Wake up everybody who waits for news of it."""
        event, self._changed = self._changed, asyncio.Event()
        event.set()

    def end(self, state: State, error: BaseException | None = None) -> None:
        """The last change of a job."""
        if not self.over:
            self.state, self.error = state, error
            self._over.set()
            self.changed()

    def raise_error(self) -> None:
        """Raise what the job failed with, if it did."""
        if self.error is not None:
            raise self.error
        if self.state == "cancelled":
            raise CancelledJobError(f"request {self.id} was cancelled")

    @property
    def timing(self) -> Timing:
        """The sums of its images' stages; images of one call count once."""
        calls = {(one.timing.text_s, one.timing.steps_s, one.timing.decode_s): one.timing for one in self.drawn}
        text, steps, decode = (sum(stage) for stage in zip(*calls, strict=True)) if calls else (0.0, 0.0, 0.0)
        queued = (self.started or self.asked) - self.asked
        most = max((one.timing.batch for one in self.drawn), default=0)
        return Timing(queued, text, steps, decode, time.monotonic() - self.asked, most)

    async def result(self) -> Result:
        """Its images, once all are drawn; raises what it failed with, CancelledJobError when it was taken back."""
        await self._over.wait()
        self.raise_error()
        return Result(tuple(sorted(self.drawn, key=lambda one: one.index)), self.timing)

    async def events(self) -> AsyncGenerator[Event]:
        """What happens until it is over; who reads slowly misses progress, but no image and not the end."""
        seen, told, before = 0, -1, (-1, False)
        while True:
            change = self._changed
            if self.state == "waiting" and told != self.position:
                told = self.position
                yield Event("queued", {"id": self.id, "position": told})
            progress = (self.step, self.preview is not None)
            if self.state == "running" and progress != before and not self.over:
                before = progress
                yield Event("progress", self._progress())
            for one in self.drawn[seen:]:
                seen += 1
                yield Event("image", one)
            if self.over and seen == len(self.drawn):
                yield self._last()
                return
            await change.wait()

    def _progress(self) -> dict[str, Any]:
        known = {"id": self.id, "step": self.step, "steps": self.steps, "fraction": self.fraction}
        return known | {"eta_s": self.eta_s, "preview": self.preview}

    def _last(self) -> Event:
        if self.state == "done":
            return Event("done", {"id": self.id, "timing": self.timing.to_json()})
        return Event("cancelled", {"id": self.id}) if self.error is None else Event("error", self.error)
