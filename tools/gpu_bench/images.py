"""What a user waits for: VAE decoding, and whole images from prompt to pixels."""

from __future__ import annotations

from functools import partial
from typing import Any

from gpu_bench.bundles import built, exported, rest_profile, runnable, unet_profiles
from gpu_bench.device import Device, sampled
from gpu_bench.record import Record
from gpu_bench.settings import Settings
from gpu_bench.unets import scale_of, work_of

PROMPT = "a lighthouse in a storm"


def vae(settings: Settings, device: Device, record: Record, model: str) -> None:
    """Decoding one image at every size: eagerly with channels-last, and on each target's engine."""
    import torch

    from engines.session import open_session
    from engines.vae import EngineVAE
    from sdkd.models import load_component

    eager = load_component(settings.models[model], "vae", device.dtype).to(device.name)
    eager = eager.to(memory_format=torch.channels_last)
    with record.part("eager"):
        decode_rows(settings, device, record, eager, "eager, channels_last")
    targets = runnable(settings)
    with record.part("export"):
        bundle = exported(settings, model, record) if targets else None
    for target in targets if bundle else ():
        with record.part(target):
            bundle = built(settings, bundle, target, ("vae_decoder",), rest_profile(settings))
            made = bundle.engine(target, "vae_decoder")
            record.fact(**{f"{target}_builder_s": made.seconds, f"{target}_engine_bytes": made.total_bytes})
            with open_session(bundle, target, "vae_decoder") as session:
                config, place = bundle.config("vae_decoder"), torch.device(device.name)
                decode_rows(settings, device, record, EngineVAE(session, None, config, device.dtype, place), target)


def decode_rows(settings: Settings, device: Device, record: Record, decoder: Any, way: str) -> None:
    """One row per size, in images of a batch of one."""
    import torch

    channels, scale = decoder.config.latent_channels, 2 ** (len(decoder.config.block_out_channels) - 1)
    for size in settings.sizes:
        with record.part(f"{way}, {size} px"):
            generator = torch.Generator().manual_seed(size)
            latents = torch.randn(1, channels, size // scale, size // scale, generator=generator)
            placed = latents.to(device.name, device.dtype)
            device.reset_peak()
            samples = device.samples(partial(decoder.decode, placed, return_dict=False))
            facts = {"what": "VAE decode", "way": way, "batch": 1, "size": size, "precision": settings.precision}
            record.row(**sampled(samples, **facts), **device.memory())


def images(settings: Settings, device: Device, record: Record, model: str) -> None:
    """One image of the first size in all steps, with guidance: eagerly, and on each target's engines."""
    from sdkd.compare.subjects import Subject

    name = settings.models[model]
    with record.part("eager"):
        draw_rows(settings, device, record, model, Subject("eager", name, "eager", settings.precision))
    targets = runnable(settings)
    with record.part("export"):
        bundle = exported(settings, model, record) if targets else None
    for target in targets if bundle else ():
        with record.part(target):
            bundle = built(settings, bundle, target, ("unet",), unet_profiles(settings))
            bundle = built(settings, bundle, target, ("text_encoder", "vae_decoder"), rest_profile(settings))
            draw_rows(settings, device, record, model, Subject(target, name, target, settings.precision, bundle.path))


def draw_rows(settings: Settings, device: Device, record: Record, model: str, subject: Any) -> None:
    """Whole images of one subject."""
    from sdkd.compare.calls import Request, make_images
    from sdkd.compare.subjects import close_subject, open_subject

    size, batch = settings.sizes[0], settings.batches[0]
    pipe = open_subject(subject, device.name)
    try:
        request = Request((PROMPT,), settings.steps, 7.5, 0, size)
        device.reset_peak()
        samples = device.samples(partial(make_images, pipe, request, 0))
        work = work_of(settings, pipe.unet.config, batch, size // scale_of(settings.models[model]))
        whole = {name: value * settings.steps for name, value in work.items()}
        facts = {"what": "image", "way": subject.label, "batch": 1, "size": size, "precision": settings.precision}
        record.row(**sampled(samples, **facts, steps=settings.steps), work=whole, **device.memory())
    finally:
        close_subject(subject, pipe)
        device.wait()
