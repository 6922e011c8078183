"""stable-diffusion.cpp as a subject: a model's weights in one file as it reads them, our seeds and noise levels.

It has no call for a part: samples of UNet step, text encoder and VAE are the time between what it reports of an image,
by our clock.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

from sdkd.compare.measure.calls import TEXT_ENCODER, UNET, VAE_DECODER, Request, Size
from sdkd.compare.measure.foreign import ForeignPipeline, check_plain
from sdkd.compare.measure.peers import Shape
from sdkd.compare.measure.timing import Sample, Timer
from sdkd.errors import EngineError, ModelError
from sdkd.models.resolve import load_rest
from sdkd.models.schedulers import noise_schedule
from sdkd.models.single_file_writer import Plan, plan_of, write_single_file
from sdkd.models.source import ModelSource

WEIGHTS = {"fp32": "f32", "fp16": "f16"}  # how ggml names the type of weights
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v"}
NOISE = {  # all that it knows, in Stable Diffusion 1.x and 2.x
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "trained_betas": None, "rescale_betas_zero_snr": False,
}  # fmt: skip


class SdCppPipeline(ForeignPipeline):
    """stable-diffusion.cpp's text-to-image on the CPU, by its Python package (stable-diffusion-cpp-python)."""

    def __init__(self, source: ModelSource, precision: str) -> None:
        plan, rest = check_model(source), load_rest(source)
        configs = {part.name: source.config(part.name) for part in plan.parts}
        super().__init__(configs, rest.tokenizer, rest.scheduler, source.latent_scale, "sdkd-sdcpp-")
        self.parameter_counts = parameters_of(plan)
        self._left: dict[str, list[Sample]] = {}  # samples that passed through and were not asked for yet
        try:
            self._open(source, precision)
        except BaseException:
            self.close()
            raise

    def _open(self, source: ModelSource, precision: str) -> None:
        import stable_diffusion_cpp

        self._library = stable_diffusion_cpp
        file = self.folder / "model.safetensors"
        write_single_file(source, file, precision=precision, spaced=True)
        try:
            self._model = stable_diffusion_cpp.StableDiffusion(
                model_path=str(file), n_threads=torch.get_num_threads(), wtype=WEIGHTS[precision], rng_type="cpu",
                sampler_rng_type="cpu", vae_decode_only=True, verbose=False,
                prediction=PREDICTIONS[self.scheduler.config.prediction_type],
            )  # fmt: skip
        except ValueError as error:
            raise EngineError(f"stable-diffusion.cpp did not open {source.name!r}: {error}") from error
        file.unlink()  # which it has read

    def __call__(
        self, prompts: Sequence[str], *, num_inference_steps: int, guidance_scale: float,
        generator: Sequence[torch.Generator], height: int, width: int, **_: Any,
    ) -> Any:  # fmt: skip
        """One image of each prompt and generator, whose seed it draws the same noise from: [images, height, width, 3]
        from 0 to 1.
        """
        sigmas = sigmas_of(self.scheduler, num_inference_steps)
        draw = partial(self._draw, sigmas=sigmas, guidance_scale=guidance_scale, size=(height, width))
        drawn = [draw(prompt, seed=one.initial_seed()) for prompt, one in zip(prompts, generator, strict=True)]
        return SimpleNamespace(images=np.stack([np.asarray(image, dtype=np.float32) / 255 for image in drawn]))

    def _draw(
        self, prompt: str, *, seed: int, sigmas: Sequence[float], guidance_scale: float, size: Size,
        tick: Any = lambda *_: None,
    ) -> Image:  # fmt: skip
        """One image; `tick` is called before the first step and after each."""
        try:
            found: list[Image] = self._model.generate_image(
                prompt, height=size[0], width=size[1], cfg_scale=max(guidance_scale, 1.0), sample_method="euler",
                sigmas=",".join(map(repr, sigmas)), sample_steps=len(sigmas) - 1, seed=seed, progress_callback=tick,
            )  # fmt: skip
        finally:  # 0.4.7 keeps a pointer to the callback, which is gone by then, and loading the next model calls it
            self._library.sd_set_progress_callback(self._library.sd_progress_callback(0), None)
        return found[0].convert("RGB")

    def timed(self, request: Request, part: str, count: int, timer: Timer) -> list[Sample]:
        """Samples of a part: those left of an image that was drawn for another part, or of one drawn now.

        For steps an image of `count` steps; else of one step. An image after the other where a call has several.
        """
        if not self._left.get(part):
            steps = count if part == UNET else 1
            images = [self._pass_through(request, steps, timer) for _ in range(request.batch)]
            rows = {name: zip(*(one[name] for one in images), strict=True) for name in images[0]}
            self._left = {name: list(map(together, row)) for name, row in rows.items()}
        return self._left.pop(part)

    def _pass_through(self, request: Request, steps: int, timer: Timer) -> dict[str, list[Sample]]:
        marks = list[tuple[float, float]]()

        def mark(*_: Any) -> None:
            marks.append((timer.clock(), timer.cpu_clock()))

        mark()
        self._draw(
            request.prompts[0], seed=request.seed, sigmas=sigmas_of(self.scheduler, steps),
            guidance_scale=request.run.guidance_scale, size=request.size, tick=mark,
        )  # fmt: skip
        mark()
        spans = [Sample(end[0] - start[0], end[1] - start[1]) for start, end in itertools.pairwise(marks)]
        if len(spans) != steps + 2:
            raise EngineError(f"stable-diffusion.cpp reported {len(marks) - 3} steps of {steps}: try version 0.4.7")
        return {TEXT_ENCODER: spans[:1], UNET: spans[1:-1], VAE_DECODER: spans[-1:]}

    def close(self) -> None:
        """Let go of the model and remove its file."""
        if hasattr(self, "_model"):
            self._model.close()
            del self._model
        super().close()


