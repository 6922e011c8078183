"""The same pipeline calls in two environments: eager diffusers beside the tests, Optimum in .venv-interop.

The tests import `draw`; Optimum's environment runs this file: `python optimum_calls.py '<JSON of a request>'`, where a
request has `bundle`, `output` (an .npz), `calls`, `size`, `latents` and `io_binding`. Our packages are not there.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

PROMPT = "a red circle on a blue background"
TEXTS = (PROMPT, "A RED Circle,  très joli!", "", "12 o'clock & <|endoftext|>", "a circle " * 60, "a <shape>, it is")


@dataclass(frozen=True)
class Call:
    """A pipeline's class, what it is called with, and how many images of which shape it draws."""

    kind: str
    options: dict[str, Any]
    images: int = 1
    wide: bool = False


CALLS = {
    "guided": Call("StableDiffusionPipeline", {"guidance_scale": 5.0}),
    "unguided": Call("StableDiffusionPipeline", {"guidance_scale": 1.0}),
    "two wide images": Call("StableDiffusionPipeline", {"guidance_scale": 5.0}, 2, wide=True),
    "image to image": Call("StableDiffusionImg2ImgPipeline", {"guidance_scale": 5.0, "strength": 0.7}),
    "inpainting": Call("StableDiffusionInpaintPipeline", {"guidance_scale": 5.0, "strength": 1.0}),
}
_SIZES = {"original_size": (64, 96), "crops_coords_top_left": (8, 0), "prompt_2": "a blue ring"}
XL_CALLS = {
    "xl guided": Call("StableDiffusionXLPipeline", {"guidance_scale": 5.0, **_SIZES}),
    "xl two wide images": Call("StableDiffusionXLPipeline", {"guidance_scale": 5.0, "clip_skip": 0}, 2, wide=True),
    "xl image to image": Call("StableDiffusionXLImg2ImgPipeline", {"guidance_scale": 5.0, "strength": 0.7}),
}
EVERY = CALLS | XL_CALLS


def draw(pipe: Any, name: str, size: int, latents: int) -> Any:
    """Images [count, height, width, 3] in 0..1 of a call, whose noise and pictures are the same everywhere.

    `size` is the image's in pixels, `latents` that of its latents.
    """
    call, random = EVERY[name], np.random.default_rng(0)
    scale = size // latents
    tall, wide = (latents, latents * 3 // 2) if call.wide else (latents, latents)
    options: dict[str, Any] = dict(call.options, prompt=[PROMPT] * call.images, num_inference_steps=4, output_type="np")
    noise = torch.from_numpy(random.standard_normal((call.images, 4, tall, wide), dtype=np.float32))
    picture = torch.from_numpy(random.random((1, 3, tall * scale, wide * scale), dtype=np.float32))
    if "Img2Img" not in call.kind:
        options |= {"latents": noise.to(pipe.unet.dtype), "height": tall * scale, "width": wide * scale}
    if "Img2Img" in call.kind or "Inpaint" in call.kind:
        options |= {"image": picture, "generator": torch.Generator().manual_seed(0)}
    if call.kind == "StableDiffusionInpaintPipeline":
        options["mask_image"] = (picture[:, :1] > 0.5).float()
    pipe.set_progress_bar_config(disable=True)
    return pipe(**options).images


def main(request: dict[str, Any]) -> None:
    """Draw every call with Optimum and keep the images, and the tokens that its tokenizer makes, in one .npz."""
    import optimum.onnxruntime

    found: dict[str, Any] = {}
    for name in request["calls"]:
        kind = getattr(optimum.onnxruntime, f"ORT{EVERY[name].kind}")
        pipe = kind.from_pretrained(request["bundle"], use_io_binding=request["io_binding"])
        found[name] = draw(pipe, name, request["size"], request["latents"])
        found["tokens"] = np.array(tokens(pipe.tokenizer))
    np.savez(Path(request["output"]), **found)


def tokens(tokenizer: Any) -> list[list[int]]:
    """Token ids of a few texts, as pipelines ask for them."""
    return [list(tokenizer(text, padding="max_length", truncation=True).input_ids) for text in TEXTS]


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
