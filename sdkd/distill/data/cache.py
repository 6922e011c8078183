"""Latents on disk: posteriors and text embeddings made once, for many runs.

A cache is a folder of safetensors shards, `latents-00000.safetensors` (mean, std [n, c, h, w]; with `flip` also of
the mirrored images, mirrored_mean and mirrored_std) and `text-00000.safetensors` (text [m, s, d], a row per unique
caption, the empty one first), `captions.jsonl`, and `index.json`, which is written last. Of SDXL, whose UNets are told
more, shards also hold sizes [n, 6] and pooled [m, p], and the index says "added". While it is made, `settings.json`
says for what, and a .json beside each complete shard what is in it: the same command goes on from there.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sdkd.core.conditions import takes_sizes
from sdkd.core.console import Progress, quiet
from sdkd.core.contract import Precision, torch_dtype
from sdkd.core.files import check_free, read_json, sha256, write_bytes, write_json
from sdkd.core.interrupts import between_steps
from sdkd.core.marks import CACHE, proves
from sdkd.distill.data.buckets import View, fit, mirrored
from sdkd.distill.data.digests import fingerprint
from sdkd.distill.data.disk_cache import (
    ADDED,
    CAPTIONS,
    INDEX,
    MIRRORED,
    PLAIN,
    SCHEMA,
    SETTINGS,
    SIZES,
    TEXT,
    DiskCache,
    Shard,
)
from sdkd.distill.data.encode import TextParts, encode_captions, encode_image, model_digests, placed
from sdkd.distill.data.reader import Reader, check_unreadable
from sdkd.distill.data.rows import CaptionedImages, row_caption
from sdkd.errors import InputError, ModelError, OutputExistsError

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


def write_cache(
    pipe: StableDiffusionPipeline,
    images: CaptionedImages,
    out: Path,
    *,
    size: int,
    precision: Precision = "bf16",
    shard_images: int = 1024,
    rank: int = 0,
    world: int = 1,
    workers: int = 4,
    device: torch.device | str = "cpu",
    text: bool = True,
    flip: bool = False,
    progress: Progress = quiet,
) -> dict[str, Any] | None:
    """Encode all images (`size` pixels square, middle cut out) and captions in `precision`; returns the index.

    With `flip` each image is encoded mirrored as well, for runs that mirror every other image. Complete shards of the
    same settings are kept. With `world` > 1 only every `world`-th shard is written, from `rank` on, and None returned:
    a last call with world 1 keeps them all and adds the text and the index. On a CPU the bits depend on torch's number
    of threads. Raises InputError, OutputExistsError when the folder holds something else, ModelError when a result is
    not finite, TrainingError when more than 1 % of the images cannot be read, and KeyboardInterrupt between two images.
    """
    if shard_images < 1 or not 0 <= rank < world:
        raise InputError(f"shard_images {shard_images}, rank {rank} of {world}: give 1 or more, and 0 <= rank < world")
    settings = cache_settings(
        pipe, images, size=size, precision=precision, shard_images=shard_images, text=text, flip=flip
    )
    if done := prepare(out, settings):
        progress(f"{out} is complete already: kept", 1.0)
        return done
    with between_steps() as check:
        writer = _Writer(pipe, images, out, settings, device, progress, check)
        writer.latents(rank, world, workers)
        return writer.finish() if world == 1 else None


def cache_settings(
    pipe: StableDiffusionPipeline,
    images: CaptionedImages,
    *,
    size: int,
    precision: Precision,
    shard_images: int,
    text: bool,
    flip: bool = False,
) -> dict[str, Any]:
    """What a cache's content depends on; caches with other settings are never mixed."""
    if len(images) == 0:
        raise InputError("the data holds no images: give at least one")
    return {
        "schema": SCHEMA,
        "images": len(images),
        "data": fingerprint(images),
        "resolution": size,
        "precision": precision,
        "shard_images": shard_images,
        "scaling_factor": float(pipe.vae.config.scaling_factor),
        "tokens": TextParts.of(pipe).limit,
        "text": text,
        "flip": flip,
        **model_digests(pipe, precision),
        **({ADDED: True} if takes_sizes(pipe.unet.config) else {}),
    }


