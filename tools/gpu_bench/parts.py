"""Text encoder and VAE decoder: decoding timed at every size, and how far their engines are from eager float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from gpu_bench.bundles import build_facts, built, check_place, exported, rest_profile, runnable
from gpu_bench.device import Device, sampled
from gpu_bench.record import Record
from gpu_bench.settings import Settings
from gpu_bench.unets import TOKENS, answer, distances, exact_float32

if TYPE_CHECKING:
    import torch

    from sdkd.bundle.manifest import Bundle

PARTS = ("text_encoder", "vae_decoder")
EAGER = "eager, channels_last"
Truths = Mapping[str, "torch.Tensor"]
"""Eager float32's answers at the first size, by component."""


def vae(settings: Settings, device: Device, record: Record, model: str) -> None:
    """Decoding one image at every size, and the distance of text encoder and VAE to float32: eagerly, on engines."""
    truths: dict[str, torch.Tensor] = {}
    work: dict[int, dict[str, int]] = {}
    with record.part("eager"):
        eagerly(settings, device, record, model, truths, work)
    device.begin()  # the eager modules are gone
    targets = runnable(settings)
    with record.part("export"):
        bundle = exported(settings, model, record) if targets else None
    for target in targets if bundle else ():
        with record.part(target):
            bundle = built(settings, bundle, target, PARTS, rest_profile(settings))
            build_facts(record, bundle, target, PARTS)
            on_engines(settings, device, record, bundle, target, truths, work)


def eagerly(
    settings: Settings, device: Device, record: Record, model: str, truths: dict[str, torch.Tensor],
    work: dict[int, dict[str, int]],
) -> None:  # fmt: skip
    """PyTorch's own rows; fills in float32's answers, and the work of decoding by size."""
    import torch

    from sdkd.models.resolve import load_component

    name = settings.models[model]
    with record.part("eager text encoder"):
        text = load_component(name, "text_encoder").to(device.name)
        with exact_float32():
            truths["text_encoder"] = answer(encoding(text, device))
        text = torch.nn.Module.to(text, dtype=device.dtype)
        parity(settings, record, "text_encoder", "eager", encoding(text, device), truths)
        del text
    decoder = load_component(name, "vae").to(device.name)
    for size in settings.sizes:
        work[size] = decoding_work(settings, decoder, size)
    with exact_float32():
        truths["vae_decoder"] = answer(decoding(decoder, settings.sizes[0], device, torch.float32))
    decoder = torch.nn.Module.to(decoder, dtype=device.dtype).to(memory_format=torch.channels_last)
    decode_rows(settings, device, record, decoder, EAGER, work)
    call = decoding(decoder, settings.sizes[0], device, device.dtype)
    parity(settings, record, "vae_decoder", EAGER, call, truths)


def on_engines(
    settings: Settings, device: Device, record: Record, bundle: Bundle, target: str, truths: Truths,
    work: Mapping[int, dict[str, int]],
) -> None:  # fmt: skip
    """The same on a target's engines."""
    import torch

    from engines.pipelines.pipeline import build_module

    place = torch.device(device.name)
    device.begin()
    for component, part in zip(PARTS, ("text_encoder", "vae"), strict=True):
        module: Any = build_module(bundle, target, part, device.dtype, place)
        try:
            check_place(module.sessions(), device)
            if part == "vae":
                decode_rows(settings, device, record, module, target, work)
                call = decoding(module, settings.sizes[0], device, device.dtype)
            else:
                call = encoding(module, device)
            parity(settings, record, component, target, call, truths)
        finally:
            module.close()
            del module
            device.begin()


def encoding(module: Any, device: Device) -> Callable[[], torch.Tensor]:
    """A call of a text encoder on the same token ids for every way: its last hidden state."""
    import torch

    ids = torch.randint(module.config.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    placed = ids.to(device.name)
    return lambda: module(placed, return_dict=False)[0]


def decoding(decoder: Any, size: int, device: Device, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    """A call of a VAE's decoder on the same latents for every way, one image."""
    import torch

    shape = latent_shape(decoder.config, size)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(size)).to(device.name, dtype)
    return lambda: decoder.decode(latents, return_dict=False)[0]


def latent_shape(config: Any, size: int) -> tuple[int, int, int, int]:
    """Of one image of that many pixels."""
    from sdkd.core.contract import vae_scale

    side = size // vae_scale(config)
    return 1, config["latent_channels"], side, side


def parity(
    settings: Settings, record: Record, component: str, way: str, call: Callable[[], torch.Tensor], truths: Truths
) -> None:
    """A row of three calls' relative distance to float32; none where that is not there."""
    if component in truths:
        errors = distances(call, truths[component])
        record.row(what="parity", way=way, component=component, errors=errors, precision=settings.precision)


def decode_rows(
    settings: Settings, device: Device, record: Record, decoder: Any, way: str, work: Mapping[int, dict[str, int]]
) -> None:
    """One row per size, in images of a batch of one."""
    for size in settings.sizes:
        with record.part(f"{way}, {size} px"):
            call = decoding(decoder, size, device, device.dtype)
            device.wait()
            device.reset_peak()
            facts = {"what": "VAE decode", "way": way, "batch": 1, "size": size, "precision": settings.precision}
            row = sampled(device.samples(partial(call)), **facts)
            record.row(**row, **({"work": work[size]} if size in work else {}), **device.memory())


def decoding_work(settings: Settings, decoder: Any, size: int) -> dict[str, int]:
    """FLOPs of decoding one image (a multiply-add is 2), and its least bytes: weights, latents, pixels once."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from sdkd.compare.measure.limits import element_bytes

    with torch.device("meta"):
        twin = type(decoder).from_config(decoder.config)
        latents = torch.empty(latent_shape(decoder.config, size))
    # Attention as plain products: the counter does not know the fused kernels of every device.
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        pixels = twin.decode(latents, return_dict=False)[0]
    used = [one for name, one in twin.named_parameters() if name.startswith(("decoder.", "post_quant_conv."))]
    numbers = sum(one.numel() for one in (*used, latents, pixels))
    return {"flops": counter.get_total_flops(), "bytes": numbers * element_bytes(settings.precision)}
