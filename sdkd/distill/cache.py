"""Latents on disk: posteriors and text embeddings made once, for many runs.

A cache is a folder of safetensors shards, `latents-00000.safetensors` (mean, std [n, c, h, w]) and
`text-00000.safetensors` (text [m, s, d], a row per unique caption, the empty one first), `captions.jsonl`, and
`index.json`, which is written last. While it is made, `settings.json` says for what, and a .json beside each complete
shard what is in it: the same command goes on from there.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sdkd.console import Progress, quiet
from sdkd.contract import Precision
from sdkd.distill.data import CaptionedImages, fingerprint, row_caption, to_pixels
from sdkd.distill.encode import dtype_of, encode_captions, encode_image, model_digests, placed
from sdkd.distill.reader import Reader, check_unreadable
from sdkd.errors import InputError, ModelError, OutputExistsError
from sdkd.files import check_free, read_json, sha256, staged_folder, write_bytes, write_json
from sdkd.marks import CACHE, proves

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

INDEX = "index.json"
SETTINGS = "settings.json"
CAPTIONS = "captions.jsonl"
SCHEMA = 1
_SHARD = re.compile(r"(latents|text)-\d{5,}\.safetensors")
_OPEN = 64  # shards that a DiskCache keeps open


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
    overwrite: bool = False,
    progress: Progress = quiet,
) -> dict[str, Any] | None:
    """Encode all images (`size` pixels square, middle cut out) and captions in `precision`; returns the index.

    Complete shards of the same settings are kept. With `world` > 1 only every `world`-th shard is written, from `rank`
    on, and None returned: a last call with world 1 keeps them all and adds the text and the index. On a CPU the bits
    depend on torch's number of threads. Raises InputError, OutputExistsError when the folder holds something else,
    ModelError when a result is not finite, and TrainingError when more than 1 % of the images cannot be read.
    """
    if shard_images < 1 or not 0 <= rank < world:
        raise InputError(f"shard_images {shard_images}, rank {rank} of {world}: give 1 or more, and 0 <= rank < world")
    if overwrite and world > 1:
        raise InputError("overwrite would remove the shards of the other ranks: remove the cache before")
    settings = cache_settings(pipe, images, size=size, precision=precision, shard_images=shard_images, text=text)
    with contextlib.ExitStack() as stack:
        if overwrite:  # what is there stays until the new one is complete
            check_free(out, overwrite)
            out = stack.enter_context(staged_folder(out))
        if done := prepare(out, settings):
            progress(f"{out} is complete already: kept", 1.0)
            return done
        writer = _Writer(pipe, images, out, settings, torch.device(device), progress)
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
        "tokens": int(pipe.tokenizer.model_max_length),
        "text": text,
        **model_digests(pipe, precision),
    }


def open_cache(path: str | Path) -> DiskCache:
    """The latents of a folder that `sdkd cache` wrote; InputError when it is incomplete, damaged or something else."""
    return DiskCache(Path(path))


def prepare(out: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Make the folder ready; the index when the cache is complete. OutputExistsError when it is of other settings."""
    name = next((name for name in (INDEX, SETTINGS) if (out / name).is_file()), None) if proves(out, CACHE) else None
    if name is None:
        check_free(out, overwrite=False)
        write_json(out / SETTINGS, dict(settings))
        return None
    found = read_json(out / name)
    differing = [key for key, value in settings.items() if not isinstance(found, dict) or found.get(key) != value]
    if differing:
        shown = "; ".join(f"{key}: there {found.get(key)!r}, asked {settings[key]!r}" for key in differing)
        raise OutputExistsError(
            f"cache {str(out)!r} was made with other settings ({shown}): choose another folder or pass --overwrite"
        )
    return dict(found) if name == INDEX else None


