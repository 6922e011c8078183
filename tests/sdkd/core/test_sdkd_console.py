"""What is printed is text: no markup, no escape sequence, no encoding and no width makes it fail or vanish."""

from __future__ import annotations

import io
import sys

import pytest

from sdkd.core.console import prepare_streams, printable, progress, show, styled, table

NAMES = ["[/x]", "[bold]", "a\x1b[2Jb", ":smile:", "\x9b31m"]


def test_names_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    show(*NAMES, styled("[/y]\x07", "red"), table("[/title]", ["[/column]"], [[name] for name in NAMES]))
    said = capsys.readouterr().out
    for shown in ("[/x]", "[bold]", r"a\x1b[2Jb", ":smile:", r"\x9b31m", r"[/y]\x07", "[/title]", "[/column]"):
        assert shown in said
    assert not {"\x1b", "\x07", "\x9b"} & set(said)


def test_progress_takes_names_too(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("[/t]") as report:
        report("[/x] \x1b[2J", 0.5)
    assert r"[/t]: [/x] \x1b[2J" in capsys.readouterr().err
    assert printable("a\n\tb\r") == "a\n\tb\\x0d"


def test_an_encoding_without_the_letter_spells_it_out(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("COLUMNS", "0")
    prepare_streams()
    show("ein süßer Stern ★ \udcff")
    stream.flush()
    assert stream.buffer.getvalue() == rb"ein s\xfc\xdfer Stern \u2605 \udcff" + b"\n"  # type: ignore[attr-defined]
