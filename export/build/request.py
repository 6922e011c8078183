"""What is asked of the engines of a bundle, whether it makes sense, and whether the engines that are there fit."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from export.build.onnxruntime_graph import PURPOSE
from export.build.options import CURRENT, BuildOptions, check_options, difference
from export.build.quantized import LIGHT, ROUNDED_WEIGHTS, STAYS_FLOAT, scheme_for
from export.build.ranges import check_ranges, cover, default_ranges
from export.build.run import BUILDERS
from sdkd.bundle.manifest import Bundle, ComponentRecord
from sdkd.core.components import COMPONENTS, check_components
from sdkd.core.contract import QUANTIZED
from sdkd.core.profiles import ShapeRanges
from sdkd.errors import BuildError, BundleError, InputError, MissingExtraError
from sdkd.quantization.again import QUANTIZATION
from sdkd.targets.fast_precisions import fp8_problem
from sdkd.targets.nvidia import gpu
from sdkd.targets.plan import EnginePlan, plan_for_onnx
from sdkd.targets.registry import Target, availability, require

Ranges = ShapeRanges | Sequence[ShapeRanges]


@dataclass(frozen=True)
class Request:
    """What is asked of one engine, before it is known whether it is there already."""

    component: ComponentRecord
    target: str
    slot: str
    precision: str
    profiles: tuple[ShapeRanges, ...]
    flags: Mapping[str, Any]

    @property
    def ranges(self) -> ShapeRanges:
        """What covers all profiles."""
        return cover(self.profiles)


def plan_for(bundle: Bundle, target: str, precision: str | None = None) -> EnginePlan:
    """What is built from a bundle's graphs; InputError where target, precision and graphs do not go together."""
    return plan_for_onnx(target, precision, onnx_precision(bundle), f"bundle {str(bundle.path)!r}")


def onnx_precision(bundle: Bundle) -> str:
    """Precision of a bundle's ONNX: the UNet's, or the first component's; BundleError for an empty bundle."""
    records = bundle.manifest.components
    if not records:
        raise BundleError(f"bundle {str(bundle.path)!r} has no exported component: export the model again")
    return records.get("unet", next(iter(records.values()))).precision


def requests_for(
    bundle: Bundle,
    plan: EnginePlan,
    ranges: Ranges | None,
    components: Sequence[str] | None,
    options: BuildOptions = BuildOptions(),
) -> list[Request]:
    """One request per component; InputError for an unknown component or sizes that the model does not have.

    A target without several profiles gets one that covers those asked for.
    """
    check_components(components)
    names = [name for name in COMPONENTS if name in (bundle.manifest.components if components is None else components)]
    profiles = (ranges,) if isinstance(ranges, ShapeRanges) else tuple(ranges or (default_ranges(bundle),))
    for profile in profiles:
        check_ranges(profile, bundle)
    profiles = profiles if plan.target.many_profiles else (cover(profiles),)
    builder = importlib.import_module(BUILDERS[plan.target.name])
    chosen = {"options": changed} if (changed := options.changed()) else {}

    def request(record: ComponentRecord) -> Request:
        own, more = _precision(plan, record, builder)
        found = {**builder.flags(own, record.precision), **chosen, **more}
        return Request(record, plan.target.name, plan.slot, own, profiles, found)

    check_quantized(plan, options)
    return [request(bundle.component(name)) for name in names]


def _precision(plan: EnginePlan, record: ComponentRecord, builder: ModuleType) -> tuple[str, dict[str, Any]]:
    """Precision of one component's engine, and flags that say how it is rounded, or why it is not."""
    target, name = plan.target, record.name
    if plan.precision not in QUANTIZED:
        # A component that was exported in another precision than the UNet (a float VAE, say) keeps its own.
        return record.precision if plan.precision == plan.onnx else plan.precision, {}
    if name == "unet":
        return plan.precision, {QUANTIZATION: {"scheme": scheme_for(target.name, plan.precision).to_json()}}
    if name in ROUNDED_WEIGHTS.get(target.name, ()):
        return plan.precision, {QUANTIZATION: {"scheme": LIGHT.to_json()}}
    own: str = builder.half_precision() if target.exported_in else record.precision
    return own, {"stays_float": STAYS_FLOAT[name]}


def check_quantized(plan: EnginePlan, options: BuildOptions = BuildOptions()) -> None:
    """InputError for an engine of eight bits with weights that can change, or in fp8 for a GPU that has none."""
    if plan.precision in QUANTIZED and options.refit != "none":
        raise InputError(
            f"--refit cannot be had with {plan.precision}, whose weights are rounded for what they are: leave it out"
        )
    if plan.precision != "fp8":
        return
    named = [one for one in options.compute_capabilities if one != CURRENT]
    device = gpu() if plan.target.builds_on_gpu or CURRENT in options.compute_capabilities else None
    for capability in (*named, *([device["compute_capability"]] if device else [])):
        if found := fp8_problem(capability):
            raise InputError(found)


def check_sources(bundle: Bundle, requests: Sequence[Request]) -> None:
    """What a target's builder asks of a component beside its graph: raises what the builder's own `check` raises."""
    for request in requests:
        check = getattr(importlib.import_module(BUILDERS[request.target]), "check", None)
        if check is not None:
            check(bundle, request.component)


def check_buildable(target: Target, options: BuildOptions = BuildOptions()) -> None:
    """MissingExtraError without the target's packages or onnxruntime, BuildError where it needs a GPU and has none.

    InputError for an option that the target, its library or this machine does not have.
    """
    library = require(target.name)
    require("onnxruntime", PURPOSE)
    if target.name.startswith("tensorrt") and importlib.util.find_spec("polygraphy") is None:
        raise MissingExtraError("polygraphy", target.extra, f"target {target.name!r}")
    found = availability(target.name)
    if not found.can_build:
        raise BuildError(f"target {target.name!r} cannot be built here: {found.reason}. To do: {found.fix}")
    check_options(options, target.name, library, target.runs_on_gpu and gpu() is not None)


def rebuild_reasons(bundle: Bundle, request: Request, here: Mapping[str, str]) -> list[str]:
    """Why an engine must be built, in words; empty when the one that is there fits and its files are whole."""
    record = bundle.manifest.engines.get(f"{request.slot}/{request.component.name}")
    if record is None:
        return ["not built yet"]
    reasons = bundle.stale_reasons(record, here)
    if record.precision != request.precision and "stays_float" not in record.flags:
        reasons.append(f"built in {record.precision}, asked for {request.precision}")
    if record.profiles != request.profiles:
        reasons.append(
            f"built for {' and '.join(map(str, record.profiles))}, asked for {' and '.join(map(str, request.profiles))}"
        )
    reasons += difference(record.flags.get("options", {}), request.flags.get("options", {}))
    for key, value in request.flags.items():
        if key != "options" and record.flags.get(key) != value:
            reasons.append(f"built with {key} {record.flags.get(key)}, asked for {value}")
    try:
        bundle.verify_files(record)
    except BundleError as error:
        reasons.append(str(error).partition("; make it again")[0])
    return reasons
