"""What a model's name turned out to mean, and how the libraries' errors on it are told."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sdkd.errors import ModelError

Kind = Literal["folder", "hub", "single-file", "bundle", "checkpoint", "demo", "random"]


@dataclass(frozen=True)
class ModelSource:
    """A model's name as given, what kind of name it is, where its files are (None: hub, random), and its weights.

    `notes` are what a user should know, such as how it is known what a single file predicts.
    """

    name: str
    kind: Kind
    path: Path | None = None
    random_weights: bool = False
    notes: tuple[str, ...] = ()


@contextlib.contextmanager
def as_model_error(source: ModelSource) -> Iterator[None]:
    """Turn the libraries' errors on a damaged or unreachable model into one that names it and says what to do."""
    from safetensors import SafetensorError

    try:
        yield
    except ModelError:
        raise
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"model {source.name!r} could not be loaded ({reason}): {_ADVICE[source.kind]}") from error


_ADVICE: dict[Kind, str] = {
    "folder": "its files are damaged or incomplete; save or download it again",
    "demo": "install sdkd again",
    "bundle": "give the original model instead",
    "checkpoint": "its files are damaged or incomplete; give another checkpoint",
    "random": "give another name",
    "hub": (
        "there is no such folder here, and the hub did not give it; check the spelling and the network, or download it "
        "elsewhere with `hf download` and give the folder"
    ),
    "single-file": "the file is damaged or incomplete; download it again",
}
