"""CLIP score, FID, CMMD and LPIPS on weights that are on this disk: nothing is ever downloaded.

What a score needs and does not find is said as `NotMeasuredError`: what it is, and how to get it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.nn import functional as F

from sdkd.compare.measure.quality import Perceptual
from sdkd.core.perceptual import LPIPS_LEAST_PX, NotMeasuredError, load_lpips, need
from sdkd.errors import InputError, SdkdError

if TYPE_CHECKING:
    from PIL.Image import Image

CLIP_SCORE_MODEL = "openai/clip-vit-large-patch14"
CMMD_MODEL = "openai/clip-vit-large-patch14-336"
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION}"
FEATURES = 2048  # of the Inception network; fewer images than this leave its covariance without full rank
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
CMMD_BLOCK = 1024  # rows of a kernel matrix that are in memory at once
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def find_clip(folder: Path | None, model: str) -> Path:
    """The folder of a CLIP model: as given, or of `model` in the hub's cache; NotMeasuredError without."""
    if folder is not None:
        if not (folder / "config.json").is_file():
            raise InputError(
                f"CLIP folder {str(folder)!r} holds no config.json: give the folder that `hf download` wrote"
            )
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        found = Path(snapshot_download(model, local_files_only=True))
    except LocalEntryNotFoundError:
        found = None
    if found is None or not list(found.glob("*.safetensors")):
        raise NotMeasuredError(
            f"the weights of {model} are not on this disk; get them with `hf download {model}`, "
            "or give a CLIP model's folder with --clip"
        )
    return found


def load_clip(folder: Path, device: str = "cpu") -> tuple[Any, Any]:
    """A float32 CLIPModel, frozen, and its processor, from safetensors; InputError when the folder holds none."""
    from safetensors import SafetensorError
    from transformers import CLIPModel, CLIPProcessor

    try:
        model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=torch.float32)
        processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"CLIP folder {str(folder)!r} cannot be loaded ({reason}): it needs config.json, model.safetensors, "
            "and the tokenizer's and image processor's files"
        ) from error
    return model.eval().requires_grad_(False).to(device), processor


