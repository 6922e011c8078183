"""CLIP score, FID and LPIPS by torchmetrics, on weights that are on this disk: nothing is ever downloaded.

What a score needs and does not find is said as `NotMeasuredError`: what it is, and how to get it.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from sdkd.errors import InputError, SdkdError

if TYPE_CHECKING:
    from PIL.Image import Image

CLIP_SCORE_MODEL = "openai/clip-vit-large-patch14"
CMMD_MODEL = "openai/clip-vit-large-patch14-336"
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION}"
ALEXNET = "alexnet-owt-7be5be79.pth"  # under LPIPS, as its authors evaluate it; torchmetrics holds the rest
LPIPS_LEAST_PX = 32  # smaller images vanish in AlexNet's poolings
FEATURES = 2048  # of the Inception network; fewer images than this leave its covariance without full rank


class NotMeasuredError(SdkdError, LookupError):
    """A metric cannot be measured here: what it lacks and how to get it."""


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


class _Tensors(torch.nn.Module):
    """A CLIPModel whose features are bare tensors, as torchmetrics wants them; transformers 5 wraps them."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Projected image embeddings [n, d]."""
        return _pooled(self.model.get_image_features(pixel_values))

    def get_text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Projected text embeddings [n, d]."""
        return _pooled(self.model.get_text_features(input_ids, attention_mask))


class _Cut:
    """A CLIPProcessor that cuts long prompts before their end token; torchmetrics would cut that off, too."""

    def __init__(self, processor: Any, length: int) -> None:
        self.processor, self.length = processor, length

    def __call__(self, text: Any = None, images: Any = None, **options: Any) -> Any:
        if text is not None:
            options |= {"truncation": True, "max_length": self.length}
        return self.processor(text=text, images=images, **options)


def _pooled(found: Any) -> torch.Tensor:
    pooled: torch.Tensor = found if isinstance(found, torch.Tensor) else found.pooler_output
    return pooled


@torch.no_grad()
def clip_scores(model: Any, processor: Any, images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
    """CLIP score of every image with its prompt: 100 times the cosine, not below 0 (as torchmetrics has it).

    Raises NotMeasuredError when torchmetrics is not installed.
    """
    _need("torchmetrics", "CLIP score")
    from torchmetrics.multimodal.clip_score import CLIPScore

    wrapped, cut = _Tensors(model), _Cut(processor, int(model.config.text_config.max_position_embeddings))
    metric = CLIPScore(model_name_or_path=lambda: (wrapped, cut))
    device = next(model.parameters()).device
    found = []
    for image, prompt in zip(images, prompts, strict=True):
        metric.reset()
        metric.update(_bytes(image).to(device), prompt)
        found.append(float(metric.compute()))
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
    _need("torchmetrics", "FID")
    _need("torch_fidelity", "FID", "pip install torch-fidelity")
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
    """FID of two sets of images by a torchmetrics FrechetInceptionDistance."""
    for images, is_real in ((real, True), (generated, False)):
        for batch in _batches(images, batch_size):
            metric.update(batch.to(device), real=is_real)
    return float(metric.compute())


def lpips_distance() -> Callable[[Image, Image], float | None]:
    """LPIPS of two images of equal size on AlexNet (Zhang et al. 2018): 0 for equal images, larger is further.

    None for images below LPIPS_LEAST_PX. NotMeasuredError without torchmetrics, torchvision, or AlexNet's weights in
    torch's cache; InputError when those are damaged.
    """
    _need("torchmetrics", "LPIPS")
    _need("torchvision", "LPIPS", "pip install torchvision")
    weights = Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET
    if not weights.is_file():
        raise NotMeasuredError(
            "the weights of AlexNet are not on this disk; get them with "
            "`python -c \"import torchvision; torchvision.models.alexnet(weights='DEFAULT')\"`"
        )
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    try:
        metric = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)
    except Exception as error:  # whatever reading a foreign file raises
        raise InputError(
            f"AlexNet's weights cannot be loaded ({error}): delete {weights} and get them again"
        ) from error

    @torch.no_grad()
    def distance(image: Image, reference: Image) -> float | None:
        if min(image.size) < LPIPS_LEAST_PX:
            return None
        metric.reset()
        return float(metric(*(_bytes(one)[None] / 255 for one in (image, reference))))

    return distance


def _need(package: str, metric: str, command: str = "pip install 'sdkd[train]'") -> None:
    if importlib.util.find_spec(package) is None:
        raise NotMeasuredError(f"{metric} needs the package {package.replace('_', '-')}; get it with: {command}")


def _bytes(image: Image) -> torch.Tensor:
    """uint8 [3, height, width]."""
    import numpy as np

    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _batches(images: Images, size: int) -> Iterator[torch.Tensor]:
    """uint8 [n, 3, side, side] of Inception's 299 pixels: images of any size, cut square about their middle."""
    from PIL.Image import Resampling
    from PIL.ImageOps import fit

    stream = iter(images)
    while part := list(itertools.islice(stream, size)):
        square = [fit(image.convert("RGB"), (299, 299), Resampling.BICUBIC) for image in part]
        yield torch.stack([_bytes(image) for image in square])
