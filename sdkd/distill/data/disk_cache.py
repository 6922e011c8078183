"""A cache of latents as training reads it: by row, from memory-mapped shards, each checked when it is first used."""

from __future__ import annotations

import re
import shlex
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import torch

from sdkd.core.conditions import TEXT_EMBEDS, takes_sizes
from sdkd.core.contract import Precision
from sdkd.core.documents import parse_json
from sdkd.core.files import read_json, sha256
from sdkd.core.numbers import check_number
from sdkd.core.schema import problem
from sdkd.distill.data.buckets import Sizes, mirrored_sizes
from sdkd.distill.data.encode import STATES, Given, TextParts, text_digests, vae_digest
from sdkd.errors import InputError

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

INDEX = "index.json"
SETTINGS = "settings.json"
CAPTIONS = "captions.jsonl"
SCHEMA = 1
_SHARD = re.compile(r"(latents|text)-\d{5,}\.safetensors")
PLAIN, MIRRORED = ("mean", "std"), ("mirrored_mean", "mirrored_std")  # tensors of a shard of latents
SIZES = "sizes"  # one more of SDXL's
TEXT = {STATES: "text", TEXT_EMBEDS: "pooled"}  # tensors of a shard of text, by the UNet's inputs; the second of SDXL's
ADDED = "added"  # of an index: whether there are those of SDXL
_OPEN = 64  # shards that a DiskCache keeps open


class Shard(TypedDict):
    """A complete shard: what is read of its record, and of the cache's index."""

    file: str
    bytes: int
    sha256: str
    cut: NotRequired[int]  # of captions


class _Captions(TypedDict):
    sha256: str


class _Index(TypedDict):
    """What is read of a cache's index; `latents` and `texts` are its shards, in order."""

    resolution: int
    precision: Precision
    shard_images: int
    latents: list[Shard]
    texts: list[Shard]
    captions: _Captions
    flip: bool
    images: int
    unreadable: dict[str, str]
    added: NotRequired[bool]


class _Caption(TypedDict):
    text: str


