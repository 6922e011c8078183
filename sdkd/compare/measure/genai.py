"""OpenVINO GenAI as a subject: a bundle's graphs in the folder that it reads, its own pipeline and parts on them."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from engines.generate.long_prompts import limit_of
from engines.pipelines.pipeline import bundle_scheduler, bundle_tokenizer
from sdkd.bundle.manifest import Bundle
from sdkd.compare.measure.calls import TEXT_ENCODER, UNET, VAE_DECODER, Request, latents_of
from sdkd.compare.measure.foreign import PLAIN, ForeignPipeline
from sdkd.compare.measure.peers import PEERS, Shape, check_scheduler, openvino_options
from sdkd.compare.measure.timing import Work
from sdkd.errors import BundleError, EngineError
from sdkd.targets.registry import openvino_core

PARTS = ("text_encoder", "unet", "vae_decoder")
INPUTS = {"sample", "timestep", "encoder_hidden_states"}


class GenAiPipeline(ForeignPipeline):
    """OpenVINO GenAI's text-to-image pipeline.

    Whole images are `Text2ImagePipeline.generate` with our noise; parts are its own classes, which the pipeline shares.
    """

    def __init__(self, bundle: Bundle, precision: str, shape: Shape | None) -> None:
        import openvino_genai

        configs = {part.removesuffix("_decoder"): bundle.config(part) for part in PARTS}
        tokenizer, scheduler = bundle_tokenizer(bundle, "tokenizer"), bundle_scheduler(bundle)
        super().__init__(configs, tokenizer, scheduler, bundle.scale(), "sdkd-genai-")
        self.genai = openvino_genai
        self.works = {
            UNET: self._unet_work, TEXT_ENCODER: self._text_work, VAE_DECODER: self._vae_work
        }  # fmt: skip
        try:
            write_folder(bundle, self.folder)
            self._open(precision, shape)
        except BaseException:
            self.close()
            raise

    def _open(self, precision: str, shape: Shape | None) -> None:
        genai, folder = self.genai, self.folder
        self.clip = genai.CLIPTextModel(folder / "text_encoder")
        self.denoiser = genai.UNet2DConditionModel(folder / "unet")
        self.decoder = genai.AutoencoderKL(folder / "vae_decoder")
        if shape is not None:  # its fastest way: compiled for one shape
            latents, size = shape.images * (2 if shape.guided else 1), (shape.height, shape.width)
            self.clip.reshape(2 if shape.guided else 1)
            self.denoiser.reshape(latents, *size, limit_of(self))
            self.decoder.reshape(shape.images, *size)
        for part in (self.clip, self.denoiser, self.decoder):
            part.compile("CPU", **openvino_options(precision))
        self._drawing: tuple[str, Any] | None = None  # a scheduler's config, and the pipeline that draws with it

    def __call__(
        self, prompts: Sequence[str], *, num_inference_steps: int, guidance_scale: float, latents: torch.Tensor,
        height: int, width: int, **_: Any,
    ) -> Any:  # fmt: skip
        """Images of one prompt, as many as latents: an array [images, height, width, 3] from 0 to 1."""
        self.scheduler.set_timesteps(num_inference_steps)  # which a comparison counts
        pipe = self._pipeline()
        drawn = pipe.generate(
            prompts[0], num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, height=height,
            width=width, num_images_per_prompt=len(latents), generator=_given(self.genai, latents),
        )  # fmt: skip
        return SimpleNamespace(images=np.array(drawn.data, dtype=np.float32) / 255)

    def _pipeline(self) -> Any:
        """Its pipeline of the opened parts, with the scheduler that is set."""
        text = json.dumps(scheduler_config(self.scheduler))
        if self._drawing is None or self._drawing[0] != text:
            file = self.folder / "scheduler.json"
            file.write_text(text, encoding="utf-8")
            scheduler = self.genai.Scheduler.from_config(file)
            kind = self.genai.Text2ImagePipeline
            self._drawing = text, kind.stable_diffusion(scheduler, self.clip, self.denoiser, self.decoder)
        return self._drawing[1]

    def _embeddings(self, request: Request) -> Any:
        return self.clip.infer(request.prompts[0], "", request.guided)

    def _text_work(self, request: Request) -> Work:
        return lambda: self._embeddings(request)

    def _unet_work(self, request: Request) -> Work:
        sample = _tensor(latents_of(self, request, request.unet_batch, self.unet.config.in_channels))
        hidden = np.repeat(np.array(self._embeddings(request).data), request.batch, axis=0)
        timestep = _tensor(torch.tensor([500]))

        def step() -> Any:
            self.denoiser.set_hidden_states("encoder_hidden_states", _tensor(torch.from_numpy(hidden)))
            return self.denoiser.infer(sample, timestep)

        return step

    def _vae_work(self, request: Request) -> Work:
        sample = _tensor(latents_of(self, request, request.batch, self.vae.config.latent_channels))
        return lambda: self.decoder.decode(sample)

    def close(self) -> None:
        """Let go of the models and remove what was converted for them."""
        self._drawing = None
        for name in ("clip", "denoiser", "decoder"):
            with contextlib.suppress(AttributeError):
                delattr(self, name)
        super().close()


def open_genai(bundle: Bundle, precision: str, device: str, shape: Shape | None) -> GenAiPipeline:
    """GenAI's pipeline of a bundle's ONNX files on the CPU; BundleError for what it has no pipeline for."""
    names = {spec.name for spec in bundle.component("unet").contract.inputs}
    if bundle.family.tokenizers != ("tokenizer",) or names != INPUTS:
        raise BundleError(
            f"openvino-genai is compared on {PLAIN} alone, and the UNet of bundle "
            f"{str(bundle.path)!r} takes {', '.join(sorted(names))}: leave out target 'openvino-genai'"
        )
    return GenAiPipeline(bundle, precision, shape)


def write_folder(bundle: Bundle, folder: Path) -> None:
    """Write the folder that GenAI reads, from a bundle's graphs: OpenVINO's IR, configs and the tokenizer."""
    import openvino
    import openvino_tokenizers

    for part in PARTS:
        (folder / part).mkdir()
        model = openvino_core().read_model(bundle.path / bundle.component(part).files[0].path)
        if part == "unet":
            model = with_whole_timestep(model)
        openvino.save_model(model, folder / part / "openvino_model.xml", compress_to_fp16=False)
        shutil.copy(bundle.path / part / "config.json", folder / part / "config.json")
    tokenizer = openvino_tokenizers.convert_tokenizer(bundle_tokenizer(bundle, "tokenizer"), with_detokenizer=False)
    (folder / "tokenizer").mkdir()
    openvino.save_model(tokenizer, folder / "tokenizer" / "openvino_tokenizer.xml")


def with_whole_timestep(model: Any) -> Any:
    """A UNet whose timestep is int64 of shape [1], as GenAI gives it, in place of one float32 number."""
    import openvino
    from openvino import opset13

    inputs = model.get_parameters()
    place = next(index for index, one in enumerate(inputs) if "timestep" in one.output(0).names)
    whole = opset13.parameter([-1], openvino.Type.i64, name="timestep")
    number = opset13.squeeze(opset13.convert(whole, "f32"), opset13.constant([0], openvino.Type.i64))
    for target in inputs[place].output(0).get_target_inputs():
        target.replace_source_output(number.output(0))
    whole.output(0).set_names({"timestep"})
    inputs[place] = whole
    return openvino.Model(model.get_results(), inputs, model.get_friendly_name())


def scheduler_config(scheduler: Any) -> dict[str, Any]:
    """A scheduler as GenAI reads it, with the very betas: its own differ from diffusers' in the third digit.

    InputError for one that it does not have.
    """
    check_scheduler(PEERS["openvino-genai"], scheduler)
    kept = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    kept = {key: value for key, value in kept.items() if not isinstance(value, float) or math.isfinite(value)}
    return kept | {"_class_name": type(scheduler).__name__, "trained_betas": scheduler.betas.tolist()}


def _tensor(values: torch.Tensor) -> Any:
    import openvino

    return openvino.Tensor(np.ascontiguousarray(values.numpy()))


def _given(genai: Any, latents: torch.Tensor) -> Any:
    """A generator of GenAI that gives these latents [images, channels, height, width] once; it scales them in place."""

    class Given(genai.Generator):
        def __init__(self) -> None:
            super().__init__()

        def randn_tensor(self, shape: Any) -> Any:
            if tuple(shape) != tuple(latents.shape):
                raise EngineError(f"openvino-genai asked for noise {tuple(shape)}, not {tuple(latents.shape)}")
            return _tensor(latents.clone())

    return Given()
