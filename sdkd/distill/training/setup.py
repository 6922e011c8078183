"""What a run starts from: the process group, the device, the models in their dtypes, the data as samples."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from sdkd.core.conditions import guidance_width, takes_sizes
from sdkd.core.console import Progress, quiet
from sdkd.core.contract import size_multiple, torch_dtype, vae_scale
from sdkd.distill.data.buckets import STEP, View, aspect_buckets, fit, nearest_bucket
from sdkd.distill.data.latents import Latents, encode_images, training_size
from sdkd.distill.data.order import Bucketed, Order, Sharded, mirrored_at, view_generator
from sdkd.distill.data.rows import CaptionedImages
from sdkd.distill.training.batches import ImageSamples, LatentSamples, Place, Samples
from sdkd.distill.training.config import SAME, TrainConfig
from sdkd.distill.training.losses import prediction_type
from sdkd.distill.training.pairs import Pair, feature_pairs, same_pairs
from sdkd.errors import InputError, MissingExtraError, ModelError
from sdkd.students.blocks import full_config, student_config

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

# What all UNets of a run take alike: they see the same latents and captions.
_SHARED = {"in_channels": "latents", "cross_attention_dim": "text embeddings", "addition_embed_type": "conditions"}
_MEMORY_LIMIT = 1 << 31  # bytes of latents that "auto" encodes before training


def pick_device(name: str, precision: str, rank: int = 0) -> torch.device:
    """The device of a process by its option; InputError when it is not there or cannot do the precision."""
    gpus = torch.cuda.device_count()
    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"device {name!r} is unknown: give auto, cpu or cuda")
    if name == "cuda" and not gpus:
        raise InputError("device 'cuda' is not on this machine: give --device cpu, or run where torch sees a GPU")
    if name != "cpu" and gpus:
        return torch.device("cuda", rank % gpus)
    if torch_dtype(precision) == torch.float16:
        raise InputError("precision 'fp16' needs a CUDA device: give --precision bf16 or fp32")
    return torch.device("cpu")


def make_accelerator(config: TrainConfig, device: torch.device) -> Accelerator:
    """An Accelerator of the run's precision; one process, or as many as `accelerate launch` started."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedDataParallelKwargs

    # The state is shared by all Accelerators of a Python process; a second run may have another precision or device.
    alone = not PartialState._shared_state or PartialState().num_processes == 1
    AcceleratorState._reset_state(reset_partial_state=alone)
    return Accelerator(
        mixed_precision="no" if config.precision == "fp32" else config.precision,
        cpu=device.type == "cpu",
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )


