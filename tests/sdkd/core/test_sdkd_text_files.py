"""Text files in every encoding and with every end of line: one reader."""

from __future__ import annotations

import codecs
import itertools
import logging
import os
from pathlib import Path

import pytest

from sdkd.core.text_files import (
    clean,
    decode_text,
    prompt_lines,
    prompts_of,
    read_lines,
    read_text,
    read_yaml,
    typed_text,
)
from sdkd.errors import InputError

TEXT = "ein Stern, süß\n星\n"


def test_encodings_and_ends_of_lines(tmp_path: Path) -> None:
    path, kinds = tmp_path / "a.txt", [(b"", "utf-8"), (codecs.BOM_UTF8, "utf-8")]
    kinds += [(codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be")]
    kinds += [(codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be")]
    for (mark, encoding), ends in itertools.product(kinds, ("\n", "\r\n", "\r")):
        path.write_bytes(mark + TEXT.replace("\n", ends).encode(encoding))
        assert read_text(path) == TEXT
        assert prompt_lines(path) == prompts_of(str(path)) == ("ein Stern, süß", "星")


def test_western_windows_text_is_read_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "old.txt"
    path.write_bytes("caf\xe9 – 5 €".encode("cp1252"))
    with caplog.at_level(logging.WARNING):
        assert read_text(path) == "café – 5 €"
    assert f"file {str(path)!r} is not UTF-8 (byte 3): read as Windows-1252" in caplog.text
    assert decode_text(b"\xe9\x81", "x") == "é\x81"  # what Windows does not have either


def test_other_separators_and_marks_of_joined_files(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a\u2028b\u0085c\x0bd\x1ce\n\nf", encoding="utf-8")
    assert read_lines(path) == ["a\u2028b\u0085c\x0bd\x1ce", "", "f"]
    assert prompt_lines(path) == ("a\u2028b\u0085c\x0bd\x1ce", "f")
    assert decode_text(b"\xef\xbb\xbfone\n\xef\xbb\xbftwo \xef\xbb\xbf x", "x") == "one\ntwo \ufeff x"


def test_what_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "bad.txt"
    for data, message in {
        b"a\0b": r"bad.txt' holds NUL bytes: .* save it as UTF-8",
        b"\x89PNG\r\n\0\xff": r"bad.txt' is no text",
        "星".encode("utf-16-be") + b"\0a": r"bad.txt' is no text|NUL",
        codecs.BOM_UTF16_LE + b"a": r"bad.txt' begins as UTF-16-LE and is not \(truncated data at byte 0\)",
    }.items():
        path.write_bytes(data)
        with pytest.raises(InputError, match=message):
            read_text(path)


def test_no_file_and_no_prompt(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone.txt' does not exist"):
        read_text(tmp_path / "gone.txt")
    with pytest.raises(InputError, match=r"is a folder: give a text file"):
        prompt_lines(tmp_path)
    with pytest.raises(InputError, match=r"prompts .*gone' is no file: give a text file"):
        prompt_lines(tmp_path / "gone")
    (tmp_path / "empty.txt").write_bytes(b"\xef\xbb\xbf\r\n \r\n")
    with pytest.raises(InputError, match=r"empty.txt' holds no prompt: write one a line"):
        prompts_of(str(tmp_path / "empty.txt"))
    with pytest.raises(InputError, match="prompts ' ; ' hold no prompt"):
        prompts_of(" ; ")
    with pytest.raises(InputError, match=r"gone.txt' does not exist: give a file"):
        prompts_of(str(tmp_path / "gone.txt"))
    assert prompts_of("a; b;" + "c" * 5000)[2] == "c" * 5000  # longer than a name of a file may be
    assert prompts_of("a\0b") == ("a\0b",)


def test_halves_of_surrogate_pairs() -> None:
    assert clean("a\ud83d\ude00b\ud83d") == "a😀b\ufffd"
    assert typed_text("caf\udce9") == "café"  # as Python hands on a byte that is not UTF-8
    assert prompts_of("ring;caf\udce9\ud83d") == ("ring", "caf\ufffd\ufffd")
    assert typed_text("süß") == "süß"


def test_settings_have_no_anchors_and_are_not_nested_without_end(tmp_path: Path) -> None:
    file = tmp_path / "model.yaml"
    file.write_text("model: {params: {parameterization: v}}")
    assert read_yaml(file) == {"model": {"params": {"parameterization": "v"}}}
    bomb = "a: &a [x, x]\n" + "".join(
        f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in itertools.pairwise("abcdefgh")
    )
    for text, message in (
        (bomb, "anchors and aliases are not read"),
        ("[" * 2_000, "nested too deeply"),
        ("a: [", r"model\.yaml' is not understood"),
    ):
        file.write_text(text)
        with pytest.raises(InputError, match=message):
            read_yaml(file)


def test_prompts_of_an_open_pipe_are_read_and_a_named_one_is_not_waited_for(tmp_path: Path) -> None:
    end, begin = os.pipe()
    os.write(begin, b"a cat\r\n\na dog")
    os.close(begin)
    assert prompts_of(f"/dev/fd/{end}") == ("a cat", "a dog")
    os.close(end)
    os.mkfifo(tmp_path / "prompts.txt")
    with pytest.raises(InputError, match=r"prompts\.txt' is a named pipe, of which reading may never end"):
        prompts_of(str(tmp_path / "prompts.txt"))