class _Writer:
    """One run of `write_cache`."""

    def __init__(
        self,
        pipe: StableDiffusionPipeline,
        images: CaptionedImages,
        out: Path,
        settings: Mapping[str, Any],
        device: torch.device,
        progress: Progress,
    ) -> None:
        self.pipe, self.images, self.out, self.settings, self.progress = pipe, images, out, settings, progress
        self.device, self.dtype = device, dtype_of(settings["precision"])
        self.size, self.count = int(settings["resolution"]), int(settings["images"])

    def latents(self, rank: int, world: int, workers: int) -> None:
        """Write this rank's missing shards of latents."""
        shards = _ranges(self.count, self.settings["shard_images"])
        own = [(f"latents-{place:05d}", shards[place]) for place in range(rank, len(shards), world)]
        kept = {name: record for name, rows in own if (record := self._kept(name, len(rows)))}
        if kept:
            self.progress(f"{len(kept)} of {len(own)} shards are there already: kept", len(kept) / len(own))
        missing = [(name, rows) for name, rows in own if name not in kept]
        if not missing:
            return
        reader = Reader(self._load, self.count, workers=workers)
        for record in kept.values():
            reader.unreadable.update({int(index): message for index, message in record["unreadable"].items()})
        vae = placed(self.pipe.vae, self.device, self.dtype)
        stream = reader.rows((index, index) for _, rows in missing for index in rows)
        try:
            for number, (name, rows) in enumerate(missing, len(kept)):
                self._write_latents(vae, name, rows, reader, stream, (number, len(own)))
        finally:
            stream.close()  # type: ignore[attr-defined]

    def _load(self, position: int, index: int) -> tuple[int, torch.Tensor, str]:
        row = self.images[index]
        return index, to_pixels(row["image"], self.size), row_caption(row, index)

    def _write_latents(
        self, vae: Any, name: str, rows: range, reader: Reader[Any], stream: Iterator[Any], at: tuple[int, int]
    ) -> None:
        known = set(reader.unreadable)
        means, stds, sources, captions = [], [], [], []
        for place, (_, (source, pixels, caption)) in enumerate(itertools.islice(stream, len(rows))):
            if place % 16 == 0:
                fraction = (at[0] + place / len(rows)) / at[1]
                self.progress(f"encoding image {rows.start + place + 1} of {self.count}", fraction)
            mean, std = encode_image(vae, pixels)
            means.append(mean.cpu())
            stds.append(std.cpu())
            sources.append(source)
            captions.append(caption)
        tensors = {"mean": torch.stack(means), "std": torch.stack(stds)}
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
        if not (self.out / f"{name}.json").is_file() or not path.is_file():
            return None
        record = dict(read_json(self.out / f"{name}.json"))
        whole = all(shape[0] == rows for shape in record["shapes"].values())
        return record if whole and sha256(path) == record["sha256"] else None

    def finish(self) -> dict[str, Any]:
        """Text shards, captions and the index, once all shards of latents are there."""
        shards = _ranges(self.count, self.settings["shard_images"])
        records = [dict(read_json(self.out / f"latents-{place:05d}.json")) for place in range(len(shards))]
        unreadable = {int(at): message for record in records for at, message in record.pop("unreadable").items()}
        check_unreadable(unreadable, self.count)
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
        encoder = placed(self.pipe.text_encoder, self.device, self.dtype)
        records = []
        for place, rows in enumerate(_ranges(len(unique), self.settings["shard_images"])):
            self.progress(f"encoding caption {rows.start + 1} of {len(unique)}", None)
            name, part = f"text-{place:05d}", unique[rows.start : rows.stop]
            record = self._kept(name, len(part))
            wanted = hashlib.sha256(json.dumps(part).encode()).hexdigest()
            if record is None or record["captions"] != wanted:
                table = encode_captions(self.pipe.tokenizer, encoder, part, "cpu")
                record = self._write(name, {"text": table}, {"captions": wanted})
            records.append({key: value for key, value in record.items() if key != "captions"})
        return records


def _ranges(count: int, size: int) -> list[range]:
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


class DiskCache:
    """Latents of a cache folder, read by row from memory-mapped shards; see the protocol `Latents`.

    A shard's SHA-256 is checked when it is first used. Tensors come in the precision of the cache.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / INDEX).is_file():
            unfinished = (path / SETTINGS).is_file()
            raise InputError(
                f"cache {str(path)!r} is not complete: run the same `sdkd cache` again, it goes on where it ended"
                if unfinished
                else f"folder {str(path)!r} is no cache (no {INDEX}): make one with sdkd cache MODEL {path} NEW_FOLDER"
            )
        self.index: dict[str, Any] = read_json(path / INDEX)
        if not isinstance(self.index, dict) or self.index.get("schema") != SCHEMA or "latents" not in self.index:
            raise InputError(f"{str(path / INDEX)!r} is not of a cache that this version reads: make the cache again")
        self.size, self.precision = int(self.index["resolution"]), str(self.index["precision"])
        for record in (*self.index["latents"], *self.index["texts"]):
            if not _SHARD.fullmatch(str(record["file"])):
                raise self._damaged(INDEX, f"names {record['file']!r}, which is no file of a cache")
            if not (path / record["file"]).is_file() or (path / record["file"]).stat().st_size != record["bytes"]:
                raise self._damaged(record["file"], f"is not there with its {record['bytes']} bytes")
        self.captions = self._captions()
        self._rows = {text: row for row, text in enumerate(dict.fromkeys(["", *self.captions]))}
        self._shards: OrderedDict[str, Any] = OrderedDict()
        self._sound: set[str] = set()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.captions)

    def posterior(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation [c, h, w]; IndexError outside 0..len-1, InputError when the shard is damaged."""
        shard, row = self._place(self.index["latents"], range(len(self))[index])
        return shard.get_slice("mean")[row], shard.get_slice("std")[row]

    def text(self, index: int) -> torch.Tensor | None:
        """Text embeddings [s, d] of an image's caption, of the empty one for index -1; None in a cache without text."""
        if not self.index["texts"]:
            return None
        shard, row = self._place(self.index["texts"], self._rows["" if index == -1 else self.captions[index]])
        found: torch.Tensor = shard.get_slice("text")[row]
        return found

    def check(self, pipe: StableDiffusionPipeline) -> None:
        """InputError unless the cache was made by this pipeline's VAE encoder, text encoder and tokenizer length."""
        own = model_digests(pipe, self.precision) | {
            "scaling_factor": float(pipe.vae.config.scaling_factor),
            "tokens": int(pipe.tokenizer.model_max_length),
        }
        matters = own if self.index["texts"] else {name: own[name] for name in ("vae", "scaling_factor")}
        if other := [name for name, value in matters.items() if self.index.get(name) != value]:
            raise InputError(
                f"cache {str(self.path)!r} was made by another model (differs: {', '.join(other)}): make it again with "
                "this one, or train the model that it was made for"
            )

    def _captions(self) -> list[str]:
        path = self.path / CAPTIONS
        if not path.is_file() or sha256(path) != self.index["captions"]["sha256"]:
            raise self._damaged(CAPTIONS, "was changed")
        return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").split("\n") if line]

    def _place(self, records: Sequence[Mapping[str, Any]], index: int) -> tuple[Any, int]:
        which, row = divmod(index, int(self.index["shard_images"]))
        return self._open(records[which]), row

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