def make_optimizer(parameters: list[torch.nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW: torch's fused one, or bitsandbytes' with 8-bit states."""
    settings: dict[str, Any] = {"lr": config.learning_rate, "betas": config.betas, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **settings)
    try:
        import bitsandbytes
    except ImportError as error:
        raise MissingExtraError("bitsandbytes", "adam8bit", "optimizer 'adamw8bit'") from error
    found: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(parameters, **settings)
    return found


def lay_out_state(state: Mapping[torch.nn.Parameter, dict[str, Any]]) -> None:
    """Give state tensors of a parameter's shape its strides.

    Fused kernels walk parameter and state side by side in memory: of other strides, the CPU's mixes up elements without
    a word, and CUDA's refuses. Checkpoints hold rows in order, and `channels_last` may change when a run goes on.
    """
    for parameter, values in state.items():
        for name, value in values.items():
            same = isinstance(value, torch.Tensor) and value.shape == parameter.shape
            if same and value.stride() != parameter.stride():
                values[name] = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def training_pairs(config: TrainConfig, teacher_config: Mapping[str, Any]) -> tuple[Pair, ...]:
    """The feature pairs of a run; none where no feature is asked for."""
    if config.objective != "distill" and not config.weights.feature:
        return ()
    return same_pairs(teacher_config) if config.student == SAME else feature_pairs(config.spec, config.pair_preset)


def check_models(
    pipe: StableDiffusionPipeline,
    unet: UNet2DConditionModel,
    config: TrainConfig,
    teacher: UNet2DConditionModel | None = None,
) -> None:
    """ModelError unless UNet, pipeline, teacher and config belong together, and the trainer knows such models."""
    check_configs(config, pipe.unet.config, pipe.vae.config, unet.config, None if teacher is None else teacher.config)
    if config.kind.student and {id(p) for p in unet.parameters()} & {id(p) for p in pipe.unet.parameters()}:
        raise ModelError("student and teacher share weights: build the student with build_student, which copies them")
    prediction_type(pipe.scheduler.config)


def check_configs(
    config: TrainConfig,
    model: Mapping[str, Any],
    vae: Mapping[str, Any],
    unet: Mapping[str, Any] | None = None,
    teacher: Mapping[str, Any] | None = None,
    what: str = "the student's UNet",
) -> None:
    """ModelError unless models of these configs can be trained as asked: the pipeline's UNet and VAE, the UNet that is
    trained (`what` in messages; None: one made of the pipeline's), and the other teacher of a LoRA.
    """
    trained = None if unet is None or config.kind.student else unet  # a student is held against its teacher below
    asked = [full_config(one) for one in (model, trained, teacher) if one is not None]
    if any(guidance_width(one) for one in asked):
        raise ModelError(
            "the UNet takes the guidance scale as an input (time_cond_proj_dim): it was distilled to few steps before, "
            "and only consistency distillation trains such students, from a teacher that does not: give that one"
        )
    channels, own = int(asked[0]["in_channels"]), int(vae.get("latent_channels", 4))
    if channels != own:
        raise ModelError(
            f"the UNet takes {channels} channels, its VAE gives {own}: inpainting and depth models cannot be trained "
            "yet (the student of one can be built: sdkd student)"
        )
    for other, (key, why) in itertools.product(asked[1:], _SHARED.items()):
        if other[key] != asked[0][key]:
            raise ModelError(
                f"two UNets of one run take other {why} ({key} {asked[0][key]} and {other[key]}): give models of one "
                "family, both SD 1.x, both 2.x or both SDXL"
            )
    _check_halves(config.precision, model, vae)
    if config.kind.student:
        _check_student(config, model, unet, what)


def _check_halves(precision: str, unet: Mapping[str, Any], vae: Mapping[str, Any]) -> None:
    """ModelError for a VAE in fp16 that overflows there, as SDXL's own: its pipelines compute it in float32."""
    if precision == "fp16" and takes_sizes(unet) and vae.get("force_upcast", True):
        raise ModelError(
            "SDXL's VAE overflows in fp16 (its config says force_upcast): give --precision bf16, or a model with a VAE "
            "that does not, such as madebyollin/sdxl-vae-fp16-fix"
        )


def _check_student(config: TrainConfig, model: Mapping[str, Any], unet: Mapping[str, Any] | None, what: str) -> None:
    same = config.student == SAME
    expected = full_config(model) if same else student_config(model, config.student)
    if unet is None:
        return
    expected |= {"time_cond_proj_dim": config.guidance_embedding or None}
    found = full_config(unet)
    if wrong := [key for key, value in expected.items() if found[key] != value]:
        key = wrong[0]
        advice = f"make it with sdkd student, in Python build_student(teacher.unet, {config.student!r})"
        if same:
            advice = "give a copy of the teacher, or leave it out"
        if key == "time_cond_proj_dim" and config.kind.consistency:
            advice = f"give --guidance-embedding {found[key] or 0}"
        raise ModelError(
            f"{what} is not {'a copy' if same else f'the {config.student_name}'} of this teacher ({key}: expected "
            f"{expected[key]}, found {found[key]}): {advice}"
        )


def make_samples(
    pipe: StableDiffusionPipeline,
    vae: Any,
    data: CaptionedImages | Latents,
    config: TrainConfig,
    place: Place,
    progress: Progress = quiet,
) -> tuple[Samples, Order]:
    """Samples of the data and their order: latents as they are, few images encoded now, many in each step."""
    if isinstance(data, Latents):
        check_views(data, config)
        mirrored = partial(mirrored_at, config.seed) if config.flip else None
        samples: Samples = LatentSamples(data, vae_scale(pipe.vae.config), config.max_images, mirrored)
        return samples, Order(len(samples), config.seed)
    size = training_size(pipe, config.resolution)
    if _fits_memory(pipe, data, config, size, place):
        made = encode_images(vae, data, size=size, limit=config.max_images, workers=config.workers, progress=progress)
        samples = LatentSamples(made, vae_scale(pipe.vae.config))
        return samples, Order(len(samples), config.seed)
    if config.buckets:
        multiple = size_multiple(pipe.unet.config, pipe.vae.config)
        return _bucketed(data, vae, config, size, multiple, place)
    view = partial(_view, config, size, size)
    samples = ImageSamples(data, vae, view, workers=config.workers, limit=config.max_images)
    blocks = getattr(data, "blocks", None)
    if blocks and config.max_images is None:
        return samples, Sharded(blocks, config.batch_size, place.rank, place.world, config.seed)
    return samples, Order(len(samples), config.seed)


def check_views(data: CaptionedImages | Latents, config: TrainConfig) -> None:
    """InputError for settings that have no effect on latents that were made before, such as a cache's."""
    if not isinstance(data, Latents):
        return
    problems = []
    if config.flip and not getattr(data, "flip", False):
        problems.append(
            "flip needs mirrored images, which it does not hold: make it with sdkd cache --flip, or give --no-flip"
        )
    if config.crop == "random":
        problems.append("crop 'random' needs the images: give --crop center")
    if config.buckets:
        problems.append("buckets need the images: give --no-buckets")
    if config.latents != "auto":
        problems.append(f"latents {config.latents!r} is about images: leave it out")
    if problems:
        raise InputError(f"the cache holds latents of one size: {'; '.join(problems)}")


def _fits_memory(
    pipe: StableDiffusionPipeline, data: CaptionedImages, config: TrainConfig, size: int, place: Place
) -> bool:
    if config.latents != "auto":
        return config.latents == "memory"
    if config.flip or config.buckets or config.crop == "random":
        return False
    count = min(len(data), config.max_images or len(data))
    side = size // vae_scale(pipe.vae.config)
    bytes_needed = count * 2 * int(pipe.vae.config.latent_channels) * side * side * 4
    drawn = config.steps * config.accumulation * config.batch_size * place.world
    return bytes_needed <= _MEMORY_LIMIT and count <= drawn


def _view(config: TrainConfig, height: int, width: int, position: int, index: int, image: Any) -> View:
    crop: Any = config.crop
    generator = view_generator(config.seed, position)
    return fit(image, height, width, crop=crop, flip=config.flip, generator=generator)


def _bucketed(
    images: CaptionedImages, vae: Any, config: TrainConfig, size: int, multiple: int, place: Place
) -> tuple[Samples, Order]:
    """Samples whose batches have one shape each, by the aspect ratio of the images."""
    if not hasattr(images, "image_size"):
        raise InputError(f"buckets need the sizes of all images, which {type(images).__name__} does not tell")
    sizes = aspect_buckets(size, max(STEP, multiple))
    count = min(len(images), config.max_images or len(images))
    which = [_bucket_of(images, index, sizes) for index in range(count)]
    members = [[index for index in range(count) if which[index] == bucket] for bucket in range(len(sizes))]
    order = Bucketed(members, config.batch_size * place.world, config.seed)

    def view(position: int, index: int, image: Any) -> View:
        # The shape of the image that was asked for: what replaces an unreadable one may be of another bucket.
        return _view(config, *sizes[which[order.index(position)]], position, index, image)

    samples: Samples = ImageSamples(images, vae, view, workers=config.workers, limit=config.max_images)
    return samples, order


def _bucket_of(images: Any, index: int, sizes: list[tuple[int, int]]) -> int:
    try:
        width, height = images.image_size(index)
    except InputError:  # the reader will count it when it is to be read
        width = height = 1
    return nearest_bucket(width, height, sizes)
