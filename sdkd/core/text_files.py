r"""Text files that people wrote: prompts, captions, lists of metadata, settings. The one reader of all of them.

Only \n, \r\n and \r end a line. Other separators of Unicode (U+2028, U+0085, ...) are part of the text, as in JSON.
"""

from __future__ import annotations

import codecs
import logging
import math
import os
import re
from pathlib import Path
from typing import Any

from sdkd.core.documents import read_regular
from sdkd.errors import InputError

log = logging.getLogger(__name__)

# The longer mark first: that of UTF-32 begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_MARK = "\ufeff"
_LARGEST_YAML = 1 << 20  # bytes
_LARGEST_PIPE = 1 << 24
_OLD = ("cp1252", "latin-1")  # Windows' encoding of Western text, and what takes every byte


def read_text(path: Path, notes: list[str] | None = None) -> str:
    """A file's text: newlines end lines, no byte order mark is left; InputError when it is none or not there.

    `notes` gets what is otherwise logged: that an encoding was guessed.
    """
    what = f"file {str(path)!r}"
    if path.is_dir():
        raise InputError(f"{what} is a folder: give a text file")
    return decode_text(read_regular(path, math.inf), what, notes)


def read_lines(path: Path) -> list[str]:
    """The lines of a file, empty ones too, without their ends; InputError as `read_text`."""
    return read_text(path).split("\n")


def read_yaml(path: Path) -> Any:
    """Parse a YAML file of plain values, without anchors and aliases: a few lines of those fill any memory.

    InputError, which names the file, when it is missing or no YAML.
    """
    import yaml

    class Plain(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            event = self.peek_event()
            if getattr(event, "anchor", None) is not None:
                raise yaml.MarkedYAMLError(None, None, "anchors and aliases are not read", event.start_mark)
            return super().compose_node(parent, index)

    text = decode_text(read_regular(path, _LARGEST_YAML), f"file {str(path)!r}")
    try:
        return Plain(text).get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        wrong = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise InputError(f"file {str(path)!r} is not understood ({wrong}): repair it or move it away") from None


def decode_text(data: bytes, what: str, notes: list[str] | None = None) -> str:
    """Text from the bytes of `what` (for messages), as `read_text` gives it; InputError when they are no text.

    A byte order mark says which encoding it is; without one it is UTF-8, or else that of Western Windows, with a
    warning. The marks of files that were joined are left out, too.
    """
    text = clean(_decoded(data, what, notes))
    if "\0" in text:
        raise InputError(f"{what} holds NUL bytes: it is no text, or UTF-16 without a mark; save it as UTF-8")
    lines = text.replace("\r\n", "\n").replace("\r", "\n")
    return re.sub(f"^{_MARK}+", "", lines, flags=re.MULTILINE)


def _decoded(data: bytes, what: str, notes: list[str] | None) -> str:
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            try:
                return data[len(mark) :].decode(encoding)
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{what} begins as {encoding.upper()} and is not ({error.reason} at byte {error.start}): "
                    "save it again as UTF-8"
                ) from None
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        if b"\0" in data:
            raise InputError(f"{what} is no text ({error.reason} at byte {error.start}): save it as UTF-8") from None
        guessed = f"{what} is not UTF-8 (byte {error.start}): read as Windows-1252; convert it to be sure"
    if notes is None:
        log.warning("%s", guessed)
    else:
        notes.append(guessed)
    try:
        return data.decode(_OLD[0])
    except UnicodeDecodeError:
        return data.decode(_OLD[1])


def clean(text: str) -> str:
    """Text that can be encoded: halves of surrogate pairs, as JSON's escapes can give, are joined or become U+FFFD."""
    if not any("\ud800" <= sign <= "\udfff" for sign in text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def typed_text(text: str) -> str:
    """Text that was typed as an argument of a command: its bytes that Python could not decode are read as in files."""
    if clean(text) == text:
        return text
    try:
        return decode_text(os.fsencode(text), "the text that was typed")
    except UnicodeEncodeError:  # not from the command line
        return clean(text)


def prompt_lines(path: Path) -> tuple[str, ...]:
    """The prompts of a file, one a line, empty lines left out; InputError when there is none."""
    if not path.exists():
        raise InputError(f"prompts {str(path)!r} is no file: give a text file with one prompt a line")
    if found := _stripped(_of_pipe(path) if path.is_fifo() else read_lines(path)):
        return found
    raise InputError(f"prompts {str(path)!r} holds no prompt: write one a line")


def _of_pipe(path: Path) -> list[str]:
    """Lines of an open pipe, as the shell's <(...) and /dev/stdin are; InputError for one that nobody may write to."""
    if path.parts[:2] not in (("/", "dev"), ("/", "proc")):
        raise InputError(f"prompts {str(path)!r} is a named pipe, of which reading may never end: give a file")
    with path.open("rb") as stream:
        data = stream.read(_LARGEST_PIPE + 1)
    if len(data) > _LARGEST_PIPE:
        raise InputError(f"prompts {str(path)!r} give more than {_LARGEST_PIPE} bytes: give a file")
    return decode_text(data, f"prompts {str(path)!r}").split("\n")


def prompts_of(text: str) -> tuple[str, ...]:
    """Prompts from a file with one a line, or from 'one;another'; InputError when there is none."""
    path = Path(text)
    if _is_there(path):
        return prompt_lines(path)
    if path.suffix == ".txt":
        raise InputError(f"prompts file {text!r} does not exist: give a file with one prompt per line, or 'a;b'")
    if found := _stripped(typed_text(text).split(";")):
        return found
    raise InputError(f"prompts {text!r} hold no prompt: give a file with one prompt per line, or 'a;b'")


def _stripped(parts: list[str]) -> tuple[str, ...]:
    return tuple(part.strip() for part in parts if part.strip())


def _is_there(path: Path) -> bool:
    try:
        return path.is_file() or path.is_fifo()  # as the shell's <(...) gives
    except (OSError, ValueError):  # longer than a file name may be, or with a NUL
        return False
