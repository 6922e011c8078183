"""JSON that is damaged or made to harm: every kind of it is one error that names the file and the key."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import pytest

from sdkd.core.files import read_json
from sdkd.core.schema import problem
from sdkd.errors import InputError


@dataclass(frozen=True)
class Part:
    name: str
    bytes: int
    share: float = 1.0
    note: str | None = None


@dataclass(frozen=True)
class Whole:
    kind: Literal["a", "b"]
    parts: tuple[Part, ...]
    more: Mapping[str, Any] = field(default_factory=dict)


class Index(TypedDict):
    shards: list[int]
    by_name: dict[str, Part]
    pair: NotRequired[tuple[int, int]]


PART = {"name": "x", "bytes": 1}


@pytest.mark.parametrize(
    ("value", "shape", "message"),
    [
        ({"kind": "a", "parts": [PART, PART | {"share": 2, "note": "n"}], "more": {"x": [1]}}, Whole, None),
        ({"kind": "a", "parts": [{**PART, "bytes": True}]}, Whole, "parts[0].bytes is True, not a whole number"),
        ({"kind": "a", "parts": [{**PART, "bytes": 1.0}]}, Whole, "parts[0].bytes is 1.0, not a whole number"),
        (
            {"kind": "a", "parts": [{**PART, "share": float("inf")}]},
            Whole,
            "parts[0].share is inf, not a finite number",
        ),
        ({"kind": "a", "parts": [{**PART, "note": 3}]}, Whole, "parts[0].note is 3, not text"),
        ({"kind": "a", "parts": [{"name": "x"}]}, Whole, "parts[0].bytes is missing"),
        ({"kind": "a", "parts": [PART | {"odd key": 1}]}, Whole, "parts[0].'odd key' is unknown"),
        ({"kind": "a", "parts": [[]]}, Whole, "parts[0] is a list, not an object"),
        ({"kind": "a", "parts": {}}, Whole, "parts is an object, not a list"),
        ({"kind": "c", "parts": []}, Whole, "kind is 'c', not one of 'a', 'b'"),
        ({"kind": [], "parts": []}, Whole, "kind is a list, not one of 'a', 'b'"),
        ([], Whole, "the file is a list, not an object"),
        ({"shards": [1], "by_name": {"x": PART}, "of later versions": 1}, Index, None),
        ({"shards": [1], "by_name": {"x": PART}, "pair": [1, 2]}, Index, None),
        ({"shards": [1], "by_name": {"x": PART}, "pair": [1]}, Index, "pair has 1 items instead of 2"),
        ({"shards": ["1"], "by_name": {}}, Index, "shards[0] is '1', not a whole number"),
        ({"shards": [], "by_name": {"x": None}}, Index, "by_name.x is None, not an object"),
        ("x", str | int, None),
        (None, str | int, "the file is None, not text or a whole number"),
    ],
)
def test_the_first_wrong_key_is_named(value: Any, shape: Any, message: str | None) -> None:
    assert problem(value, shape) == message


DEEP = b"[" * 100_000


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "is not JSON"),
        (b"", "is not JSON"),
        (DEEP, "nested too deeply"),
        (b"\xff\xfe{}", r"is not UTF-8 \(invalid start byte at byte 0\)"),
        (b'{"a": ' + b"1" * 5000 + b"}", "is damaged .*4300 digits"),
        (b'{"a": 1, "b": 2, "a": 3}', "key 'a' is there twice"),
        (b'{"a": NaN}', "NaN is no number of JSON"),
        (b'{"a": -Infinity}', "-Infinity is no number of JSON"),
        (b'{"a": 1e999}', r"a is inf, not a finite number"),
        (b"[1]", "the file is a list, not an object"),
    ],
)
def test_a_damaged_file_is_one_error_that_names_it(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "index.json"
    path.write_bytes(data)
    with pytest.raises(InputError, match=rf"index.json' .*{message}.*restore it or make it again"):
        read_json(path, dict[str, float], strict=True)


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.json")
    (tmp_path / "folder.json").mkdir()
    for name in ("fifo.json", "folder.json"):
        with pytest.raises(InputError, match=f"{name}' is no regular file"):
            read_json(tmp_path / name)


def test_files_of_others_may_say_infinity_and_begin_with_a_mark(tmp_path: Path) -> None:
    path = tmp_path / "scheduler_config.json"
    path.write_bytes(b'\xef\xbb\xbf{"lambda_min_clipped": -Infinity}')
    assert read_json(path) == {"lambda_min_clipped": float("-inf")}
