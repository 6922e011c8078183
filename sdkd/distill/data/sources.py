"""Where many captioned images come from: which source a name means, and tar shards in WebDataset's layout."""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from sdkd.core.files import read_json, write_bytes
from sdkd.core.images import image_size, read_rgb
from sdkd.core.schema import problem
from sdkd.core.text_files import decode_text
from sdkd.distill.data.image_folder import SIDECARS, SUFFIXES, files_below, hidden
from sdkd.distill.data.rows import CaptionedImages, caption_of
from sdkd.distill.data.tables import TableImages, load_saved, load_table, no_column
from sdkd.errors import InputError

_PATTERN, _RANGE = re.compile(r"[*?\[{]"), re.compile(r"(\d+)\.\.(\d+)")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_IMAGES = tuple(suffix[1:] for suffix in SUFFIXES)  # extensions of tar members
_TEXTS = tuple(suffix[1:] for suffix in reversed(SIDECARS))  # the last one that is there is the column _TEXT_COLUMN
_TEXT_COLUMN = "text"
_HEAD = 1 << 16  # bytes that hold the size of nearly every image
_INDEX_SCHEMA = 2
_SCANNERS = 8  # threads that read the headers of shards
_PROBED = 100  # rows of shards that are looked at for the columns of captions
_SAVED = ("dataset_dict.json", "state.json")  # what `save_to_disk` writes


def open_source(
    name: str, path: Path, image_column: str | None, caption_columns: Sequence[str]
) -> CaptionedImages | None:
    """The source that `open_images` was asked for; None for a folder of single images, and where nothing is.

    Raises InputError when it holds no captioned images, or lacks the columns.
    """
    if path.is_dir():
        return _open_folder(path, image_column, caption_columns)
    if shards := matching(name):
        if all(shard.suffix == ".parquet" for shard in shards):
            table = load_table("parquet", data_files=[str(shard) for shard in shards])
            homes = list(dict.fromkeys(shard.parent for shard in shards))
            return TableImages(table, image_column, caption_columns, homes=homes)
        return TarShards(shards, image_column, caption_columns)
    if _HUB_ID.fullmatch(name) and not path.suffix and not path.exists():
        if "/" in name and path.parent.is_dir():
            raise InputError(
                f"data {name!r} is not there, though the folder {str(path.parent)!r} is: correct the name; a dataset "
                "of the hub is looked for where no such folder is"
            )
        return TableImages(load_table(name), image_column, caption_columns, name)
    return None


def _open_folder(path: Path, image_column: str | None, caption_columns: Sequence[str]) -> CaptionedImages | None:
    if any((path / file).is_file() for file in _SAVED):
        return TableImages(load_saved(path), image_column, caption_columns, str(path))
    if shards := sorted(shard for shard in path.glob("*.tar") if not hidden(shard.name)):
        return TarShards(shards, image_column, caption_columns)
    if tables := [*path.glob("*.parquet"), *path.glob("*/*.parquet")]:
        homes = [path, *sorted({table.parent for table in tables} - {path})]
        beside = any(file.suffix.lower() in SUFFIXES for file in files_below(path))
        table = _table_of(tables) if beside else load_table(str(path))
        try:
            return TableImages(table, image_column, caption_columns, str(path), homes)
        except InputError as error:
            more = f"; its tables, such as {str(tables[0])!r}, are read before its images: move them away to use those"
            raise InputError(f"{error}{more if beside else ''}") from None
    return None


def _table_of(tables: Sequence[Path]) -> Any:
    """Parquet files beside images, which `datasets` would take instead: the files are named."""
    own = sorted(table for table in tables if not hidden(table.name))
    train = [table for table in own if "train" in re.split(r"[^a-z]+", table.stem.lower())]
    return load_table("parquet", data_files=[str(table) for table in train or own])


