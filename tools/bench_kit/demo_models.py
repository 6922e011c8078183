"""What measurements of the embedded models share: the teacher, the latents of its lessons, captions to draw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sdkd.core.files import read_json, write_bytes, write_json


def drawn_scenes(count: int) -> list[Any]:
    """Different seen scenes, the same for every benchmark."""
    from sdkd.toyworld.scenes import sample_scenes, seen_scenes

    return sample_scenes(seen_scenes(), count, seed=31)


def drawn_captions(count: int) -> list[str]:
    """Their captions."""
    from sdkd.toyworld.scenes import caption

    return [caption(scene) for scene in drawn_scenes(count)]


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


def kept(path: Path, settings: Any) -> bool:
    """Whether a run of an ablation with these settings (a dataclass) is there."""
    return path.is_file() and bool(read_json(path)["settings"] == asdict(settings))


def write_ablation(
    folder: Path,
    settings: Any,
    made: list[dict[str, Any]],
    plot: Callable[[list[dict[str, Any]], Path], None],
    text: str,
) -> None:
    """Write an ablation's rows with its `settings` (a dataclass), its plot, and its page for people."""
    write_json(folder / "ablation.json", {"schema": 1, "settings": asdict(settings), "rows": made})
    plot(made, folder / "ablation.png")
    write_bytes(folder / "README.md", text.encode())
