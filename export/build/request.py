"""What is asked of the engines of a bundle, whether it makes sense, and whether the engines that are there fit."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from export.build.options import BuildOptions, check_options, difference
from export.build.ranges import check_ranges, cover, default_ranges
from export.build.run import BUILDERS
from sdkd.bundle.manifest import Bundle, ComponentRecord
from sdkd.core.contract import COMPONENTS, check_precision
from sdkd.core.profiles import ShapeRanges
from sdkd.errors import BuildError, BundleError, InputError, MissingExtraError
from sdkd.targets.registry import Target, availability, check_target, gpu, require, slot_name, slot_precision

# Engine precisions that a target can make from an ONNX graph of another precision. TensorRT networks are strongly
# typed and onnxruntime runs the graph as it is: there the graph itself must be exported in the wanted precision.
CONVERSIONS: dict[str, dict[str, tuple[str, ...]]] = {"openvino": {"fp32": ("bf16", "fp16"), "fp16": ("fp32",)}}
# Targets whose bf16 graphs nobody could check: onnxruntime has no bf16 kernels for a CPU (Conv, ReduceMean, ...).
NO_BF16_GRAPHS = ("onnxruntime", "openvino")
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


def engine_precision(bundle: Bundle, target: str, asked: str | None) -> str:
    """The engines' precision: asked for, named by the slot, or the ONNX's own; InputError when it cannot be."""
    named = slot_precision(target)
    if named and asked and named != asked:
        raise InputError(f"target {target!r} means precision {named!r}, but {asked!r} was asked for: give one of them")
    onnx = onnx_precision(bundle)
    plain = check_target(target).name
    if plain.startswith("tensorrt") and onnx == "fp32" and not (asked or named):
        raise InputError(
            f"bundle {str(bundle.path)!r} is fp32, which {plain} would build as a slow fp32 engine: "
            f"export it with --precision fp16, or say --precision fp32 if you mean it"
        )
    wanted = check_precision(asked or named or onnx)
    check_conversion(plain, onnx, wanted)
    return wanted


def check_conversion(target: str, onnx: str, wanted: str) -> None:
    """InputError unless a target can make a `wanted` engine from an ONNX graph of precision `onnx`."""
    if onnx == "bf16" and target in NO_BF16_GRAPHS:
        raise InputError(
            f"the ONNX graph is bf16, which {target} cannot run: export it with --precision fp32 "
            f"(and build with --target openvino --precision bf16 for bf16 arithmetic on a CPU)"
        )
    if wanted != onnx and wanted not in CONVERSIONS.get(target, {}).get(onnx, ()):
        raise InputError(
            f"{target} cannot make a {wanted} engine from an {onnx} graph (it runs the graph's own precision): "
            f"export the model again with --precision {wanted}"
        )


def onnx_precision(bundle: Bundle) -> str:
    """Precision of a bundle's ONNX: the UNet's, or the first component's; BundleError for an empty bundle."""
    records = bundle.manifest.components
    if not records:
        raise BundleError(f"bundle {str(bundle.path)!r} has no exported component: export the model again")
    return records.get("unet", next(iter(records.values()))).precision


def profiles_for(bundle: Bundle, target: str, asked: Ranges | None) -> tuple[ShapeRanges, ...]:
    """The profiles that the engines of a target get: those asked for, or what covers them where it has but one.

    Raises InputError for sizes that the model does not have.
    """
    several = (asked,) if isinstance(asked, ShapeRanges) else tuple(asked or (default_ranges(bundle),))
    for profile in several:
        check_ranges(profile, bundle)
    return several if check_target(target).many_profiles else (cover(several),)


def requests_for(
    bundle: Bundle,
    target: str,
    precision: str,
    ranges: Ranges | None,
    components: Sequence[str] | None,
    options: BuildOptions = BuildOptions(),
) -> list[Request]:
    """One request per component; InputError for an unknown component or sizes that the model does not have."""
    names = _components(bundle, components)
    profiles = profiles_for(bundle, target, ranges)
    base = onnx_precision(bundle)
    builder = importlib.import_module(BUILDERS[target])
    slot = slot_name(target, precision, base)
    chosen = {"options": changed} if (changed := options.changed()) else {}

    def request(record: ComponentRecord) -> Request:
        # A component that was exported in another precision than the UNet (a float VAE, say) keeps its own.
        own = record.precision if precision == base else precision
        return Request(record, target, slot, own, profiles, {**builder.flags(own, record.precision), **chosen})

    return [request(bundle.component(name)) for name in names]


def listed(profiles: Sequence[ShapeRanges]) -> str:
    """Profiles in words."""
    return " and ".join(str(profile) for profile in profiles)


def check_components(names: Sequence[str] | None) -> None:
    """InputError for a name that is no component."""
    unknown = [name for name in names or () if name not in COMPONENTS]
    if unknown:
        raise InputError(f"component {unknown[0]!r} is unknown: choose from {', '.join(COMPONENTS)}")


def _components(bundle: Bundle, asked: Sequence[str] | None) -> list[str]:
    check_components(asked)
    return [name for name in COMPONENTS if name in (bundle.manifest.components if asked is None else asked)]


def check_buildable(target: Target, options: BuildOptions = BuildOptions()) -> None:
    """MissingExtraError without the target's packages, BuildError where it needs a GPU and there is none.

    InputError for an option that the target, its library or this machine does not have.
    """
    library = require(target.name)
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
    if record.precision != request.precision:
        reasons.append(f"built in {record.precision}, asked for {request.precision}")
    if record.profiles != request.profiles:
        reasons.append(f"built for {listed(record.profiles)}, asked for {listed(request.profiles)}")
    reasons += difference(record.flags.get("options", {}), request.flags.get("options", {}))
    for key, value in request.flags.items():
        if key != "options" and record.flags.get(key) != value:
            reasons.append(f"built with {key} {record.flags.get(key)}, asked for {value}")
    try:
        bundle.verify_files(record)
    except BundleError as error:
        reasons.append(str(error).partition("; make it again")[0])
    return reasons
