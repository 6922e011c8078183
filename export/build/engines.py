"""Build engines into a bundle: what is fresh is kept, what is missing or stale is built in a child process."""

from __future__ import annotations

import contextlib
import errno
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import floor
from pathlib import Path, PurePosixPath
from typing import Any

from export.build.calibrate import CalibrationWish, calibrated
from export.build.estimate import check_resources
from export.build.files import drop_replaced, drop_unnamed, moved, partial_folder, place_for
from export.build.job import Job
from export.build.options import BuildOptions
from export.build.ranges import Geometry, check_shapes, input_shapes
from export.build.request import (
    Ranges,
    Request,
    check_buildable,
    check_sources,
    plan_for,
    rebuild_reasons,
    requests_for,
)
from sdkd.bundle.manifest import Bundle, EngineRecord, FileRecord
from sdkd.bundle.memory import size
from sdkd.core.child import ChildError, run_in_child
from sdkd.core.components import CONFIG_FOLDERS
from sdkd.core.console import Progress, quiet, within
from sdkd.core.files import lock, sha256, write_bytes
from sdkd.core.replace import sweep_inside
from sdkd.errors import BuildError, NotFasterError
from sdkd.models.exportable import check_configs
from sdkd.quantization.again import CALIBRATION, QUANTIZATION
from sdkd.targets.registry import built_environment, cache_folder, check_target, environment, slot_name, timing_cache

# What may differ where an engine runs, by how compatible with other hardware it is.
FREE: dict[str, tuple[str, ...]] = {
    "none": (),
    "ampere-plus": ("gpu", "compute_capability"),
    "same-compute-capability": ("gpu",),
}


def build_engine(
    bundle: str | Path | Bundle,
    target: str,
    *,
    precision: str | None = None,
    ranges: Ranges | None = None,
    components: Sequence[str] | None = None,
    options: BuildOptions = BuildOptions(),
    calibration: CalibrationWish = CalibrationWish(),
    keep_slower: bool = False,
    force: bool = False,
    progress: Progress = quiet,
) -> Bundle:
    """Build the engines of a bundle for a target and return the bundle as it is then.

    `target`: a target or slot (`openvino-bf16`); `precision`: None for the ONNX's own; `ranges`: one profile, several
    (a target without profiles gets one range that covers them), or None for `default_ranges`; `components`: None for
    all that were exported. An engine of the same ONNX, profiles, options and environment is kept unless `force`. All
    or nothing: on failure or Ctrl-C files and manifest stay as they were.

    In `int8` and `fp8` the UNet is rounded by a `calibration`, which is recorded once and kept in the bundle. The
    engine must be near the float one and, where it runs here, faster than the target's half precision: NotFasterError
    says how fast it is, and nothing is kept (`keep_slower` keeps it).

    Raises InputError (target, precision, ranges, components, options), BundleError (no bundle, damaged ONNX),
    MissingExtraError, BusyError (somebody else builds), BuildError and ValuesError (NaN, infinity, too far off).
    """
    root = bundle.path if isinstance(bundle, Bundle) else Path(bundle)
    kind = check_target(target)
    Bundle.open(root)
    with lock(root):
        sweep_inside(root)
        opened = Bundle.open(root)
        plan = plan_for(opened, target, precision)
        check_buildable(kind, options)
        check_configs({CONFIG_FOLDERS[name]: opened.config(name) for name in opened.manifest.components})
        requests = requests_for(opened, plan, ranges, components, options)
        requests = [_calibrated(opened, request, calibration, within(progress, 0.0, 0.3)) for request in requests]
        if isinstance(ranges, Sequence) and len(ranges) > 1 and not kind.many_profiles:
            progress(f"{kind.name} has no profiles: one range covers all {len(ranges)}, {requests[0].ranges}", None)
        stale = _split(opened, requests, force, progress)
        check_sources(opened, stale)
        check_resources(opened, stale, options)
        if not stale:
            return opened
        try:
            return _build(opened, stale, keep_slower, within(progress, 0.3, 1.0) if _rounds(stale) else progress)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise BuildError(
                f"no space left for the engines in {str(root)!r} ({size(shutil.disk_usage(root).free)} free): nothing "
                f"was changed. Free some, or copy the bundle elsewhere"
            ) from error


