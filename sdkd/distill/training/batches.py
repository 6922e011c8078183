"""The batches of one process: samples in the order of the run, each with what is random about it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from sdkd.core.conditions import TIME_IDS
from sdkd.distill.data.buckets import Sizes, View
from sdkd.distill.data.encode import Given, encode_image, together
from sdkd.distill.data.latents import Latents, TextEmbeddings, sizes_of
from sdkd.distill.data.order import Draw, Order, draw_at, draw_latents, draw_noise, guidance_at
from sdkd.distill.data.reader import Reader
from sdkd.distill.data.rows import CaptionedImages, caption_at, row_caption
from sdkd.distill.training.config import TrainConfig

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


@dataclass(frozen=True)
class Sample:
    """One image: its posterior's mean and standard deviation [c, h, w], the index that its caption is at, and what SDXL
    is told of it.
    """

    position: int
    index: int
    mean: torch.Tensor
    std: torch.Tensor
    caption: str
    sizes: Sizes


class LatentSamples:
    """Samples from latents that were made before; `mirrored` says at which positions the mirrored image is due.

    `scale`: pixels per latent. `waited` are the seconds spent waiting for data, `unreadable` names what could not be
    read, by index.
    """

    def __init__(
        self, latents: Latents, scale: int, limit: int | None = None, mirrored: Callable[[int], bool] | None = None
    ) -> None:
        self.latents: Any = latents
        self.scale = scale
        self.mirrored = mirrored
        self.waited = 0.0
        self.unreadable: Mapping[int, str] = getattr(latents, "unreadable", {})
        self._count = min(len(latents), limit or len(latents))

    def __len__(self) -> int:
        return self._count

    def stream(self, pairs: Iterable[tuple[int, int]]) -> Iterator[Sample]:
        """The samples of (position, index) pairs, in order."""
        for position, index in pairs:
            start = time.perf_counter()
            view = (True,) if self.mirrored and self.mirrored(position) else ()
            mean, std = self.latents.posterior(index, *view)
            self.waited += time.perf_counter() - start
            sizes = sizes_of(self.latents, index, self.scale, *view)
            yield Sample(position, index, mean, std, self.latents.captions[index], sizes)

    def caption(self, index: int) -> str:
        """The caption at an index."""
        return self.latents.captions[index]

    def text(self, index: int) -> Given | None:
        """Stored text embeddings of an index (-1: of the empty caption), or None."""
        found: Given | None = self.latents.text(index)
        return found


Seen = tuple[int, View, str]  # index that was read, what is seen of its image, caption
See = Callable[[int, int, Any], View]  # (position, index, PIL image) -> what is seen


class ImageSamples:
    """The same from images that are read ahead by threads and encoded when they are needed."""

    def __init__(
        self, images: CaptionedImages, vae: AutoencoderKL, view: See, *, workers: int, limit: int | None = None
    ) -> None:
        self.images, self.vae, self.view = images, vae, view
        self._count = min(len(images), limit or len(images))
        self._reader: Reader[Seen] = Reader(self._load, self._count, workers=workers)
        self.unreadable = self._reader.unreadable

    def __len__(self) -> int:
        return self._count

    @property
    def waited(self) -> float:
        """Seconds spent waiting for images."""
        return self._reader.waited

    def stream(self, pairs: Iterable[tuple[int, int]]) -> Iterator[Sample]:
        """The samples of (position, index) pairs, in order."""
        for position, (index, view, caption) in self._reader.rows(pairs):
            mean, std = encode_image(self.vae, view.pixels)
            yield Sample(position, index, mean, std, caption, view.sizes)

    def caption(self, index: int) -> str:
        """The caption at an index, without its image where that is possible; of the next one that has one."""
        return self._reader.one(index, lambda place: caption_at(self.images, place))

    def text(self, index: int) -> None:
        """None: captions are encoded in each step."""

    def _load(self, position: int, index: int) -> Seen:
        row = self.images[index]
        return index, self.view(position, index, row["image"]), row_caption(row, index)


Samples = LatentSamples | ImageSamples


@dataclass(frozen=True)
class Batch:
    """What both UNets see: float32 latents and noise [b, c, h, w], timesteps [b] int64, and what they are `given` with
    them.

    `matching` [b] bool: the caption is the image's own or empty (False under random conditioning). `named` says of each
    sample its index, timestep and caption, for messages. For consistency distillation: `guidance` [b] float32, the
    teacher's w, and `empty`, what is given instead where guidance leads away from.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    given: Given
    matching: torch.Tensor
    named: tuple[tuple[int, int, str], ...] = ()
    guidance: torch.Tensor | None = None
    empty: Given | None = None


@dataclass(frozen=True)
class Place:
    """Which process this is, and where its tensors go."""

    rank: int
    world: int
    device: torch.device


