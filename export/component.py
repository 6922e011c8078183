"""One component of a pipeline to a checked ONNX graph: PyTorch's answers, islands of float32, the graph, the gate."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from export.check.parity import Reference, case_inputs, check_graph, check_references, parity_cases, run_eager
from export.graph.components import component_state, graph_module, module_contract, standard_attention
from export.graph.image_prompts import scalable
from export.graph.islands import Islands, find_islands, float_weights, kept_float, probe_latents, recorded
from export.graph.precision import cast, check_finite
from export.graph.to_onnx import OnnxGraph, choose_opset, forget_weights, save, to_onnx
from export.source import Source
from sdkd.bundle.manifest import Bundle, ComponentRecord, FileRecord
from sdkd.bundle.onnx_weights import TRANSFORMS_FILE
from sdkd.bundle.program import PROGRAM_FILE
from sdkd.core.components import COMPONENTS, CONFIG_FOLDERS, TEXT_ENCODERS, UNETS
from sdkd.core.conditions import Extras
from sdkd.core.console import Progress
from sdkd.core.contract import Contract, Precision, check_size, torch_dtype
from sdkd.core.files import write_json
from sdkd.core.profiles import ShapeRanges, static_contract
from sdkd.errors import BundleError, InputError
from sdkd.models.exportable import module_config
from sdkd.models.ip_adapter import prompt_details
from sdkd.models.ip_adapter_file import IpAdapter
from sdkd.targets import native_code


@dataclass(frozen=True)
class ExportOptions:
    """What is asked of every component of an export; see `export_pipeline`."""

    precision: Precision
    opset: int | None = None
    target: str | None = None
    hidden_states: bool = False
    keep_float: tuple[str, ...] = ()  # <component>.<module path>
    static: ShapeRanges | None = None
    verify: bool = True
    reuse: tuple[str | Path, ...] = ()
    step_caching: bool = False
    t2i_adapter: bool = False
    timesteps: bool = False  # one for each sample
    ip_adapters: tuple[IpAdapter, ...] = ()

    def islands(self, component: str) -> tuple[str, ...]:
        """Module paths of a component's blocks that are asked to stay float32."""
        start = f"{component}."
        return tuple(name.removeprefix(start) for name in self.keep_float if name.startswith(start))

    def check_islands(self) -> None:
        """InputError for a block of no component, or one to keep where all is float32 or nothing is compared."""
        wrong = next((name for name in self.keep_float if name.partition(".")[0] not in COMPONENTS), None)
        if wrong is not None:
            raise InputError(
                f"block {wrong!r} to keep in float32: give <component>.<module path>, such as "
                f"vae_decoder.decoder.up_blocks.3, with one of {', '.join(COMPONENTS)}"
            )
        if self.keep_float and (self.precision == "fp32" or not self.verify):
            why = "everything is float32 already" if self.precision == "fp32" else "that needs the float32 weights"
            raise InputError(f"blocks to keep in float32 ({', '.join(self.keep_float)}): {why}; leave the option out")

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `from_json` reads it back."""
        static = self.static.to_json() if self.static else None
        return {**asdict(self), "static": static, "reuse": [str(path) for path in self.reuse]}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> ExportOptions:
        """The inverse of `to_json`."""
        static = ShapeRanges.from_json(data["static"]) if data["static"] else None
        lists = {name: tuple(data[name]) for name in ("keep_float", "reuse")}
        adapters = tuple(IpAdapter(**row) for row in data["ip_adapters"])
        return ExportOptions(**{**data, **lists, "static": static, "ip_adapters": adapters})

    def extras(self, component: str, config: Mapping[str, Any], source: Source) -> Extras:
        """What the component has beyond the usual: hidden states as asked or configured or as the family's pipelines
        read them; of the UNet what was asked for, and residuals for a ControlNet and a T2I-Adapter that are there.
        """
        if component in TEXT_ENCODERS:
            asked = self.hidden_states or source.family.hidden_states
            return Extras(hidden_states=asked or bool(config.get("output_hidden_states")))
        if component != "unet":
            return Extras(timesteps=self.timesteps and component in UNETS)
        return Extras(
            residuals="controlnet" in source.components,
            inner_residuals=self.t2i_adapter or source.t2i_adapter,
            timesteps=self.timesteps,
            image_tokens=source.image_tokens,
            deep_feature=self.step_caching,
        )


@dataclass
class _Ready:
    """A module in the wanted precision with its islands, and what PyTorch answers."""

    module: nn.Module
    contract: Contract
    references: list[Reference]
    islands: Islands


def export_component(
    source: Source,
    name: str,
    options: ExportOptions,
    versions: Mapping[str, str],
    folder: Path,
    in_place: bool,
    progress: Progress,
    lighter: Callable[[], None] = lambda: None,
) -> ComponentRecord:
    """Export and check one component into `folder`; its record.

    PyTorch answers first, so that its weights can go before onnxruntime opens the graph; `lighter` is called when the
    float32 weights are gone. Raises what `export_pipeline` says.
    """
    start = time.perf_counter()
    if found := reusable(source, name, options, versions):
        bundle, record = found
        progress(f"the same as in {bundle.path.name}, re-used", 1.0)
        # Copied, not linked: a later weight swap in one bundle must not reach the other.
        shutil.copytree(bundle.path / name, folder / name)
        return replace(record, details={**record.details, "reused": True})
    digest, opset = source.digest(name), choose_opset(name, options.opset, options.target)
    ready = _prepare(source, name, options, in_place, progress)
    check_references(ready.contract, ready.references, options.precision)
    lighter()
    config, prompted = module_config(ready.module), prompt_details(ready.module)
    parameters = sum(tensor.numel() for tensor in component_state(name, ready.module).values())
    progress("exporting to ONNX", 0.3)
    (folder / name).mkdir(exist_ok=True)
    program = folder / name / PROGRAM_FILE
    with kept_float(ready.module, ready.islands, torch_dtype(options.precision)):
        graph = to_onnx(ready.module, ready.contract, config, opset, program)
    contract, references, islands = ready.contract, ready.references, ready.islands
    if in_place:
        source.release(name)
    del ready
    files = save(graph, folder / name)
    write_json(folder / name / TRANSFORMS_FILE, dict(graph.transforms))
    write_json(folder / name / "config.json", _plain(config) | _own_precision(name))
    details = _details(graph) | {"islands": islands.to_json(), "options": _wanted_options(options, name, source)}
    details |= prompted
    forget_weights(graph)
    del graph
    release_memory()
    exported = time.perf_counter()
    progress("comparing with PyTorch" if options.verify else "not compared with PyTorch", 0.8)
    parity = check_graph(files[0], contract, references, options.precision) if options.verify else None
    end = time.perf_counter()
    kept = FileRecord.of(folder, program)
    native_code.note([kept.sha256])
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
        program=kept,
    )


def reusable(
    source: Source, name: str, options: ExportOptions, versions: Mapping[str, str]
) -> tuple[Bundle, ComponentRecord] | None:
    """Where the same component was exported before, among the bundles that `options` names: a student's text encoder
    and VAE are its teacher's. Same weights, precision, opset, options and versions, checked if that is wanted, and
    undamaged; a path that holds no bundle is passed over.
    """
    opset, wanted = choose_opset(name, options.opset, options.target), _wanted_options(options, name, source)
    for path in options.reuse:
        with contextlib.suppress(BundleError):
            bundle = Bundle.open(path)
            record = bundle.component(name)
            asked = (source.digest(name), options.precision, opset, dict(versions), _on(wanted))
            made = (record.source_sha256, record.precision, record.opset, dict(bundle.manifest.versions))
            checked = record.parity or not options.verify
            if asked == (*made, _on(record.details.get("options", {}))) and checked and record.program:
                bundle.verify_files(record)
                return bundle, record
    return None


def _on(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value}


def release_memory() -> None:
    """Give back to the system what was freed: glibc keeps it, and onnxruntime's weights would come on top."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _wanted_options(options: ExportOptions, name: str, source: Source) -> dict[str, Any]:
    """The options that change a component's graph, as its record keeps them."""
    return {
        "hidden_states": name in TEXT_ENCODERS and options.hidden_states,
        "residuals": name == "unet" and "controlnet" in source.components,
        "step_caching": name == "unet" and options.step_caching,
        "t2i_adapter": name == "unet" and (options.t2i_adapter or source.t2i_adapter),
        "timesteps": name in UNETS and options.timesteps,
        "keep_float": list(options.islands(name)),
        "static": options.static.to_json() if options.static else None,
    }


