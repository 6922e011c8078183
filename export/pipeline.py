"""A Stable Diffusion pipeline to a bundle of ONNX graphs that agree with PyTorch, all or nothing."""

from __future__ import annotations

import copy
import gc
import hashlib
import importlib.metadata
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from export.components import (
    component_config,
    component_module,
    component_state,
    graph_module,
    module_contract,
    standard_attention,
)
from export.initializers import TRANSFORMS_FILE
from export.parity import Reference, case_inputs, check_graph, parity_cases, run_eager
from export.precision import cast, torch_dtype
from export.reuse import Wanted, find, take
from export.to_onnx import OnnxGraph, choose_opset, save, to_onnx
from sdkd import __version__
from sdkd.bundle import Bundle, ComponentRecord, FileRecord, Manifest
from sdkd.console import Progress, quiet, within
from sdkd.contract import BASE_COMPONENTS, COMPONENTS, CONFIG_FOLDERS, Contract, Precision, check_precision
from sdkd.errors import InputError
from sdkd.files import check_free, lock, new_folder, write_json

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

LIBRARIES = ("torch", "onnx", "onnxscript", "onnxruntime", "diffusers", "transformers")
SHARES = {"text_encoder": 1, "unet": 9, "vae_decoder": 2, "vae_encoder": 2}  # of the time, for the progress bar


@dataclass
class _Source:
    """An eager pipeline, what the manifest says of it, and whether it is ours to change."""

    pipe: Any
    about: dict[str, Any]
    digests: Mapping[str, str] = field(default_factory=dict)
    owned: bool = False


@dataclass(frozen=True)
class _Options:
    precision: Precision
    opset: int | None
    verify: bool
    reuse: tuple[str | Path, ...] = ()


def export_pipeline(
    model: str | Path | StableDiffusionPipeline,
    output: str | Path,
    *,
    precision: str = "fp32",
    components: Sequence[str] = BASE_COMPONENTS,
    opset: int | None = None,
    verify: bool = True,
    overwrite: bool = False,
    reuse: Sequence[str | Path] = (),
    progress: Progress = quiet,
) -> Bundle:
    """Export a pipeline's components to ONNX, compare each with PyTorch, and write the bundle.

    `model` is a name that `sdkd.models.resolve` understands, or an eager pipeline, which stays as it is. `precision` is
    that of weights, activations and tensors (the timestep stays float32). `opset` overrides the measured choice of each
    component. `verify=False` skips the comparison, and the manifest says so (parity null). `reuse` names bundles whose
    components are copied where weights, precision, opset and library versions are the same: a student's text encoder
    and VAE are its teacher's.

    Raises InputError, ModelError, OutputExistsError, BusyError, ExportError, or ParityError's leaves; then, as after an
    interrupt, no file is left.
    """
    path, options = Path(output), _Options(check_precision(precision), opset, verify, tuple(reuse))
    names = _check_components(components)
    for name in names:
        choose_opset(name, opset)
    check_free(path, overwrite)
    with lock(path), new_folder(path, overwrite) as folder:
        progress("loading the model", 0.0)
        source = _open(model, options)
        _write_rest(source.pipe, folder)
        records = _export_all(source, names, options, folder, progress)
        about = {**source.about, "sha256": {name: record.source_sha256 for name, record in records.items()}}
        Bundle(folder, Manifest(about, _versions(), records)).save()
        progress("exported", 1.0)
    return Bundle.open(path)


def _versions() -> dict[str, str]:
    return {"sdkd": __version__, **{name: importlib.metadata.version(name) for name in LIBRARIES}}


def _check_components(components: Sequence[str]) -> tuple[str, ...]:
    unknown = [name for name in components if name not in COMPONENTS]
    if unknown or not components:
        raise InputError(f"components {', '.join(unknown) or 'none'!r}: choose from {', '.join(COMPONENTS)}")
    return tuple(name for name in COMPONENTS if name in components)


def _open(model: str | Path | StableDiffusionPipeline, options: _Options) -> _Source:
    if not isinstance(model, str | Path):
        return _Source(model, {"model": type(model).__name__, "kind": "pipeline", "random_weights": False})
    from sdkd.models import load_eager, resolve, source_digests

    found = resolve(model)
    name = str(Path(found.name).absolute()) if found.kind in ("folder", "single-file") else found.name
    about = {"model": name, "kind": found.kind, "random_weights": found.random_weights}
    # The comparison needs the float32 weights; without it half of the memory will do.
    dtype = torch.float32 if options.verify else torch_dtype(options.precision)
    return _Source(load_eager(model, dtype), about, source_digests(model), owned=True)


