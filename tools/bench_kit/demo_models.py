"""What the ablations on the embedded models share: the teacher, the latents of its lessons, captions to draw."""

from __future__ import annotations

from typing import Any


class Lessons:
    """The teacher, `images` latents that students learn from, and `scenes` captions of each kind; made once."""

    def __init__(self, images: int, scenes: int) -> None:
        from sdkd.distill.data.latents import encode_images, training_size
        from sdkd.models.resolve import load_eager
        from sdkd.toyworld.scenes import DemoImages, held_out_scenes, seen_scenes

        self.pipe = load_eager("demo")
        self.pipe.set_progress_bar_config(disable=True)
        self.latents = encode_images(self.pipe.vae, DemoImages(count=images), size=training_size(self.pipe, None))
        every = {"seen": seen_scenes(), "held_out": held_out_scenes()}
        self.scenes = {  # from all over the lists
            kind: [found[index * len(found) // scenes] for index in range(scenes)] for kind, found in every.items()
        }

    def drawn_by(self, unet: Any) -> Any:
        """A pipeline of the teacher's parts but for the UNet."""
        from diffusers import StableDiffusionPipeline

        pipe = StableDiffusionPipeline(**{**self.pipe.components, "unet": unet}, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        return pipe
