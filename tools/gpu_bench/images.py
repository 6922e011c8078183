"""What a user waits for: whole images from prompt to pixels, eagerly and on each target's engines."""

from __future__ import annotations

from functools import partial
from typing import Any

from gpu_bench.bundles import build_facts, built, check_place, exported, rest_profile, runnable, unet_profiles
from gpu_bench.device import Device, sampled
from gpu_bench.record import Record
from gpu_bench.settings import Settings
from gpu_bench.unets import scale_of, work_of

PROMPT = "a lighthouse in a storm"
PARTS = ("text_encoder", "unet", "vae")


def images(settings: Settings, device: Device, record: Record, model: str) -> None:
    """One image of the first size in all steps, with guidance; TensorRT with CUDA graphs and without."""
    from sdkd.compare.measure.subjects import Subject

    name = settings.models[model]
    with record.part("eager"):
        draw_rows(settings, device, record, model, Subject("eager", name, "eager", settings.precision))
    targets = runnable(settings)
    with record.part("export"):
        bundle = exported(settings, model, record) if targets else None
    for target in targets if bundle else ():
        with record.part(target):
            rest = ("text_encoder", "vae_decoder")
            bundle = built(settings, bundle, target, ("unet",), unet_profiles(settings))
            bundle = built(settings, bundle, target, rest, rest_profile(settings))
            build_facts(record, bundle, target, ("unet", *rest))
            ways = {target: True}
            if target.startswith("tensorrt"):
                ways = {f"{target}, CUDA graphs": True, f"{target}, no graphs": False}
            for way, graphs in ways.items():
                subject = Subject(way, name, target, settings.precision, bundle.path)
                with record.part(way):
                    draw_rows(settings, device, record, model, subject, graphs)


def draw_rows(
    settings: Settings, device: Device, record: Record, model: str, subject: Any, graphs: bool = True
) -> None:
    """Whole images of one subject, whose memory counts from what the last one left."""
    device.begin()
    try:
        draw_row(settings, device, record, model, subject, graphs)
    finally:
        device.begin()


def draw_row(settings: Settings, device: Device, record: Record, model: str, subject: Any, graphs: bool) -> None:
    """One row; the pipeline is gone afterwards."""
    from sdkd.compare.measure.calls import Request, make_images
    from sdkd.compare.measure.subjects import close_subject, open_subject

    size, batch = settings.sizes[0], settings.batches[0]
    pipe = open_subject(subject, device.name)
    try:
        modules = [getattr(pipe, name) for name in PARTS] if subject.has_engines else []
        sessions = [session for module in modules for session in module.sessions()]
        check_place(sessions, device)
        for session in () if graphs else sessions:  # a pipeline has no option for what its sessions can do without
            session._graphs.disable(session.checked.label, "this row is without them")
        request = Request((PROMPT,), settings.steps, 7.5, 0, size)
        device.reset_peak()
        samples = device.samples(partial(make_images, pipe, request, 0))
        work = work_of(settings, pipe.unet.config, batch, size // scale_of(settings.models[model]))
        whole = {name: value * settings.steps for name, value in work.items()}
        facts = {"what": "image", "way": subject.label, "batch": 1, "size": size, "precision": settings.precision}
        record.row(**sampled(samples, **facts, steps=settings.steps), work=whole, **device.memory())
    finally:
        close_subject(subject, pipe)
