"""A LoRA on engines: what a change of weights takes by refit and by rebuilding, what it costs each step, and its way
back.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from gpu_bench.bundles import built, check_place, copy_of, exported, runnable, unet_profiles
from gpu_bench.device import Device
from gpu_bench.record import Record
from gpu_bench.settings import Settings
from gpu_bench.unets import Steps, answer, distance, step

if TYPE_CHECKING:
    import torch

    from sdkd.bundle.manifest import Bundle

TOUCHED = re.compile(r"\.attn\d\.to_(q|k|v|out\.0)\.weight$")  # what a LoRA of attention changes
STRENGTH = 0.05  # of the change, in standard deviations of each weight


def changed_weights(bundle: Bundle) -> dict[str, torch.Tensor]:
    """All attention weights of the UNet, changed a little, as a LoRA would."""
    import torch

    from sdkd.bundle.onnx_weights import TRANSFORMS_FILE, read_weights
    from sdkd.core.files import read_json

    file = bundle.path / bundle.component("unet").files[0].path
    names = [name for name in read_json(file.parent / TRANSFORMS_FILE) if TOUCHED.search(name)]
    generator, found = torch.Generator().manual_seed(0), {}
    for name, array in read_weights(file, names).items():
        weight = torch.tensor(array, dtype=torch.float32)
        found[name] = weight + STRENGTH * weight.std() * torch.randn(weight.shape, generator=generator)
    return found


def lora(settings: Settings, device: Device, record: Record, model: str) -> None:
    """Each target that runs here: an engine built for a LoRA's refit where there is such a thing, and a plain one."""
    steps = Steps(settings, device, record, model)
    targets = runnable(settings)
    with record.part("export"):
        bundle = exported(settings, model, record) if targets else None
        weights = changed_weights(bundle) if bundle else {}
        record.fact(weights=len(weights))
    for target in targets if bundle else ():
        if target.startswith("tensorrt"):
            with record.part(f"{target}, refit"):
                home = copy_of(bundle, "refit")
                fitted = built(settings, home, target, ("unet",), unet_profiles(settings), refit="lora")
                change(steps, fitted, target, "refit", weights)
        with record.part(f"{target}, rebuild"):
            plain = built(settings, bundle, target, ("unet",), unet_profiles(settings))
            change(steps, plain, target, "rebuild", weights)


def change(steps: Steps, bundle: Bundle, target: str, way: str, weights: Mapping[str, torch.Tensor]) -> None:
    """Time an engine's steps, its change of weights, its steps then, and the change back, which must be exact."""
    import torch

    from engines.pipelines.pipeline import build_module
    from engines.sessions.opening import open_session
    from sdkd.workflow import rebuild

    shapes, name = steps.settings.shapes[:1], f"{target}, {way}"
    made = bundle.engine(target, "unet")
    steps.device.begin()
    place = torch.device(steps.device.name)
    opened = partial(open_session, bundle, target)
    unet: Any = build_module(bundle, target, "unet", steps.device.dtype, place, None, opened)
    try:
        check_place(unet.sessions(), steps.device)
        unet.session.rebuild = rebuild
        call = step(unet, steps.first(unet.config, unet.dtype))
        steps.rows(unet, f"{name}: before", shapes)
        before = answer(call)
        seconds = [swap(unet, weights)]
        steps.rows(unet, f"{name}: LoRA", shapes)
        moved = distance(answer(call), before)
        seconds.append(swap(unet, {}))
        back = answer(call)
        steps.record.row(
            what="LoRA", way=name, seconds=seconds, moved=moved, exact_back=bool(torch.equal(back, before)),
            back=distance(back, before), builder_s=made.seconds, engine_bytes=made.total_bytes,
        )  # fmt: skip
    finally:
        unet.close()
        steps.device.wait()


def swap(unet: Any, weights: Mapping[str, torch.Tensor]) -> float:
    """Seconds of a change of weights, up to where the next step can begin."""
    start = time.perf_counter()
    unet.session.swap(weights)
    return time.perf_counter() - start