def _write_rest(pipe: Any, folder: Path) -> None:
    """What runs beside the graphs, as diffusers writes it: model_index.json, scheduler, tokenizer."""
    index = json.loads(pipe.to_json_string())
    index.pop("_name_or_path", None)  # a path of this machine
    write_json(folder / "model_index.json", index)
    for name in ("scheduler", "tokenizer", "feature_extractor"):
        if (part := getattr(pipe, name, None)) is not None:
            part.save_pretrained(folder / name)


def _export_all(
    source: _Source, names: Sequence[str], options: _Options, folder: Path, progress: Progress
) -> dict[str, ComponentRecord]:
    total, done = sum(SHARES[name] for name in names), 0
    records: dict[str, ComponentRecord] = {}
    for index, name in enumerate(names):
        step = within(progress, done / total, (done + SHARES[name]) / total, f"{name}: ")
        shared = any(CONFIG_FOLDERS[other] == CONFIG_FOLDERS[name] for other in names[index + 1 :])
        records[name] = _export(source, name, options, folder, source.owned and not shared, step)
        if source.owned and not shared:
            setattr(source.pipe, CONFIG_FOLDERS[name], None)
        gc.collect()
        done += SHARES[name]
    return records


def _export(
    source: _Source, name: str, options: _Options, folder: Path, in_place: bool, progress: Progress
) -> ComponentRecord:
    """One component: PyTorch's answers first, so that its weights can go before onnxruntime opens the graph."""
    start = time.perf_counter()
    module = component_module(source.pipe, name)
    digest = source.digests.get(name) or state_digest(component_state(name, module))
    wanted = Wanted(name, digest, options.precision, choose_opset(name, options.opset), _versions(), options.verify)
    if found := find(options.reuse, wanted):
        progress(f"the same as in {found[0].path.name}, re-used", 1.0)
        return take(*found, folder)
    contract, config = module_contract(name, module, options.precision), component_config(module)
    references, module = _prepare(module, contract, config, options, in_place, progress)
    parameters = sum(tensor.numel() for tensor in component_state(name, module).values())
    progress("exporting to ONNX", 0.3)
    graph = to_onnx(module, contract, config, options.opset)
    del module
    files = save(graph, folder / name)
    write_json(folder / name / TRANSFORMS_FILE, dict(graph.transforms))
    write_json(folder / name / "config.json", _plain(config))
    opset, details = graph.opset, _details(graph)
    del graph
    gc.collect()
    exported = time.perf_counter()
    progress("comparing with PyTorch" if options.verify else "not compared with PyTorch", 0.8)
    parity = check_graph(files[0], contract, references, options.precision) if options.verify else None
    end = time.perf_counter()
    details |= {"export_seconds": round(exported - start, 2), "parity_seconds": round(end - exported, 2)}
    return ComponentRecord(
        name=name,
        contract=contract,
        precision=options.precision,
        opset=opset,
        files=tuple(FileRecord.of(folder, file) for file in files),
        source_sha256=digest,
        parameters=parameters,
        seconds=round(end - start, 2),
        parity=parity,
        details=details,
    )


def _prepare(
    module: nn.Module,
    contract: Contract,
    config: Mapping[str, Any],
    options: _Options,
    in_place: bool,
    progress: Progress,
) -> tuple[list[Reference], nn.Module]:
    """PyTorch's answers in float32 and in the wanted precision, and the module in that precision, on the CPU."""
    name, precision = contract.component, options.precision
    ready = module if in_place else copy.deepcopy(module)
    ready = standard_attention(ready.cpu().eval().requires_grad_(False))
    if not options.verify:
        return [], cast(ready, precision)
    ready = cast(ready, "fp32")
    cases = parity_cases(contract, config)
    inputs = [case_inputs(contract, case, config) for case in cases]
    progress("PyTorch in float32", 0.0)
    exact = run_eager(graph_module(name, ready), inputs)
    ready, eager = cast(ready, precision), exact
    if precision != "fp32":
        progress(f"PyTorch in {precision}", 0.15)
        eager = run_eager(graph_module(name, ready), inputs)
    return [Reference(*row) for row in zip(cases, inputs, exact, eager, strict=True)], ready


def _details(graph: OnnxGraph) -> dict[str, Any]:
    operators = graph.nodes
    return {
        "nodes": operators.total(),
        "operators": dict(operators.most_common()),
        "float32_nodes": dict(graph.float_nodes),
        "unmatched_weights": list(graph.unmatched),
    }


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as JSON, without notes of where it was loaded from."""
    return {key: value for key, value in config.items() if key not in ("_name_or_path", "_use_default_values")}


def state_digest(state: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a state dict: the identity of weights that have no file."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