def matching(pattern: str) -> list[Path]:
    """The .tar or .parquet files of a path or of a pattern with *, ? and {00..99}; InputError when one is missing."""
    found: list[Path] = []
    for name in _braces(pattern):
        path = Path(name).expanduser()
        if _PATTERN.search(name):
            folder = Path(path.anchor or ".")
            matches = folder.glob(str(path.relative_to(path.anchor) if path.anchor else path))
            found += sorted(match for match in matches if not match.name.startswith("._"))  # of macOS
        elif path.suffix in (".tar", ".parquet"):
            if not path.is_file():
                raise InputError(f"data file {name!r} does not exist: restore it, or correct the name or pattern")
            found.append(path)
    if _PATTERN.search(pattern) and not found:
        raise InputError(f"data pattern {pattern!r} matches no file: correct it; it may hold *, ? and {{00..99}}")
    if other := [path for path in found if path.suffix not in (".tar", ".parquet")]:
        raise InputError(f"data file {str(other[0])!r} is neither .tar nor .parquet: unpack it, or correct the pattern")
    return found


def _braces(pattern: str) -> Iterator[str]:
    """`a{00..02}` -> a00, a01, a02; `{x,y}` -> x, y, as a shell does."""
    before, opened, rest = pattern.partition("{")
    inside, closed, after = rest.partition("}")
    if not (opened and closed):
        yield pattern
        return
    if numbers := _RANGE.fullmatch(inside):
        low, high = numbers.groups()
        choices = [f"{number:0{len(low)}d}" for number in range(int(low), int(high) + 1)]
    else:
        choices = inside.split(",")
    for choice in choices:
        yield from _braces(before + choice + after)


class Member(NamedTuple):
    """Bytes of a file inside a shard."""

    offset: int
    size: int


class TarShards:
    """Images in tar files: `0001.jpg` with `0001.txt` or `0001.json` beside it, as WebDataset and img2dataset write.

    Only headers are read at first, once: they are kept in `.<shard>.index.json` beside the shard where that can be
    written. Rows are then read by offset, by any number of threads; nothing is unpacked. A .txt or .caption is the
    column "text", a .json gives the others. `blocks` are the indices of each shard. InputError for a damaged shard.
    """

    def __init__(self, shards: Sequence[Path], image_column: str | None, caption_columns: Sequence[str]) -> None:
        self.shards = list(shards)
        self._captions = tuple(caption_columns)
        self._images = (image_column.lower().removeprefix("."),) if image_column else _IMAGES
        with ThreadPoolExecutor(_SCANNERS) as pool:
            scanned = list(pool.map(shard_members, self.shards))
        self._rows: list[tuple[int, str, dict[str, Member]]] = []  # shard, key, members
        self.blocks: list[range] = []
        for place, samples in enumerate(scanned):
            start = len(self._rows)
            self._rows += [(place, key, parts) for key, parts in samples.items() if self._image_of(parts)]
            self.blocks.append(range(start, len(self._rows)))
        self._check(scanned)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int, /) -> Mapping[str, Any]:
        shard, _, parts = self._rows[index]
        image = read_rgb(self._read(shard, parts[self._image_of(parts)]), self._name(index))
        return {"image": image, "caption": self.caption(index)}

    def caption(self, index: int) -> str:
        """Caption of one image; InputError when it has none."""
        columns = self._columns(index)
        found = caption_of(columns, self._captions)
        if found is None:
            raise InputError(
                f"{self._name(index)} has no caption in {', '.join(self._captions)}: its columns are "
                f"{', '.join(columns) or 'none'}"
            )
        return found.strip()

    def image_size(self, index: int) -> tuple[int, int]:
        """Width and height in pixels, from the image's header."""
        shard, _, parts = self._rows[index]
        member = parts[self._image_of(parts)]
        with contextlib.suppress(InputError):
            return image_size(self._read(shard, Member(member.offset, min(member.size, _HEAD))), self._name(index))
        return image_size(self._read(shard, member), self._name(index))

    def _name(self, index: int) -> str:
        shard, key, _ = self._rows[index]
        return f"image {key!r} of shard {str(self.shards[shard])!r}"

    def _columns(self, index: int) -> dict[str, Any]:
        shard, key, parts = self._rows[index]
        found: dict[str, Any] = {}
        try:
            if "json" in parts:
                row = json.loads(decode_text(self._read(shard, parts["json"]), "it"))
                if wrong := problem(row, dict[str, Any]):
                    raise ValueError(wrong)
                found |= row
            for name in _TEXTS:
                if name in parts:
                    found[_TEXT_COLUMN] = decode_text(self._read(shard, parts[name]), f"caption {key!r}")
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"caption of {key!r} in shard {str(self.shards[shard])!r} cannot be read ({error}): repair the shard"
            ) from error
        return found

    def _image_of(self, parts: Mapping[str, Member]) -> str:
        return next((name for name in self._images if name in parts), "")

    def _read(self, shard: int, member: Member) -> bytes:
        path = self.shards[shard]
        try:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                data = os.pread(descriptor, member.size, member.offset)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise InputError(f"shard {str(path)!r} cannot be read ({error}): restore it") from error
        if len(data) != member.size:
            raise InputError(f"shard {str(path)!r} ends within an image: it was changed; copy or make it again")
        return data

    def _check(self, scanned: Sequence[Mapping[str, Mapping[str, Member]]]) -> None:
        if not self._rows:
            seen = {name for samples in scanned for parts in samples.values() for name in parts}
            raise InputError(
                f"tar shards such as {str(self.shards[0])!r} hold no images ({', '.join(self._images)}; found: "
                f"{', '.join(sorted(seen)) or 'nothing'}): put 0001.jpg and 0001.txt or 0001.json into them"
            )
        columns: dict[str, Any] = {}
        for index in range(min(len(self), _PROBED)):
            with contextlib.suppress(InputError):  # one bad row: reported when it is read
                columns |= self._columns(index)
            if any(name in columns for name in self._captions):
                return
        raise no_column("caption", self._captions, columns, str(self.shards[0]))


