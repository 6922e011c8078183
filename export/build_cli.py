"""`sdkd build-engine`: engines of a bundle, or of a model that is exported first."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdkd.bundle.manifest import MANIFEST, Bundle, EngineRecord
from sdkd.core.components import COMPONENTS, check_components
from sdkd.core.console import Progress, progress, show, show_json, table, within
from sdkd.core.contract import QUANTIZED, size_multiple
from sdkd.core.text_files import prompt_lines
from sdkd.errors import InputError, NotFasterError, OutputExistsError
from sdkd.models.fused import Lora, loras_of
from sdkd.models.generation import FORM, Generation, parse_generation
from sdkd.models.kinds import BundleSource
from sdkd.models.source import ModelSource
from sdkd.models.step_caching import check_cached
from sdkd.targets.plan import EnginePlan, plan_for_model

if TYPE_CHECKING:
    from export.build.calibrate import CalibrationWish
    from export.build.options import BuildOptions
    from export.build.ranges import Typed

ARTIFACTS = Path("artifacts")
COLUMNS = ("component", "precision", "MB", "seconds", "relative error", "state")


def build_engine(
    model: Annotated[str, typer.Argument(metavar="MODEL_OR_BUNDLE", help="A bundle, or a model to export first.")],
    target: Annotated[
        str, typer.Option("--target", "-t", help="onnxruntime, openvino, inductor, tensorrt or tensorrt-rtx.")
    ],
    precision: Annotated[str | None, typer.Option(help="fp32, fp16, bf16, int8 or fp8; default: the bundle's.")] = None,
    size: Annotated[list[str] | None, typer.Option(help="Pixels: 512, 512..768 or 512x768 (height x width).")] = None,
    size_opt: Annotated[str | None, typer.Option(help="The size of the range to be fastest at: 768.")] = None,
    batch: Annotated[str | None, typer.Option(help="Images per call: 1 or 1..4.")] = None,
    batch_opt: Annotated[str | None, typer.Option(help="The batch of the range to be fastest at: 1.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Tokens per prompt; default: all the text encoder has.")] = None,
    profile: Annotated[list[str] | None, typer.Option(help="One of several: size=512..1024,batch=1..4.")] = None,
    components: Annotated[list[str] | None, typer.Option(help="unet, text_encoder, ...; default: all.")] = None,
    optimization_level: Annotated[int | None, typer.Option(help="0 (fast build) to 5 (slow build); usual: 3.")] = None,
    workspace_gb: Annotated[float | None, typer.Option(help="GiB of scratch memory for one layer at run time.")] = None,
    refit: Annotated[str, typer.Option(help="Weights that can change later: none, lora or all.")] = "none",
    hardware_compatible: Annotated[
        str, typer.Option(help="Run on other GPUs, too: none, ampere-plus or same-compute-capability.")
    ] = "none",
    compute_capability: Annotated[
        str | None,
        typer.Option(help="GPU generations of a tensorrt-rtx plan: 8.6,8.9 or current; default: 8.0 and later."),
    ] = None,
    memory_cap_gb: Annotated[float | None, typer.Option(help="GiB that the build may take; more is an error.")] = None,
    run_with: Annotated[
        str | None, typer.Option(help=f"How it was made to be run, if its files do not say: {FORM}.")
    ] = None,
    vae: Annotated[str | None, typer.Option(help="For a model: another VAE, as `sdkd export` takes it.")] = None,
    lora: Annotated[
        list[str] | None, typer.Option(metavar="FILE[:SCALE]", help="A LoRA to fuse into MODEL; may be repeated.")
    ] = None,
    step_caching: Annotated[
        bool, typer.Option("--step-caching", help="For a model: as `sdkd export --step-caching`.")
    ] = False,
    calibrate_prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="For int8 and fp8: prompts to record, one a line.")
    ] = None,
    calibrate_images: Annotated[int | None, typer.Option(help="For int8 and fp8: images to record.")] = None,
    calibrate_steps: Annotated[int | None, typer.Option(help="For int8 and fp8: denoising steps of each.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(metavar="FILE", help="For int8 and fp8: calibration/unet.safetensors of a bundle.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Bundle folder for a model.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Build again what is fresh, and keep int8 and fp8 that are not faster.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another bundle at the output.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Build engines for a target, and check them where they run here.

    What is fresh is kept. An image size must be a multiple of 64 pixels for Stable Diffusion (32 for sd-tiny).
    """
    from export.build.engines import build_engine as build
    from export.build.options import BuildOptions
    from export.build.ranges import Typed, parse_profile, parse_profiles
    from sdkd.models.fused import with_loras
    from sdkd.models.replacements import with_vae
    from sdkd.models.resolve import resolve

    options = BuildOptions(
        optimization_level=optimization_level,
        workspace_gb=workspace_gb,
        refit=refit,
        hardware_compatible=hardware_compatible,
        compute_capabilities=tuple(compute_capability.replace(" ", "").split(",")) if compute_capability else (),
        memory_cap_gb=memory_cap_gb,
    )
    parts = [name for group in components or () for name in group.split(",")] or None
    typed = Typed(tuple(size or ()), size_opt, batch, batch_opt, tokens)
    source = with_vae(with_loras(resolve(model), lora or ()), vae)
    profiles = [parse_profile(text, typed) for text in profile or ()] or [typed]
    plan = _check_wish(source, target, precision, profiles, options)
    wish = _calibration(plan, calibrate_prompts, calibrate_images, calibrate_steps, calibration)
    check_components(parts)
    generation = None if run_with is None else parse_generation(run_with)
    with progress(f"build-engine {target}") as step:
        start = 0.0 if isinstance(source, BundleSource) else 0.5
        path = _bundle(source, output, plan, parts, generation, step_caching, overwrite, within(step, 0.0, 0.5))
        before = Bundle.open(path)
        ranges = parse_profiles(profile or (), typed, before)
        wanted: dict[str, Any] = {"precision": precision, "ranges": ranges, "components": parts, "force": force}
        wanted |= {"options": options, "calibration": wish, "keep_slower": force}
        try:
            after = build(path, target, progress=within(step, start, 1.0), **wanted)
        except NotFasterError as error:  # an answer, and no failure
            show_json({"bundle": str(path), "kept": False, "reason": str(error)}) if json else show(str(error))
            return
    found = summary(before, after, plan.slot, parts, force)
    if json:
        show_json(found)
        return
    show(table(f"Engines for {found['slot']} in {path}", COLUMNS, [_row(engine) for engine in found["engines"]]))
    for shapes in dict.fromkeys(text for engine in found["engines"] for text in engine["shapes"]):
        show(f"  takes {shapes}")
    show(f"Run it with: sdkd generate {shlex.quote(str(path))} PROMPT --target {found['slot']}")


