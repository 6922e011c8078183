"""The pieces that need no model: what runs here at all, and what the machine can do at most."""

from __future__ import annotations

import dataclasses

from gpu_bench.device import Device
from gpu_bench.record import Record
from gpu_bench.settings import TENSORRT, Settings


def doctor(settings: Settings, device: Device, record: Record, model: str) -> None:
    """First of all whether each TensorRT kind builds, opens and runs a small engine here; then all of doctor."""
    from sdkd.commands.doctor import examine, try_target

    trials = []
    for target in TENSORRT:
        if target in settings.targets:
            with record.part(target):
                trials += [dataclasses.asdict(trial) for trial in try_target(target)]
                record.fact(trials=trials)
    with record.part("doctor"):
        record.fact(doctor=examine())


def ceilings(settings: Settings, device: Device, record: Record, model: str) -> None:
    """The largest rate of a matrix product in each precision, and of a copy."""
    from sdkd.compare.measure.limits import measure_ceilings

    for precision in dict.fromkeys((settings.precision, settings.train_precision)):
        with record.part(precision):
            found = measure_ceilings(device.name, precision)
            record.row(what="ceilings", precision=precision, **dataclasses.asdict(found))