def shard_members(path: Path) -> dict[str, dict[str, Member]]:
    """Images and captions of a shard by key and extension, in the shard's order; InputError when it is damaged."""
    note = path.with_name(f".{path.name}.index.json")
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):
            raise InputError(f"shard {str(path)!r} is no regular file, and rows are read by their place: copy it first")
        stamp = {"schema": _INDEX_SCHEMA, "size": state.st_size, "mtime_ns": state.st_mtime_ns}
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError, KeyError):
            kept = read_json(note)
            if {name: kept[name] for name in stamp} == stamp:
                return {
                    key: {name: _member(at, state.st_size) for name, at in parts.items()}
                    for key, parts in kept["samples"].items()
                }
        samples = _scan(path, state.st_size)
    except (OSError, tarfile.TarError) as error:
        raise InputError(
            f"shard {str(path)!r} is truncated or no tar file ({error}): copy or make it again, uncompressed"
        ) from error
    with contextlib.suppress(OSError):  # a read-only place: the headers are read again next time
        write_bytes(note, json.dumps(stamp | {"samples": samples}).encode())
    return samples


def _member(kept: Sequence[int], size: int) -> Member:
    """A place as an index names it; ValueError or TypeError when it is none of a file of `size` bytes."""
    offset, count = kept
    if not 0 <= offset <= offset + count <= size:
        raise ValueError(f"{count} bytes at {offset} are not within {size}")
    return Member(offset, count)


def _scan(path: Path, size: int) -> dict[str, dict[str, Member]]:
    samples: dict[str, dict[str, Member]] = {}
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # else tarfile keeps every header
            folder, _, file = member.name.rpartition("/")
            key, dot, extension = file.partition(".")
            if any(map(hidden, folder.split("/"))):
                continue
            if member.isfile() and key and dot and (extension.lower() in (*_IMAGES, *_TEXTS, "json")):
                name = f"{folder}/{key}" if folder else key
                samples.setdefault(name, {})[extension.lower()] = Member(member.offset_data, member.size)
        if tar.offset + tarfile.BLOCKSIZE > size:
            raise tarfile.ReadError("its end is missing")
    return samples