def prepare(out: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Make the folder ready; the index when the cache is complete. OutputExistsError when it is of other settings."""
    name = next((name for name in (INDEX, SETTINGS) if (out / name).is_file()), None) if proves(out, CACHE) else None
    if name is None:
        check_free(out, overwrite=False)
        write_json(out / SETTINGS, dict(settings))
        return None
    found = read_json(out / name, dict[str, Any], strict=True)
    differing = [key for key, value in settings.items() if found.get(key) != value]
    if differing:
        shown = "; ".join(f"{key}: there {found.get(key)!r}, asked {settings[key]!r}" for key in differing)
        raise OutputExistsError(
            f"cache {str(out)!r} was made with other settings ({shown}): choose another folder or pass --overwrite"
        )
    return DiskCache(out).index if name == INDEX else None


class _Latents(Shard):
    """What is read of the record beside a complete shard of latents."""

    shapes: dict[str, list[int]]
    captions: list[str]
    sources: list[int]
    unreadable: dict[str, str]


class _Text(Shard):
    shapes: dict[str, list[int]]
    captions: str


@dataclass
class _Writer:
    """One run of `write_cache`; `check` sees to signals, between two images."""

    pipe: StableDiffusionPipeline
    images: CaptionedImages
    out: Path
    settings: Mapping[str, Any]
    device: torch.device | str
    progress: Progress
    check: Callable[[], None]

    def latents(self, rank: int, world: int, workers: int) -> None:
        """Write this rank's missing shards of latents."""
        shards = self._ranges(len(self.images))
        own = [(f"latents-{place:05d}", shards[place]) for place in range(rank, len(shards), world)]
        kept = {name: record for name, rows in own if (record := self._kept(name, len(rows)))}
        if kept:
            self.progress(f"{len(kept)} of {len(own)} shards are there already: kept", len(kept) / len(own))
        missing = [(name, rows) for name, rows in own if name not in kept]
        if not missing:
            return
        reader = Reader(self._load, len(self.images), workers=workers)
        for record in kept.values():
            reader.unreadable.update({int(index): message for index, message in record["unreadable"].items()})
        vae = placed(self.pipe.vae, self.device, torch_dtype(self.settings["precision"]))
        stream = reader.rows((index, index) for _, rows in missing for index in rows)
        try:
            for number, (name, rows) in enumerate(missing, len(kept)):
                self._write_latents(vae, name, rows, reader, stream, (number, len(own)))
        finally:
            stream.close()

    def _load(self, position: int, index: int) -> tuple[int, View, str]:
        row, size = self.images[index], self.settings["resolution"]
        return index, fit(row["image"], size, size), row_caption(row, index)

    def _write_latents(
        self, vae: Any, name: str, rows: range, reader: Reader[Any], stream: Iterator[Any], at: tuple[int, int]
    ) -> None:
        known = set(reader.unreadable)
        names = PLAIN + (MIRRORED if self.settings["flip"] else ())
        made: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        sources, captions, sizes = [], [], []
        for place, (_, (source, view, caption)) in enumerate(itertools.islice(stream, len(rows))):
            self.check()
            if place % 16 == 0:
                fraction = (at[0] + place / len(rows)) / at[1]
                self.progress(f"encoding image {rows.start + place + 1} of {len(self.images)}", fraction)
            views = (view, mirrored(view)) if self.settings["flip"] else (view,)
            found = [value for one in views for value in encode_image(vae, one.pixels)]
            for key, value in zip(names, found, strict=True):
                made[key].append(value.cpu())
            sources.append(source)
            captions.append(caption)
            sizes.append(view.sizes)
        tensors = {key: torch.stack(values) for key, values in made.items()}
        if self.settings.get(ADDED):
            tensors[SIZES] = torch.tensor(sizes, dtype=torch.int32)
        bad = {str(index): message for index, message in reader.unreadable.items() if index not in known}
        self._write(name, tensors, {"captions": captions, "sources": sources, "unreadable": bad})

    def _write(self, name: str, tensors: dict[str, torch.Tensor], about: Mapping[str, Any]) -> dict[str, Any]:
        """A shard, then the record that says it is complete."""
        from safetensors.torch import save

        for key, value in tensors.items():
            if not value.isfinite().all():
                raise ModelError(f"{key} of {name} is not finite in {self.settings['precision']}: give bf16 or fp32")
        data = save({key: value.contiguous() for key, value in tensors.items()})
        write_bytes(self.out / f"{name}.safetensors", data)
        shapes = {key: list(value.shape) for key, value in tensors.items()}
        record = {"file": f"{name}.safetensors", "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        record |= {"shapes": shapes, **about}
        write_json(self.out / f"{name}.json", record)
        return record

    def _kept(self, name: str, rows: int) -> dict[str, Any] | None:
        """The record of a complete shard; None when it is not there, or damaged and thus made again."""
        path = self.out / f"{name}.safetensors"
        if not path.is_file():
            return None
        try:
            record = self._record(name)
        except InputError:
            return None
        whole = record["file"] == path.name and all(shape[:1] == [rows] for shape in record["shapes"].values())
        return record if whole and sha256(path) == record["sha256"] else None

    def _record(self, name: str) -> dict[str, Any]:
        shape = _Latents if name.startswith("latents") else _Text
        return dict(read_json(self.out / f"{name}.json", shape, strict=True))

    def finish(self) -> dict[str, Any]:
        """Text shards, captions and the index, once all shards of latents are there."""
        records = [self._record(f"latents-{place:05d}") for place in range(len(self._ranges(len(self.images))))]
        unreadable = {int(at): message for record in records for at, message in record.pop("unreadable").items()}
        check_unreadable(unreadable, len(self.images))
        captions = [caption for record in records for caption in record.pop("captions")]
        sources = [source for record in records for source in record.pop("sources")]
        unique = list(dict.fromkeys(["", *captions]))
        texts = self._texts(unique) if self.settings["text"] else []
        lines = [{"index": at, "image": sources[at], "text": text} for at, text in enumerate(captions)]
        write_bytes(self.out / CAPTIONS, "".join(f"{json.dumps(line)}\n" for line in lines).encode())
        index = {
            **self.settings,
            "latents": records,
            "texts": texts,
            "captions": {"file": CAPTIONS, "sha256": sha256(self.out / CAPTIONS), "unique": len(unique)},
            "unreadable": {str(place): unreadable[place] for place in sorted(unreadable)},
        }
        write_json(self.out / INDEX, index)
        for path in (self.out / SETTINGS, *self.out.glob("latents-*.json"), *self.out.glob("text-*.json")):
            path.unlink()
        return index

    def _texts(self, unique: list[str]) -> list[dict[str, Any]]:
        parts = TextParts.of(self.pipe).placed(self.device, torch_dtype(self.settings["precision"]))
        records = []
        for place, rows in enumerate(self._ranges(len(unique))):
            self.progress(f"encoding caption {rows.start + 1} of {len(unique)}", None)
            name, part = f"text-{place:05d}", unique[rows.start : rows.stop]
            record = self._kept(name, len(part))
            wanted = hashlib.sha256(json.dumps(part).encode()).hexdigest()
            if record is None or record["captions"] != wanted:
                tables = encode_captions(parts, part, "cpu", self.check)
                stored = {TEXT[key]: value for key, value in tables.items()}
                record = self._write(name, stored, {"captions": wanted, "cut": len(parts.too_long(part))})
            records.append({key: value for key, value in record.items() if key != "captions"})
        return records

    def _ranges(self, count: int) -> list[range]:
        size = self.settings["shard_images"]
        return [range(start, min(start + size, count)) for start in range(0, count, size)]