def _prepare(source: Source, name: str, options: ExportOptions, in_place: bool, progress: Progress) -> _Ready:
    """PyTorch's answers in float32 and in the wanted precision, and the module in that precision, on the CPU."""
    original, precision = source.module(name), options.precision
    ready = original if in_place and source.is_ours(name) else copy.deepcopy(original)
    del original
    ready = scalable(standard_attention(ready.cpu().eval().requires_grad_(False)))
    config = module_config(ready)
    extras = options.extras(name, config, source)
    contract = _shaped(module_contract(name, ready, precision, extras), config, source, options)
    if not options.verify:
        return _Ready(check_finite(cast(ready, precision), precision), contract, [], Islands())
    ready = check_finite(cast(ready, "fp32"), "fp32")
    cases = parity_cases(contract, config)
    inputs = [case_inputs(contract, case, config) for case in cases]
    progress("PyTorch in float32", 0.0)
    graph = graph_module(contract, ready)
    if precision == "fp32":
        exact = run_eager(graph, inputs, torch.float32)
        return _Ready(ready, contract, _references(cases, inputs, exact, exact), Islands())
    with recorded(ready) as flows:
        exact = run_eager(graph, inputs, torch.float32)
        if name == "vae_decoder":
            run_eager(graph, ((each,) for each in probe_latents(config)), torch.float32)
    islands = find_islands(flows, options.islands(name), automatic=precision == "fp16")
    ready = cast(ready, precision, keep=float_weights(ready, islands))
    release_memory()
    progress(f"PyTorch in {precision}", 0.15)
    with kept_float(ready, islands, torch_dtype(precision)):
        eager = run_eager(graph_module(contract, ready), inputs, torch_dtype(precision))
    return _Ready(ready, contract, _references(cases, inputs, exact, eager), islands)


