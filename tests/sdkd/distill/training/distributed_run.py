"""A training run for `accelerate launch`: the first process writes the trained weights and the log to a folder."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3]))


def main(folder: Path, settings: dict[str, Any]) -> None:
    import helpers
    import torch
    from safetensors.torch import save_file

    from sdkd.distill import TrainConfig, train
    from sdkd.distill.data.latents import LatentCache
    from sdkd.students.blocks import build_student

    mean = torch.randn(9, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    data = LatentCache(mean, torch.full_like(mean, 0.1), [f"number {index}" for index in range(9)])
    pipe = helpers.tiny_pipeline()
    done = train(pipe, build_student(pipe.unet, "tiny"), data, TrainConfig(**settings), folder=folder)
    if done.main_process:
        save_file(done.unet.state_dict(), folder / "weights.safetensors")
        (folder / "world").write_text(os.environ.get("WORLD_SIZE", "1"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