def _rounds(requests: Sequence[Request]) -> bool:
    return any(CALIBRATION in request.flags.get(QUANTIZATION, {}) for request in requests)


def _calibrated(bundle: Bundle, request: Request, wish: CalibrationWish, progress: Progress) -> Request:
    """A UNet's request of eight bits with the digest of its calibration, which is recorded if need be."""
    if QUANTIZATION not in request.flags or request.component.name != "unet":
        return request
    file = calibrated(bundle, wish, request.profiles[0], progress)
    known = {**request.flags[QUANTIZATION], CALIBRATION: sha256(file)}
    return replace(request, flags={**request.flags, QUANTIZATION: known})


def _split(bundle: Bundle, requests: list[Request], force: bool, progress: Progress) -> list[Request]:
    """The requests to build; says of every one why it is built or that it is kept."""
    here = environment(requests[0].target) if requests else {}
    stale = []
    for request in requests:
        name = request.component.name
        bundle.verify_files(request.component)
        bundle.verify_weights(request.component)
        reasons = ["forced"] if force else rebuild_reasons(bundle, request, here)
        if reasons:
            progress(f"{name}: to build for {request.slot} ({'; '.join(reasons)})", None)
            stale.append(request)
        else:
            progress(f"{name}: {request.slot} engine is fresh, reused", None)
    return stale


def _build(bundle: Bundle, requests: list[Request], keep_slower: bool, progress: Progress) -> Bundle:
    slot = requests[0].slot
    home = bundle.path / "engines" / slot
    drop_unnamed(bundle, slot)
    with partial_folder(home) as partial:
        timings = timing_cache(requests[0].target)
        if timings and (cache_folder() / timings).is_file():
            shutil.copy2(cache_folder() / timings, partial)
        jobs = [replace(_job(bundle, request, partial), keep_slower=keep_slower) for request in requests]
        answers = _run(jobs, requests, progress)
        _check_pays(bundle, requests, answers)
        if timings and (partial / timings).is_file():
            with contextlib.suppress(OSError):  # a folder that cannot be written only costs the next build its time
                write_bytes(cache_folder() / timings, (partial / timings).read_bytes())
            (partial / timings).unlink()
        place = place_for(bundle, slot, [request.component.name for request in requests])
        records = [_record(request, answer, partial, place) for request, answer in zip(requests, answers, strict=True)]
        manifest = bundle.manifest
        for record in records:
            manifest = manifest.with_engine(record)
        result = replace(bundle, manifest=manifest)
        with moved(partial, bundle.path / place):
            result.save()
        drop_replaced(bundle, result)
    return result


def _check_pays(bundle: Bundle, requests: Sequence[Request], answers: Sequence[Mapping[str, Any]]) -> None:
    """NotFasterError for an engine of eight bits that is not to be kept."""
    for request, answer in zip(requests, answers, strict=True):
        if not answer["kept"]:
            speed = answer["flags"]["speed"]
            half = slot_name(request.target, speed["against"], request.component.precision)
            there = f"{half}/{request.component.name}" in bundle.manifest.engines
            times = f"{floor(100 * speed['times']) / 100:.2f}x {speed['against']}"
            other = f"kept {half}" if there else f"use it instead: {bundle.build_command(half)}"
            raise NotFasterError(
                f"{request.slot} is not faster here: {times}, so nothing was added "
                f"(--force keeps it all the same); {other}"
            )


def _job(bundle: Bundle, request: Request, folder: Path) -> Job:
    contract = request.component.contract
    geometry = Geometry.of(bundle)
    return Job(
        component=request.component.name,
        target=request.target,
        precision=request.precision,
        onnx=str((bundle.path / request.component.files[0].path).resolve()),
        folder=str(folder.resolve()),
        contract=contract,
        profiles=tuple(input_shapes(contract, profile, geometry) for profile in request.profiles),
        checks=check_shapes(contract, request.profiles, geometry),
        flags=request.flags,
        timing_cache=timing_cache(request.target),
        bundle=str(bundle.path.resolve()),
    )