def _references(cases: Any, inputs: Any, exact: Any, eager: Any) -> list[Reference]:
    return [Reference(*row) for row in zip(cases, inputs, exact, eager, strict=True)]


def _shaped(contract: Contract, config: Mapping[str, Any], source: Source, options: ExportOptions) -> Contract:
    """The contract with all axes fixed where that is asked for; InputError for a size that the UNet cannot halve."""
    if options.static is None:
        return contract
    scale, positions = source.geometry
    if contract.component in UNETS:
        multiple = scale * int(2 ** (len(config["block_out_channels"]) - 1))
        check_size(options.static.height.opt, options.static.width.opt, multiple)
    return static_contract(contract, options.static, scale, positions)


def _details(graph: OnnxGraph) -> dict[str, Any]:
    operators = graph.nodes
    return {
        "nodes": operators.total(),
        "operators": dict(operators.most_common()),
        "float32_nodes": dict(graph.float_nodes),
        "unmatched_weights": list(graph.unmatched),
    }


def _own_precision(name: str) -> dict[str, Any]:
    """What a graph's config says of precision: SDXL's pipelines cast a VAE to float32 that `force_upcast` asks for, and
    a graph has what would overflow in float32 already.
    """
    return {"force_upcast": False} if CONFIG_FOLDERS[name] == "vae" else {}


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as JSON, without notes of where it was loaded from."""
    return {key: value for key, value in config.items() if key not in ("_name_or_path", "_use_default_values")}
