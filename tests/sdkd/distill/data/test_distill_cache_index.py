"""A cache's index of odd types is one message that names file and key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sdkd.distill.data.disk_cache import INDEX, SCHEMA, open_cache
from sdkd.errors import InputError

SHARD = {"file": "latents-00000.safetensors", "bytes": 8, "sha256": "0"}
WHOLE: dict[str, Any] = {
    "schema": SCHEMA, "resolution": 64, "precision": "fp32", "shard_images": 4, "latents": [SHARD], "texts": [],
    "captions": {"sha256": "0"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": "64"}, r"index\.json of cache .*resolution is .* not a whole number"),
        ({"precision": "fp8"}, "precision"),
        ({"shard_images": 0}, "shard_images of .* 0 is too small"),
        ({"latents": {"file": "x"}}, "latents.*a list"),
        ({"latents": [{"file": "latents-00000.safetensors"}]}, "bytes"),
        ({"latents": [SHARD | {"bytes": None}]}, "bytes"),
        ({"texts": [5]}, "texts"),
        ({"captions": None}, "captions.*an object"),
        ({"schema": 99}, "is not of a cache that this version reads"),
        ({}, "is not there with its 8 bytes"),
    ],
)
def test_an_index_of_odd_types(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (tmp_path / INDEX).write_text(json.dumps(WHOLE | changes))
    with pytest.raises(InputError, match=message):
        open_cache(tmp_path)


@pytest.mark.parametrize(("text", "message"), [("[" * 9000, "nested"), ('{"a": 1, "a": 2}', "a"), ("[]", "an object")])
def test_an_index_that_is_no_index(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(InputError, match=message):
        open_cache(tmp_path)
