"""Processes that draw: what is said to them and heard from them on an event loop."""

import asyncio
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import pytest

from sdkd.core.processes import Line, say

LARGE = bytes(range(256)) * 20_000  # more than any buffer on the way


def echo(connection: Connection) -> None:
    while (what := connection.recv()) is not None:
        say(connection, what)
    connection.close()


def test_a_line_carries_messages_of_any_size_until_the_other_end_hangs_up():
    async def talk() -> list[object]:
        ours, theirs = Pipe()
        echoing = asyncio.create_task(asyncio.to_thread(echo, theirs))
        line = await Line.of(ours)
        assert ours.closed
        found = []
        for what in ("a word", LARGE, {"step": 1}):
            line.say(what)
            found.append(await line.hear())
        line.say(None)
        with pytest.raises(EOFError, match="0 bytes read on a total of 4"):
            await line.hear()
        await echoing
        line.say("nobody hears it")
        line.close()
        return found

    assert asyncio.run(talk()) == ["a word", LARGE, {"step": 1}]
