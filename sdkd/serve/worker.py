"""The process of one engine set: it opens the model, draws one batch after the other, and says how far it is.

It is asked by tuples over a pipe, and answers so: `("draw", number, Batch)`, and while it draws `("stop", number)` and
`("watch", number)`, for previews; answers are `("opened", 0)`, `("step", number, places, done, preview)`,
`("drawn", number, images)`, `("stopped", number)` and `("failed", number, Failure)`. Number 0 is the opening.
"""

from __future__ import annotations

import contextlib
import gc
import select
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from sdkd.core import processes
from sdkd.core.child import Failure
from sdkd.models.source import ModelSource
from sdkd.serve.painter import Batch, Painter

EVERY_S = {False: 0.5, True: 0.05}  # between two words about a batch, by whether somebody watches it


class StoppedError(Exception):
    """Nobody wants the batch any more."""


def work(connection: Connection, source: ModelSource, target: str) -> None:
    """The process: open the model, and draw until the server says None or is gone."""
    processes.begin()
    with contextlib.suppress(EOFError, BrokenPipeError):
        try:
            painter = Painter(source, target)
        except Exception as error:  # noqa: BLE001 - whatever a library raises, the server must hear of it
            processes.say(connection, ("failed", 0, Failure.of(error)))
            return
        gc.freeze()  # else the collector walks over all libraries again and again, in the middle of an image
        processes.say(connection, ("opened", 0))
        while (asked := connection.recv()) is not None:
            if asked[0] == "draw":  # the others are late: their batch is over
                Work(connection, painter, *asked[1:]).carry_out()


class Work:
    """One batch that is being drawn."""

    def __init__(self, connection: Connection, painter: Painter, number: int, batch: Batch) -> None:
        self.connection, self.painter, self.number, self.batch = connection, painter, number, batch
        self.watched = False
        self._said = 0.0

    def carry_out(self) -> None:
        """Draw it and send the images, or what went wrong."""
        try:
            images = self.painter.paint(self.batch, self._on_step)
            processes.say(self.connection, ("drawn", self.number, images))
        except EOFError:  # the server wants no more of it
            raise
        except StoppedError:
            processes.say(self.connection, ("stopped", self.number))
        except Exception as error:  # noqa: BLE001 - as above
            processes.say(self.connection, ("failed", self.number, Failure.of(error)))

    def _on_step(self, places: Sequence[int], done: int, latents: Any) -> None:
        while select.select([self.connection], (), (), 0)[0]:  # a tenth of what `poll` takes
            asked = self.connection.recv()
            if asked is None:
                raise EOFError
            if asked[1] == self.number:
                self._told(asked[0])
        now = time.monotonic()
        if now - self._said < EVERY_S[self.watched] and done < self.batch.settings.done_steps:
            return  # steps take milliseconds with small models: to tell of each would slow them down
        self._said = now
        preview = self.painter.preview(latents, self.batch.settings) if self.watched else None
        processes.say(self.connection, ("step", self.number, tuple(places), done, preview))

    def _told(self, what: str) -> None:
        if what == "stop":
            raise StoppedError
        self.watched = True