class DiskCache:
    """Latents of a cache folder, read by row from memory-mapped shards; see the protocol `Latents`.

    A shard's SHA-256 is checked when it is first used. Tensors come in the precision of the cache. InputError when the
    folder is incomplete, damaged or something else.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path = Path(path)
        if not (path / INDEX).is_file():
            unfinished = (path / SETTINGS).is_file()
            raise InputError(
                f"cache {str(path)!r} is not complete: run the same `sdkd cache` again, it goes on where it ended"
                if unfinished
                else f"folder {str(path)!r} is no cache (no {INDEX}): make one with: "
                f"sdkd cache MODEL {shlex.quote(str(path))} NEW_FOLDER"
            )
        self.index: dict[str, Any] = read_json(path / INDEX, dict[str, Any], strict=True)
        if self.index.get("schema") != SCHEMA:
            raise InputError(f"{str(path / INDEX)!r} is not of a cache that this version reads: make the cache again")
        if wrong := problem(self.index, _Index):
            raise self._damaged(INDEX, f"is not what was written ({wrong})")
        check_number(f"shard_images of {str(path / INDEX)!r}", self.index["shard_images"], 1)
        self.size, self.precision = int(self.index["resolution"]), str(self.index["precision"])
        for record in (*self.index["latents"], *self.index["texts"]):
            if not _SHARD.fullmatch(str(record["file"])):
                raise self._damaged(INDEX, f"names {record['file']!r}, which is no file of a cache")
            if not (path / record["file"]).is_file() or (path / record["file"]).stat().st_size != record["bytes"]:
                raise self._damaged(record["file"], f"is not there with its {record['bytes']} bytes")
        self.captions = self._captions()
        self._rows = {text: row for row, text in enumerate(dict.fromkeys(["", *self.captions]))}
        self._check_counts()
        self._shards: OrderedDict[str, Any] = OrderedDict()
        self._sound: set[str] = set()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def flip(self) -> bool:
        """Whether there are latents of the mirrored images, too."""
        return bool(self.index["flip"])

    @property
    def cut(self) -> int:
        """Captions with more tokens than were stored."""
        return sum(int(record.get("cut", 0)) for record in self.index["texts"])

    def posterior(self, index: int, mirrored: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation [c, h, w], of the mirrored image where that is asked for.

        Raises IndexError outside 0..len-1, InputError when the shard is damaged.
        """
        mean, std = self._rows_of("latents", MIRRORED if mirrored else PLAIN, range(len(self))[index])
        return mean, std

    def sizes(self, index: int, mirrored: bool = False) -> Sizes | None:
        """What SDXL is told of an image, or of the mirrored one; None in a cache of another family."""
        if not self.index.get(ADDED):
            return None
        (found,) = self._rows_of("latents", (SIZES,), range(len(self))[index])
        sizes: Any = tuple(found.tolist())
        return mirrored_sizes(sizes) if mirrored else sizes

    def text(self, index: int) -> Given | None:
        """Text embeddings of an image's caption, of the empty one for index -1; None in a cache without text."""
        if not self.index["texts"]:
            return None
        names = tuple(TEXT)[: 2 if self.index.get(ADDED) else 1]
        row = self._rows["" if index == -1 else self.captions[index]]
        return dict(zip(names, self._rows_of("texts", [TEXT[name] for name in names], row), strict=True))

    def check(self, pipe: StableDiffusionPipeline) -> None:
        """InputError unless the cache was made by this pipeline's VAE encoder, text encoders and tokenizers' length,
        and for a UNet that is told as much.
        """
        made = self._made_with(pipe.vae) | {ADDED: takes_sizes(pipe.unet.config) or None}
        if self.index["texts"]:
            parts = TextParts.of(pipe)
            made |= {**text_digests(parts, self.precision), "tokens": parts.limit}
        self._check_made_by(made)

    def check_vae(self, vae: Any) -> None:
        """InputError unless the cache was made by this VAE's encoder."""
        self._check_made_by(self._made_with(vae))

    def check_resolution(self, resolution: int | None) -> None:
        """InputError when another size than the cache's is asked for; None asks for none."""
        if resolution not in (None, self.size):
            raise InputError(
                f"resolution {resolution} is not the cache's {self.size}: leave it out, or make another cache"
            )

    def _made_with(self, vae: Any) -> dict[str, Any]:
        return {"vae": vae_digest(vae, self.precision), "scaling_factor": float(vae.config.scaling_factor)}

    def _check_made_by(self, matters: Mapping[str, Any]) -> None:
        if other := [name for name, value in matters.items() if self.index.get(name) != value]:
            raise InputError(
                f"cache {str(self.path)!r} was made by another model (differs: {', '.join(other)}): make it again with "
                "this one, or train the model that it was made for"
            )

    def _captions(self) -> list[str]:
        path = self.path / CAPTIONS
        if not path.is_file() or sha256(path) != self.index["captions"]["sha256"]:
            raise self._damaged(CAPTIONS, "was changed")
        try:
            return [parse_json(line, _Caption)["text"] for line in path.read_bytes().split(b"\n") if line]
        except ValueError as error:
            raise self._damaged(CAPTIONS, str(error)) from None

    def _check_counts(self) -> None:
        """InputError unless there are as many captions and shards as images."""
        size, rows = self.index["shard_images"], {"latents": len(self.captions)}
        if self.index["texts"]:
            rows["texts"] = len(self._rows)
        if not self.captions or len(self.captions) != self.index["images"]:
            raise self._damaged(CAPTIONS, f"holds {len(self.captions)} captions of {self.index['images']} images")
        for name, count in rows.items():
            if (found := len(self.index[name])) != -(-count // size):
                raise self._damaged(INDEX, f"names {found} shards of {name} for {count} rows, {size} in each")

    def _rows_of(self, kind: str, names: Sequence[str], index: int) -> list[torch.Tensor]:
        """A row of some tensors of a kind of shards."""
        from safetensors import SafetensorError

        which, row = divmod(index, int(self.index["shard_images"]))
        shard = self._open(self.index[kind][which])
        try:
            return [shard.get_slice(name)[row] for name in names]
        except (SafetensorError, IndexError) as error:
            raise self._damaged(self.index[kind][which]["file"], f"has no row {row} ({error})") from error

    def _open(self, record: Mapping[str, Any]) -> Any:
        from safetensors import SafetensorError, safe_open

        name = str(record["file"])
        with self._lock:
            if name not in self._shards:
                if name not in self._sound and sha256(self.path / name) != record["sha256"]:
                    raise self._damaged(name, "was changed")
                self._sound.add(name)
                try:
                    self._shards[name] = safe_open(self.path / name, framework="pt")
                except (OSError, SafetensorError) as error:
                    raise self._damaged(name, f"cannot be read ({error})") from error
                if len(self._shards) > _OPEN:
                    self._shards.popitem(last=False)
            self._shards.move_to_end(name)
            return self._shards[name]

    def _damaged(self, name: str, why: str) -> InputError:
        return InputError(
            f"{name} of cache {str(self.path)!r} {why}: make the cache again with --overwrite, or restore the file"
        )