class Batches:
    """The batches of one process, from optimizer step `start` on; `next` gives that of the next forward pass."""

    def __init__(
        self,
        samples: Samples,
        order: Order,
        text: TextEmbeddings,
        config: TrainConfig,
        place: Place,
        timesteps: Sequence[int],
        sized: bool = False,
    ) -> None:
        """`timesteps`: those to draw from, each as often; `sized`: whether the UNets are told the sizes of images."""
        self.samples, self.order, self.encode_text, self.config, self.place = samples, order, text, config, place
        self.timesteps, self.sized = timesteps, sized
        self.images = 0  # seen by this process
        self._stream: Iterator[Sample] = iter(())
        self.start(0)

    @property
    def together(self) -> int:
        """Samples of one forward pass over all processes."""
        return self.config.batch_size * self.place.world

    def start(self, step: int) -> None:
        """Go on with optimizer step `step` (from 0)."""
        self.close()
        pairs = ((position, self.order.index(position)) for position in self._positions(step))
        self._stream = self.samples.stream(pairs)

    def close(self) -> None:
        """Stop reading ahead."""
        if close := getattr(self._stream, "close", None):
            close()

    def _positions(self, step: int) -> Iterator[int]:
        own = self.place.rank * self.config.batch_size
        for batch in itertools.count(step * self.config.accumulation):
            yield from range(batch * self.together + own, batch * self.together + own + self.config.batch_size)

    def next(self) -> Batch:
        """The next batch; float32 and int64 tensors on the device."""
        chosen = [(sample, self._draw(sample)) for sample in itertools.islice(self._stream, self.config.batch_size)]
        self.images += len(chosen)
        device = self.place.device
        latents = torch.stack([draw_latents(draw, sample.mean.cpu(), sample.std.cpu()) for sample, draw in chosen])
        noise = torch.stack([draw_noise(draw, latents.shape[1:], self.config.noise_offset) for _, draw in chosen])
        timesteps = torch.tensor([draw.timestep for _, draw in chosen])
        matching = torch.tensor([draw.other is None or draw.empty for _, draw in chosen])
        given = self._text(chosen)
        if self.sized:
            given |= {
                TIME_IDS: torch.tensor([sample.sizes for sample, _ in chosen], dtype=torch.float32, device=device)
            }
        named = tuple((sample.index, draw.timestep, self._shown(sample, draw)) for sample, draw in chosen)
        made = Batch(latents.to(device), noise.to(device), timesteps.to(device), given, matching.to(device), named)
        return self._with_guidance(made, chosen) if self.config.kind.consistency else made

    def _with_guidance(self, batch: Batch, chosen: Sequence[tuple[Sample, Draw]]) -> Batch:
        """With what the teacher's guided prediction needs: w of each sample, and the empty caption.

        That is zeros where the pipeline draws with such, as in diffusers' train_lcm_distill_lora_sdxl.py.
        """
        drawn = [guidance_at(self.config.seed, sample.position, *self.config.guidance) for sample, _ in chosen]
        stored = self.samples.text(-1)
        one = {name: value[0] for name, value in self.encode_text([""]).items()} if stored is None else stored
        of = torch.zeros_like if self.encode_text.parts.zeros else torch.clone
        empty = {name: of(value.to(batch.given[name])).expand_as(batch.given[name]) for name, value in one.items()}
        return replace(batch, guidance=torch.tensor(drawn, device=self.place.device), empty=batch.given | empty)

    def _draw(self, sample: Sample) -> Draw:
        config = self.config
        draw = draw_at(
            config.seed,
            sample.position,
            together=self.together,
            timesteps=len(self.timesteps),
            caption_dropout=config.caption_dropout,
            random_conditioning=config.random_conditioning,
        )
        return replace(draw, timestep=self.timesteps[draw.timestep])

    def _text(self, chosen: Sequence[tuple[Sample, Draw]]) -> Given:
        stored = [self.samples.text(self._caption_index(sample, draw)) for sample, draw in chosen]
        known = [value for value in stored if value is not None]
        whole = len(known) == len(chosen)
        found = (
            together(torch.stack, known)
            if whole
            else self.encode_text([self._caption(sample, draw) for sample, draw in chosen])
        )
        # a cache has its own precision
        return {name: value.to(self.place.device, self.encode_text.dtype) for name, value in found.items()}

    def _caption_index(self, sample: Sample, draw: Draw) -> int:
        if draw.empty:
            return -1
        return sample.index if draw.other is None else int(draw.other * len(self.samples))

    def _caption(self, sample: Sample, draw: Draw) -> str:
        if draw.empty or draw.other is None:
            return "" if draw.empty else sample.caption
        return self.samples.caption(self._caption_index(sample, draw))

    def _shown(self, sample: Sample, draw: Draw) -> str:
        own = draw.empty or draw.other is None  # another's may have to be read first
        return self._caption(sample, draw) if own else f"image {self._caption_index(sample, draw)}'s caption"
