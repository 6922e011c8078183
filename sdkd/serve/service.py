"""What a server does: takes requests, merges what can be drawn in one call, and keeps the processes that draw.

Each engine set has a lane (sdkd.serve.fleet). One call runs at a time in each place (the CPU, the GPU), in turn among
lanes that have something to draw. Images of several requests share a call when all but their prompts, seeds and
pictures is the same; the oldest request goes first and is joined by those that fit it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from engines.generate.drawing import Picture
from sdkd.core.files import write_bytes
from sdkd.errors import SdkdError
from sdkd.serve.catalog import Catalog
from sdkd.serve.encoding import encode
from sdkd.serve.errors import QueueFullError, StoppingError, UnknownNameError, status_of
from sdkd.serve.fleet import Fleet, Lane
from sdkd.serve.jobs import Drawn, Item, Job, Timing
from sdkd.serve.metrics import Metrics
from sdkd.serve.orders import make_order
from sdkd.serve.painter import Batch, Painted
from sdkd.serve.wanted import Limits, Wanted
from sdkd.serve.workers import DiedError, Worker

log = logging.getLogger(__name__)
Result = TypeVar("Result")
SMALL_BYTES = 3 * 128 * 128  # of pixels: encoded in about a millisecond


class Service:
    """The requests and processes of one server; lives on one event loop.

    `memory_bytes`: what loaded processes may take together, by place. `loras`: files by name. `output`: a folder that
    every image is written to, or None.
    """

    def __init__(
        self,
        catalog: Catalog,
        limits: Limits,
        memory_bytes: Mapping[str, int],
        lora_dir: Path | None = None,
        output: Path | None = None,
        *,
        has_key: bool = False,
    ) -> None:
        self.catalog, self.limits, self.output, self.has_key = catalog, limits, output, has_key
        self.metrics = Metrics()
        self.stopping = False
        self._lora_dir = lora_dir
        self._fleet = Fleet(catalog, memory_bytes, self.metrics)
        self._lanes = self._fleet.lanes
        self._places = {place: asyncio.Lock() for place in {served.place for served in catalog.all}}
        self._jobs: dict[str, Job] = {}

    # What others ask

    @property
    def loras(self) -> Mapping[str, Path]:
        """The LoRAs there are now: files by name."""
        files = sorted(self._lora_dir.glob("*.safetensors")) if self._lora_dir is not None else []
        return {file.stem: file for file in files}

    async def submit(self, wanted: Wanted, api: str) -> Job:
        """Take a request; raises what `make_order` raises, QueueFullError, StoppingError."""
        try:
            job = await self._taken(wanted, api)
        except Exception as error:
            self.metrics.refused.labels(str(status_of(error))).inc()
            raise
        self._jobs[job.id] = job
        lane = self._lanes[job.order.served.id]
        lane.waiting.extend(job.items)
        self._count_waiting()
        if lane.task is None or lane.task.done():
            lane.task = asyncio.create_task(self._run(lane))
        return job

    async def _taken(self, wanted: Wanted, api: str) -> Job:
        self._check_open(1)
        loras = self.loras if wanted.loras else {}
        order = await self._apart(wanted.image is not None, make_order, wanted, self.catalog, self.limits, loras)
        self._check_open(order.n)
        return Job(order, api)

    def _check_open(self, more: int) -> None:
        if self.stopping:
            raise StoppingError("the server is about to end: ask again later, or another one")
        waiting = sum(len(lane.waiting) for lane in self._lanes.values())
        if waiting + more > self.limits.queue and waiting:
            raise QueueFullError(f"{waiting} images wait, and {self.limits.queue} may: ask again later")

    def current(self, api: str | None = None) -> list[Job]:
        """Requests that are not over, those being drawn first."""
        found = [job for job in self._jobs.values() if api in (None, job.api)]
        return sorted(found, key=lambda job: (job.state != "running", job.asked))

    def cancel(self, job_id: str) -> bool:
        """Take a request back: what waits is dropped, what runs ends at its next step. False where it is over."""
        job = self._jobs.get(job_id)
        if job is None:
            return False
        self._end(job, "cancelled")
        lane = self._lanes[job.order.served.id]
        lane.waiting = deque(item for item in lane.waiting if item.job is not job)
        self._count_waiting()
        if lane.worker is not None and lane.drawing and all(item.job.over for item in lane.drawing):
            lane.worker.stop_batch()
        return True

    def watch(self, job: Job) -> None:
        """Have previews made of a request that is being drawn, from its next step on."""
        lane = self._lanes[job.order.served.id]
        if lane.worker is not None and any(item.job is job for item in lane.drawing):
            lane.worker.watch()

    async def load(self, name: str | None = None) -> None:
        """Have an engine set ready before it is asked for, the first by default; raises what opening it raises."""
        await self._fleet.load(self._lanes[self.catalog.find(name).id])

    def loaded(self) -> list[str]:
        """Ids of the engine sets that are loaded."""
        return [lane.served.id for lane in self._lanes.values() if lane.ready()]

    def process_of(self, name: str) -> int | None:
        """The number of the process that draws with an engine set; None where it is not loaded."""
        worker = self._lanes[self.catalog.find(name).id].worker
        return None if worker is None else worker.pid

    async def image_bytes(self, drawn: Drawn, kind: str = "png", quality: int = 90) -> bytes:
        """An image file (png, jpeg, webp) of what was drawn, with its settings inside."""
        return await self._apart(len(drawn.pixels) > SMALL_BYTES, encode, drawn, kind, quality)

    async def _apart(self, long: bool, work: Callable[..., Result], *arguments: Any) -> Result:
        """Do it in a thread where it takes long: a change of threads alone takes a millisecond."""
        return await asyncio.to_thread(work, *arguments) if long else work(*arguments)

    # Drawing

    def _end(self, job: Job, outcome: Any, error: BaseException | None = None) -> None:
        if self._jobs.pop(job.id, None) is not None:
            job.end(outcome, error)
            self._count(lambda: self.metrics.requests.labels(job.api, job.order.served.id, outcome).inc())

    @staticmethod
    def _count(counting: Callable[[], object]) -> None:
        """Count something once those were answered who wait for it."""
        asyncio.get_running_loop().call_soon(counting)

    def _count_waiting(self) -> None:
        """Say how many wait, and tell each request its place."""
        self.metrics.waiting.set(sum(len(lane.waiting) for lane in self._lanes.values()))
        for lane in self._lanes.values():
            seen: set[Job] = set()
            for place, item in enumerate(lane.waiting):
                if item.job not in seen:
                    seen.add(item.job)
                    if item.job.state == "waiting" and item.job.position != place + len(lane.drawing):
                        item.job.position = place + len(lane.drawing)
                        item.job.changed()

    async def _run(self, lane: Lane) -> None:
        """Draw what waits in a lane, batch by batch."""
        while lane.waiting:
            try:
                await self._fleet.load(lane)
            except Exception as error:  # noqa: BLE001 - whatever it was, those who wait must hear of it
                self._fail([*lane.waiting], error)
                self._count_waiting()
                continue  # some may have come meanwhile
            async with self._places[lane.served.place]:
                if lane.worker is not None and lane.worker.alive and (batch := self._take(lane)):
                    await self._draw(lane, lane.worker, batch)
            await self._fleet.give_way(lane)

    def _take(self, lane: Lane) -> list[Item]:
        """The next images: that which waited longest, and those that can be drawn with it."""
        lane.waiting = deque(item for item in lane.waiting if not item.job.over)
        if len(lane.waiting) < 2:
            taken, lane.waiting = list(lane.waiting), deque()
            return taken
        order = lane.waiting[0].job.order
        room = 1 if lane.waiting[0].alone else max(1, lane.served.batch(order.settings).max)
        fitting = (item for item in lane.waiting if item.job.order.key == order.key and not item.alone)
        taken = [lane.waiting[0]] if room == 1 else [item for item, _ in zip(fitting, range(room), strict=False)]
        lane.waiting = deque(item for item in lane.waiting if item not in taken)
        return taken

    async def _draw(self, lane: Lane, worker: Worker, items: list[Item]) -> None:
        """Draw a batch, and hand out its images; where that fails, `_failed` says what becomes of each."""
        lane.drawing, lane.used = items, time.monotonic()
        try:
            worker.draw(self._batch(items))
            self._begun(items)
            while (said := await worker.news())[0] == "step":
                self._progress(items, *said[2:])
            if said[0] == "drawn":
                await self._hand_out(lane, items, said[2])
        except Exception as error:  # noqa: BLE001 - of this batch alone
            if isinstance(error, DiedError):
                self._fleet.lost(lane)
            self._failed(lane, items, error)
        finally:
            lane.drawing, lane.used = [], time.monotonic()
            self._fleet.changed()

    def _begun(self, items: Sequence[Item]) -> None:
        for job in _jobs_of(items):
            job.state = "running"
            job.started = job.started or time.monotonic()
            job.changed()
        self._count_waiting()

    def _batch(self, items: Sequence[Item]) -> Batch:
        order = items[0].job.order
        files = self.loras if order.loras else {}
        if gone := [lora.name for lora in order.loras if lora.name not in files]:
            raise UnknownNameError(f"LoRA {gone[0]!r} was taken from the server's folder meanwhile")
        pictures = tuple(
            Picture(item.job.order.prompt, item.job.order.negative_prompt, item.seed, item.job.order.images)
            for item in items
        )
        loras = tuple((str(files[lora.name]), lora.strength) for lora in order.loras)
        return Batch(order.settings, pictures, order.scheduler, loras)

    def _progress(self, items: Sequence[Item], places: Sequence[int], done: int, preview: bytes | None) -> None:
        decoding = done == items[0].job.order.settings.done_steps
        for place in places:
            items[place].step = done
            if decoding:
                items[place].caption.prepare()
        if preview is not None and places:
            items[places[0]].job.preview = preview
        for job in _jobs_of([items[place] for place in places]):
            job.changed()

    async def _hand_out(self, lane: Lane, items: Sequence[Item], images: Sequence[Painted]) -> None:
        for one in images:
            item = items[one.place]
            if not item.job.over:
                await self._deliver(item, _drawn(item, one))
        done = [job for job in _jobs_of(items) if len(job.drawn) == len(job.items)]
        for job in done:
            self._end(job, "done")
        calls = sum(1 / one.together for one in images)
        seconds = [time.monotonic() - job.asked for job in done]
        self._count(lambda: self.metrics.drawn(lane.served.id, len(images), calls, seconds))

    async def _deliver(self, item: Item, drawn: Drawn) -> None:
        """Keep an image where that was asked for, and give it to its request; that alone fails where it is not kept."""
        job = item.job
        try:
            if self.output is not None:
                file = self.output / f"{job.id}-{drawn.index}.png"
                await asyncio.to_thread(write_bytes, file, await self.image_bytes(drawn))
        except OSError as error:
            self._fail([item], error)
            return
        job.drawn.append(drawn)
        job.changed()

    def _failed(self, lane: Lane, items: list[Item], error: Exception) -> None:
        """Draw each image of a call again by itself; fail the one that failed alone, so whose fault it was is known.

        A process may have been killed for no fault of the image, so that one which died of it alone is tried again.
        """
        if items[0].alone or (len(items) == 1 and not isinstance(error, DiedError)):
            self._fail(items, error)
            return
        wanted = [item for item in items if not item.job.over]
        log.warning("%s; images of its call, drawn again, each by itself: %d", error, len(wanted))
        for item in reversed(wanted):
            item.alone, item.step = True, 0
            lane.waiting.appendleft(item)

    def _fail(self, items: Sequence[Item], error: BaseException) -> None:
        for job in _jobs_of(items):
            lane = self._lanes[job.order.served.id]
            lane.waiting = deque(item for item in lane.waiting if item.job is not job)
            self._end(job, "failed", error)
        if items and status_of(error) >= 500:
            log.warning("request %s failed: %s", items[0].job.id, error, exc_info=_unexpected(error))

    async def drain(self, seconds: float) -> None:
        """Take no more, answer what waits with StoppingError; what runs then has some seconds to finish."""
        self.stopping = True
        for lane in self._lanes.values():
            running = {item.job for item in lane.drawing}
            self._fail(
                [item for item in lane.waiting if item.job not in running],
                StoppingError("the server is about to end, before this was drawn: ask again later"),
            )
        end = time.monotonic() + seconds
        while self.current() and time.monotonic() < end:
            await asyncio.sleep(0.05)
        for job in self.current():
            self._fail(job.items, StoppingError(f"the server ended, and this was not drawn within {seconds:g} s"))

    async def close(self) -> None:
        """End all processes."""
        await self.drain(0)
        for lane in self._lanes.values():
            if lane.task is not None:
                lane.task.cancel()
        await self._fleet.close()


def _jobs_of(items: Sequence[Item]) -> list[Job]:
    return list(dict.fromkeys(item.job for item in items))


def _unexpected(error: BaseException) -> BaseException | None:
    return None if isinstance(error, SdkdError) else error


def _drawn(item: Item, one: Painted) -> Drawn:
    job, now = item.job, time.monotonic()
    queued = (job.started or now) - job.asked
    timing = Timing(queued, one.text_s, one.steps_s, one.decode_s, now - job.asked, one.together)
    return Drawn(item.index, item.seed, one.width, one.height, one.pixels, item.caption, timing, one.notes)
