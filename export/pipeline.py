"""A Stable Diffusion pipeline to a bundle of ONNX graphs that agree with PyTorch, all or nothing."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from export.check.onnx_run import PURPOSE
from export.component import ExportOptions
from export.graph.to_onnx import choose_opset
from export.room import LARGE, Engines, check_export_room
from export.side_by_side import export_components, source_for
from sdkd import __version__
from sdkd.bundle.manifest import Bundle, Manifest
from sdkd.bundle.quantized import CALIBRATION_FILE
from sdkd.core.components import CACHED_UNET, COMPONENTS, check_components
from sdkd.core.console import Progress, quiet
from sdkd.core.contract import check_precision
from sdkd.core.files import check_free, lock, new_folder
from sdkd.core.profiles import ShapeRanges
from sdkd.errors import InputError
from sdkd.models.fused import Loras, loras_of, parse_loras
from sdkd.models.generation import Generation, entry
from sdkd.models.ip_adapter_file import IpAdapter
from sdkd.models.replacements import WithVae
from sdkd.models.resolve import Model, resolve
from sdkd.models.source import ModelSource
from sdkd.quantization.calibration import BESIDE_UNET, Calibration
from sdkd.targets.plan import EnginePlan
from sdkd.targets.registry import require

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

    from export.source import Source

LIBRARIES = ("torch", "onnx", "onnxscript", "onnxruntime", "diffusers", "transformers")


def export_pipeline(
    model: Model | StableDiffusionPipeline,
    output: str | Path,
    *,
    precision: str = "fp32",
    components: Sequence[str] | None = None,
    opset: int | None = None,
    target: str | None = None,
    engines: Engines | None = None,
    vae: str | Path | None = None,
    controlnet: str | Path | None = None,
    loras: Loras = (),
    hidden_states: bool = False,
    step_caching: bool = False,
    t2i_adapter: bool = False,
    timesteps: bool = False,
    ip_adapters: Sequence[str | Path] = (),
    keep_float: Sequence[str] = (),
    static: ShapeRanges | None = None,
    generation: Generation | None = None,
    verify: bool = True,
    overwrite: bool = False,
    reuse: Sequence[str | Path] = (),
    progress: Progress = quiet,
) -> Bundle:
    """Export a pipeline's components to ONNX, compare each with PyTorch, and write the bundle.

    `model` is a name that `sdkd.models.resolve` understands, a model that was opened by it, or an eager pipeline, which
    stays as it is. `precision` is that of weights, activations and tensors (the timestep stays float32). `components`:
    all that there are when None.
    `opset` overrides the measured choice of each component, and of `target`, for which the graphs are meant. `engines`
    says so, too, for whoever builds them here next: an export whose engines cannot fit this machine is refused.
    `vae` and `controlnet` are names as `sdkd.models.replacements` has them: of an AutoencoderKL or AutoencoderTiny in
    place of the model's own, and of a ControlNetModel, for which the UNet gets inputs. `loras` (`FILE[:SCALE]`, or
    `sdkd.models.fused.Lora`) are added to the weights of UNet and text encoder. `hidden_states` gives the text
    encoder one output per layer, for clip_skip. `step_caching` gives the UNet an output for it, and the bundle the
    UNet's last layer as a component of its own (`sdkd.models.step_caching`). `t2i_adapter` gives the UNet inputs
    for the residuals of a T2I-Adapter, `timesteps` one timestep for each sample in place of one for all.
    `ip_adapters` (.safetensors, as `load_ip_adapter` takes them) are loaded into the UNet, which gets inputs for the
    images' embeddings and for the scales, as that of a pipeline with an IP-Adapter does.
    `keep_float` names blocks to compute in float32, `vae_decoder.decoder.up_blocks.3` for one; in fp16, blocks whose
    activations overflow are found and kept so by themselves. `static` fixes all shapes.
    `generation`: the steps, guidance scale and scheduler that the model was made for, where its own files do not say;
    the manifest keeps them, and the bundle's scheduler is that one.
    `verify=False` skips the comparison and the search for overflow, and the manifest says so (parity null). `reuse`
    names bundles whose components are copied where weights, options and library versions are the same: a student's text
    encoder and VAE are its teacher's.

    Raises MissingExtraError without onnxruntime, InputError, ModelError, OutputExistsError, BusyError, ExportError, or
    ParityError's leaves; then, as after an interrupt, no file is left.
    """
    require("onnxruntime", PURPOSE)  # before minutes are spent
    path = Path(output)
    target = target if engines is None else engines.plan.target.name
    options = ExportOptions(
        check_precision(precision), opset, target, hidden_states, tuple(keep_float), static, verify, tuple(reuse),
        step_caching, t2i_adapter, timesteps, tuple(map(IpAdapter.of, ip_adapters)),
    )  # fmt: skip
    replaced = {part: str(name) for part, name in (("vae", vae), ("controlnet", controlnet)) if name is not None}
    check_components(components)
    for name in COMPONENTS:
        choose_opset(name, opset, target)
    options.check_islands()
    if isinstance(model, str | Path | ModelSource):
        model = resolve(model)
    named = model.name if isinstance(model, ModelSource) else model.name_or_path
    own_vae = model.vae if isinstance(model, WithVae) else None
    loras = parse_loras(loras)
    fused = (lora.file for lora in (*loras_of(model), *loras))
    inputs = (named, own_vae, vae, controlnet, *reuse, *ip_adapters, *fused)
    check_free(path, overwrite, inputs)
    with lock(path), new_folder(path, overwrite, inputs) as folder:
        progress("loading the model", 0.0)
        source = source_for(model, replaced, options, loras=loras)
        source.generation = generation or source.generation
        _export_into(folder, source, _chosen(source.components, components), options, engines, progress)
    return Bundle.open(path)


def _export_into(
    folder: Path,
    source: Source,
    names: Sequence[str],
    options: ExportOptions,
    engines: Engines | None,
    progress: Progress,
) -> None:
    """Check, then export these components of a source into an empty folder, and write its manifest."""
    source.check(names)
    room = check_export_room(source, names, options, folder.parent, engines)
    progress(f"{room}" if room.memory > LARGE else "loading the model", 0.0)
    source.write_rest(folder)
    if "unet" in names:
        _carry_calibration(source, folder, progress)
    records = export_components(source, names, options, versions(), folder, progress)
    hashes = {name: record.source_sha256 for name, record in records.items()}
    about = {**source.about, **entry(source.generation), "sha256": hashes}
    Bundle(folder, Manifest(about, versions(), records)).with_rest().save()
    progress("exported", 1.0)


def _carry_calibration(source: Source, folder: Path, progress: Progress) -> None:
    """Take along what a model was trained to round by, where it is of the weights that are exported: without LoRAs.

    ModelError when it is damaged.
    """
    file = Path(source.about["model"]) / "unet" / BESIDE_UNET
    if source.about["kind"] != "folder" or not file.is_file():
        return
    found = Calibration.load(file)
    if found.weights != source.digest("unet"):
        progress("the calibration beside the UNet is of other weights: left out", None)
        return
    found.save(folder / CALIBRATION_FILE)


def _chosen(there: Sequence[str], wanted: Sequence[str] | None) -> tuple[str, ...]:
    """The components to export, in their order; the UNet's last layer comes with the UNet. InputError for one that is
    not there.
    """
    for name in wanted or ():
        if name not in there:
            advice = {
                CACHED_UNET: "it comes with --step-caching, or ",
                "controlnet": "it comes with --controlnet FOLDER, or ",
            }
            raise InputError(f"this model has no component {name!r}: {advice.get(name, '')}leave it out")
    both = {*(wanted or there), *([CACHED_UNET] if wanted and "unet" in wanted else [])}
    return tuple(name for name in there if name in both)


def versions() -> dict[str, str]:
    """Versions of everything that an exported graph depends on."""
    return {"sdkd": __version__, **{name: str(importlib.import_module(name).__version__) for name in LIBRARIES}}


def export_reasons(
    bundle: Bundle,
    source: ModelSource,
    plan: EnginePlan,
    components: Sequence[str] | None = None,
    generation: Generation | None = None,
    step_caching: bool = False,
) -> list[str]:
    """How a bundle differs from what an export of the model would be now, in words: weights, precision, opset,
    libraries, how it is to be run, no step caching where that is wanted; empty when it can be used again.
    """
    digests, records = dict(source.digests), bundle.manifest.components
    components = source.family.components if components is None else components
    digests[CACHED_UNET] = digests.get("unet", "")  # a part of it
    changed = [name for name in components if name not in records or records[name].source_sha256 != digests.get(name)]
    reasons = [f"other weights ({', '.join(changed)})"] if changed else []
    if "unet" in components and "unet" in records and (found := records["unet"].precision) != plan.onnx:
        reasons.append(f"precision {found}, not {plan.onnx}")
    wanted, run = generation or source.generation, resolve(bundle.path).generation
    if wanted not in (None, run):  # what only the bundle says was told to its export, and stays
        reasons.append(f"a model to run with {run or 'any settings'}, not {wanted}")
    if step_caching and CACHED_UNET not in records:
        reasons.append("no graphs for step caching")
    if plan.target.without_weights and any(record.program is None for record in records.values()):
        reasons.append("no traced programs beside its graphs")
    for name, record in records.items():  # an older TensorRT does not parse the attention of newer opsets
        if record.opset > (latest := choose_opset(name, None, plan.target.name)):
            reasons.append(f"{name} in opset {record.opset}, later than {latest}")
    made, here = bundle.manifest.versions, versions()
    return reasons + [
        f"{name} {made.get(name)}, here it is {here[name]}" for name in here if made.get(name) != here[name]
    ]