def _calibration(
    plan: EnginePlan, prompts: Path | None, images: int | None, steps: int | None, file: Path | None
) -> CalibrationWish:
    """What is asked of a calibration; InputError for a wish where nothing is calibrated."""
    from export.build.calibrate import CalibrationWish

    if plan.precision not in QUANTIZED and (prompts, images, steps, file) != (None,) * 4:
        raise InputError(
            f"{plan.precision} engines are not calibrated: give --precision int8 or fp8, or leave the calibration out"
        )
    return CalibrationWish(None if prompts is None else prompt_lines(prompts), images, steps, file)


def _check_wish(
    source: ModelSource, target: str, precision: str | None, profiles: list[Typed], options: BuildOptions
) -> EnginePlan:
    """What is to be built, after all that can be refused before minutes are spent on an export."""
    from export.build.ranges import check_sizes
    from export.build.request import check_buildable, check_quantized, plan_for

    if isinstance(source, BundleSource):
        plan = plan_for(source.bundle, target, precision)
    else:
        plan = plan_for_model(target, precision)
    for typed in profiles:
        typed.check()
    sizes = [pixels for typed in profiles if (pixels := typed.pixels())] if source.here else []
    for height, width in sizes:
        check_sizes(height, width, size_multiple(source.unet_config, source.config("vae")))
    check_buildable(plan.target, options)
    check_quantized(plan, options)
    return plan