def _run(jobs: list[Job], requests: list[Request], progress: Progress) -> list[dict[str, Any]]:
    current = [jobs[0].component]

    def follow(message: str, fraction: float | None) -> None:
        current[0] = message.partition(":")[0]
        progress(message, fraction)

    try:
        answers: list[dict[str, Any]] = run_in_child(
            "export.build.run:build_all", {"jobs": [job.to_json() for job in jobs]}, follow
        )
    except ChildError as error:
        raise BuildError(explain(current[0], requests[0].target, error)) from error
    return answers


def _record(request: Request, answer: Mapping[str, Any], folder: Path, place: PurePosixPath) -> EngineRecord:
    files = tuple(replace(FileRecord.of(folder, folder / name), path=str(place / name)) for name in answer["files"])
    return EngineRecord(
        component=request.component.name,
        target=request.target,
        precision=answer["precision"],
        files=files,
        onnx_sha256=request.component.onnx_sha256,
        ranges=request.ranges,
        profiles=request.profiles,
        environment=recorded_environment(request),
        seconds=answer["seconds"],
        flags={**request.flags, **answer["flags"]},
        parity=answer["parity"],
        built_for=tuple(answer["built_for"]),
        slot=request.slot,
    )


def recorded_environment(request: Request) -> dict[str, str]:
    """What must be equal where the engine runs: less for an engine that is made for more."""
    options = BuildOptions.of(request.flags.get("options", {}))
    free = FREE[options.hardware_compatible]
    return {key: value for key, value in built_environment(request.target).items() if key not in free}


# Why a build failed, for a person

# What the library said -> what to try; the first that fits.
ADVICE = (
    (r"no space left|disk quota", "free some disk space, or copy the bundle elsewhere"),
    (
        r"out.?of.?memory|bad_alloc|cannot allocate|failed to allocate|memoryerror",
        "close other programs, or narrow --size and --batch",
    ),
    (
        r"'tensor\(float16\)' of input|types half and float|\bf16\b.{0,40}\bf32\b|could not find an implementation",
        "an operator takes no half precision here: export the model with --precision fp32, or choose another target",
    ),
    (r"cudaerror|cuda driver|no cuda", "build on a machine with an NVIDIA GPU and its driver (see: sdkd doctor)"),
    (
        r"refuses operator|no importer|plugin not found|unsupported|not.implemented|no op registered|no conversion",
        "update the target's package, or export the model again with an older --opset",
    ),
)
OTHER_ADVICE = "export the model again, update the target's package, or choose another target"
ERROR_LINE = re.compile(r"\[E\](?!.*--- (Begin|End) node)|\b(error|exception|failed|fatal)\b", re.I)
# tensorrt_rtx says so whenever it builds without a GPU, which it may; a builder that needs one says more.
NOISE = re.compile(r"catchCudaError.*cudaError 35")
SAID_LINES = 6


def explain(component: str, target: str, error: ChildError) -> str:
    """Component, target, what the library said last, and what to try."""
    if error.ended_by == "SIGKILL":
        advice = f"close other programs, narrow --size and --batch, or build it alone: --components {component}"
        return f"{component} could not be built for {target}: {error}. Try this: {advice}"
    needs_gpu = check_target(target).builds_on_gpu
    tail = [line for line in error.tail if needs_gpu or not NOISE.search(line)]
    said = [line.strip() for line in tail if ERROR_LINE.search(line)] or [line.strip() for line in tail]
    said = [line for line in dict.fromkeys(said) if line not in str(error)][-SAID_LINES:]
    advice = advice_for("\n".join([str(error), *said]))
    lines = "".join(f"\n  {line}" for line in said)
    quoted = f". The library said:{lines}\n" if said else ". "
    return f"{component} could not be built for {target}: {error}{quoted}Try this: {advice}"


def advice_for(said: str) -> str:
    """What to try after what a library said."""
    return next((advice for pattern, advice in ADVICE if re.search(pattern, said, re.I)), OTHER_ADVICE)