def open_sdcpp(source: ModelSource, precision: str, device: str, shape: Shape | None) -> SdCppPipeline:
    """stable-diffusion.cpp on a model's weights; raises as `check_model`, EngineError where it does not open them."""
    return SdCppPipeline(source, precision)


def check_model(source: ModelSource) -> Plan:
    """What is written of a model for stable-diffusion.cpp; ModelError for what it would not draw as diffusers does.

    Only configs and scheduler are loaded.
    """
    check_plain(source)
    plan = plan_of(source, spaced=True)
    noise = noise_schedule(load_rest(source).scheduler)
    if other := [f"{key} {noise[key]}" for key, value in NOISE.items() if noise[key] != value]:
        raise ModelError(f"it was trained with {', '.join(other)}, not with Stable Diffusion's noise")
    return plan


def parameters_of(plan: Plan) -> tuple[int, int]:
    """Parameters of the UNet and of all parts that are written."""
    counts = {part.name: sum(map(int, map(np.prod, part.shapes.values()))) for part in plan.parts}
    return counts["unet"], sum(counts.values())


def sigmas_of(scheduler: Any, steps: int) -> list[float]:
    """The noise levels of DDIM (eta 0) or Euler in so many steps, largest first, and the last step's end.

    DDIM's step is Euler's over sigma = sqrt((1 - a) / a), a: alphas_cumprod (DDIM, eq. 14).
    """
    scheduler.set_timesteps(steps)
    if type(scheduler).__name__ == "EulerDiscreteScheduler":
        return [float(sigma) for sigma in scheduler.sigmas]
    alphas = [float(scheduler.alphas_cumprod[timestep]) for timestep in scheduler.timesteps]
    return [((1 - alpha) / alpha) ** 0.5 for alpha in (*alphas, float(scheduler.final_alpha_cumprod))]


def together(samples: Sequence[Sample]) -> Sample:
    """What was timed one after the other, as one."""
    return Sample(sum(one.wall_s for one in samples), sum(one.cpu_s for one in samples))