def _bundle(
    source: ModelSource,
    output: Path | None,
    plan: EnginePlan,
    parts: list[str] | None,
    generation: Generation | None,
    step_caching: bool,
    overwrite: bool,
    step: Progress,
) -> Path:
    """The bundle that is meant, exported first when MODEL is none."""
    if isinstance(source, BundleSource):
        if generation not in (None, source.generation):
            raise InputError(
                f"{source.name!r} is a bundle already, which says how it is to be run "
                f"({source.generation or 'as most models'}): export its model again with --run-with"
            )
        if step_caching:
            check_cached(source.bundle)
        if output and output.resolve() != source.bundle.path.resolve():
            raise InputError(
                f"{source.name!r} is a bundle already, engines go into it: leave out --output {str(output)!r}"
            )
        return source.bundle.path
    path = output or ARTIFACTS / default_name(source.name, loras_of(source))
    if not overwrite and (path / MANIFEST).is_file():
        _check_same(source, path, plan, generation, step_caching)
        step("ONNX is fresh, reused", 1.0)
        return path
    from export.pipeline import export_pipeline
    from export.room import Engines

    wanted: dict[str, Any] = {"precision": plan.onnx, "engines": Engines(plan, parts), "generation": generation}
    wanted["step_caching"] = step_caching
    export_pipeline(source, path, **wanted, overwrite=overwrite, progress=step)
    return path


def _check_same(
    source: ModelSource, path: Path, plan: EnginePlan, generation: Generation | None, step_caching: bool
) -> None:
    """OutputExistsError, with every reason, unless the bundle at `path` is what an export would make now."""
    from export.pipeline import export_reasons

    if reasons := export_reasons(Bundle.open(path), source, plan, generation=generation, step_caching=step_caching):
        raise OutputExistsError(
            f"output {str(path)!r} holds a bundle of {'; '.join(reasons)}: choose another --output or pass --overwrite"
        )


def default_name(model: str, loras: Sequence[Lora] = ()) -> str:
    """A folder name for a model: `segmind/tiny-sd` -> `tiny-sd`, `random:sd15-tiny` -> `random-sd15-tiny`; names of
    LoRAs come behind it.
    """
    name = Path(model).expanduser().resolve().name if Path(model).exists() else model.rpartition("/")[2]
    whole = "-".join((name.removesuffix(".safetensors"), *(lora.name for lora in loras)))
    return re.sub(r"[^\w.-]+", "-", whole).strip("-.") or "model"


def summary(
    before: Bundle, after: Bundle, slot: str, components: list[str] | None, force: bool = False
) -> dict[str, Any]:
    """What the command has to say, JSON-ready; `reused` engines are those that were there before, unless forced."""
    kept = {} if force else before.manifest.engines
    names = [name for name in COMPONENTS if name in (components or after.manifest.components)]
    engines = [after.engine(slot, name) for name in names]
    return {"bundle": str(after.path), "slot": slot, "engines": [_describe(engine, kept) for engine in engines]}


def _describe(engine: EngineRecord, kept: Mapping[str, EngineRecord]) -> dict[str, Any]:
    return {
        "component": engine.component,
        "slot": engine.slot,
        "precision": engine.precision,
        "ranges": engine.ranges.to_json(),
        "profiles": [profile.to_json() for profile in engine.profiles],
        "shapes": [str(profile) for profile in engine.profiles],
        "bytes": engine.total_bytes,
        "seconds": engine.seconds,
        "parity": engine.parity,
        "built_for": list(engine.built_for),
        "reused": kept.get(f"{engine.slot}/{engine.component}") == engine,
    }


def _row(engine: dict[str, Any]) -> list[str]:
    parity = engine["parity"]
    return [
        engine["component"],
        engine["precision"],
        f"{engine['bytes'] / 1e6:,.1f}",
        f"{engine['seconds']:.1f}",
        f"{parity['relative']:.1e}" if parity else "not run here",
        "reused" if engine["reused"] else "built",
    ]