@torch.no_grad()
def clip_scores(model: Any, processor: Any, images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
    """CLIP score of every image with its prompt (Hessel et al. 2021): 100 times the cosine, not below 0.

    Long prompts are cut before their end token.
    """
    cut = {"truncation": True, "max_length": int(model.config.text_config.max_position_embeddings)}
    found = []
    for image, prompt in zip(images, prompts, strict=True):
        inputs = processor(text=[prompt], images=[image.convert("RGB")], return_tensors="pt", padding=True, **cut)
        output = model(**inputs.to(model.device))
        found.append(max(0.0, 100 * float((output.text_embeds * output.image_embeds).sum())))
    return found


def find_inception(file: Path | None) -> Path:
    """The weights of FID's Inception network: as given, or in torch's cache; NotMeasuredError without."""
    if file is not None:
        if not file.is_file():
            raise InputError(f"Inception file {str(file)!r} does not exist: get {INCEPTION_URL}")
        return file
    cached = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION
    if not cached.is_file():
        raise NotMeasuredError(
            f"the weights of Inception are not on this disk; get {INCEPTION_URL} and give it with --inception"
        )
    return cached


class Images(Protocol):
    """Images that are gone through in order, perhaps each read when its turn comes."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Image]: ...


def frechet_distance(real: Images, generated: Images, inception: Path, device: str = "cpu") -> float:
    """FID of two sets of images (Heusel et al. 2017); NotMeasuredError without torchmetrics or torch-fidelity.

    InputError with fewer than 2 images of a kind, or for a damaged weight file.
    """
    need("torchmetrics", "FID")
    need("torch_fidelity", "FID", "pip install torch-fidelity")
    if min(len(real), len(generated)) < 2:
        raise InputError(f"FID of {len(real)} real and {len(generated)} generated images: give at least 2 of each")
    from torchmetrics.image.fid import FrechetInceptionDistance

    try:
        metric = FrechetInceptionDistance(FEATURES, feature_extractor_weights_path=str(inception)).to(device)
    except Exception as error:  # whatever reading a foreign file raises
        raise InputError(
            f"Inception file {str(inception)!r} cannot be loaded ({error}): get {INCEPTION_URL}"
        ) from error
    return accumulate(metric, real, generated, device)


def accumulate(metric: Any, real: Images, generated: Images, device: str = "cpu", batch_size: int = 16) -> float:
    """FID of two sets of images by a torchmetrics FrechetInceptionDistance.

    Images of any size become Inception's 299 pixels, cut square about their middle.
    """
    from PIL.Image import Resampling
    from PIL.ImageOps import fit

    for images, is_real in ((real, True), (generated, False)):
        stream = iter(images)
        while part := list(itertools.islice(stream, batch_size)):
            square = [_bytes(fit(image.convert("RGB"), (299, 299), Resampling.BICUBIC)) for image in part]
            metric.update(torch.stack(square).to(device), real=is_real)
    return float(metric.compute())


def lpips_distance() -> Perceptual:
    """LPIPS of two images of equal size on AlexNet (Zhang et al. 2018): 0 for equal images, larger is further.

    None for images below LPIPS_LEAST_PX. Raises as `load_lpips`.
    """
    metric = load_lpips()

    @torch.no_grad()
    def distance(image: Image, reference: Image) -> float | None:
        if min(image.size) < LPIPS_LEAST_PX:
            return None
        metric.reset()
        return float(metric(*(_bytes(one)[None] / 255 for one in (image, reference))))

    return distance


@functools.cache
def lpips_or_why() -> Perceptual | str:
    """LPIPS, loaded once, or why it cannot be measured here."""
    try:
        return lpips_distance()
    except SdkdError as error:
        return str(error)


def lpips_here() -> Perceptual | None:
    """LPIPS where its weights are on this disk."""
    return None if isinstance(found := lpips_or_why(), str) else found


def _bytes(image: Image) -> torch.Tensor:
    """uint8 [3, height, width]."""
    import numpy as np

    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def cmmd(one: torch.Tensor, other: torch.Tensor, *, unbiased: bool = True) -> float:
    """CMMD of embeddings [n, d] and [m, d] (Jayasumana et al. 2023, arXiv 2401.09603).

        MMD^2 = mean k(x, x') + mean k(y, y') - 2 mean k(x, y),  k(a, b) = exp(-|a - b|^2 / (2 sigma^2)),  times 1000

    on unit-length image embeddings of CLIP ViT-L/14 at 336 pixels, sigma 10; in float64, since three means near 1
    cancel. The paper takes the unbiased estimate (pairs of one image with itself left out), the authors' published code
    (google-research/cmmd) the biased one. The unbiased estimate may be slightly negative for equal distributions.
    InputError with fewer than 2 rows.
    """
    if min(len(one), len(other)) < 2:
        raise InputError(f"CMMD of {len(one)} and {len(other)} images: give at least 2 of each")
    x, y = one.double(), other.double()
    return CMMD_SCALE * (_own(x, unbiased) + _own(y, unbiased) - 2 * _kernel_sum(x, y) / (len(x) * len(y)))


def _own(x: torch.Tensor, unbiased: bool) -> float:
    itself = len(x) if unbiased else 0  # the diagonal: exp(0) each
    return (_kernel_sum(x, x) - itself) / (len(x) ** 2 - itself)


def _kernel_sum(x: torch.Tensor, y: torch.Tensor) -> float:
    total = 0.0
    for rows in x.split(CMMD_BLOCK):
        squared = rows.square().sum(1)[:, None] + y.square().sum(1)[None] - 2 * rows @ y.T
        total += float(torch.exp(-squared.clamp(min=0) / (2 * CMMD_SIGMA**2)).sum())
    return total


@torch.no_grad()
def clip_embeddings(model: Any, images: Iterable[Image], batch_size: int = 16) -> torch.Tensor:
    """Unit-length image embeddings [n, d] float32 of a transformers CLIPModel.

    Images are cut square about their middle and resized with bicubic interpolation, without antialiasing, to the
    model's size, as in the authors' code.
    """
    size = int(model.config.vision_config.image_size)
    found, stream = [], iter(images)
    while part := list(itertools.islice(stream, batch_size)):
        pixels = torch.cat([_clip_pixels(image, size) for image in part])
        states = model.vision_model(pixel_values=pixels.to(model.device, model.dtype)).pooler_output
        found.append(F.normalize(model.visual_projection(states).float(), dim=-1).cpu())
    return torch.cat(found)


def _clip_pixels(image: Image, size: int) -> torch.Tensor:
    """float32 [1, 3, size, size], normalised as CLIP wants it."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    pixels = _bytes(image.crop((left, top, left + side, top + side)))[None].float() / 255
    square = F.interpolate(pixels, size=(size, size), mode="bicubic")
    return (square - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]
