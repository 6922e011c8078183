"""Models of a hub: their .safetensors and configurations in the local cache, nothing else of them."""

from __future__ import annotations

from pathlib import Path

from sdkd.errors import ModelError

# Parts that sdkd does not use, so that they are not fetched and may be pickles.
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
_VARIANTS = (None, "fp16")  # full precision where the hub has it


def downloaded(name: str, *, local_only: bool = False) -> Path:
    """Folder of a hub model in the local cache, fetched when it is not there, unless `local_only`.

    ModelError when the model has no .safetensors weights; OSError and others, as the hub's library raises them, when
    there is no such model or no connection.
    """
    from diffusers import DiffusionPipeline

    problem: OSError | None = None
    for variant in _VARIANTS:
        try:
            found = DiffusionPipeline.download(
                name, use_safetensors=True, variant=variant, local_files_only=local_only, **dict.fromkeys(UNUSED)
            )
        except OSError as error:
            if "`safetensors` weights" not in str(error):
                raise
            problem = error
        else:
            return Path(found)
    raise ModelError(
        f"hub model {name!r} has no complete .safetensors weights, and pickles can run code on loading: convert it, "
        f"if you trust its origin, with StableDiffusionPipeline.from_pretrained({name!r}).save_pretrained(FOLDER), "
        "and give the folder"
    ) from problem
