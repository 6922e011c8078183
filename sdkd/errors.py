"""Every error that sdkd raises on purpose: each message says the value, the rule, and what to do."""

from __future__ import annotations

import errno
import os
import re


class SdkdError(Exception):
    """Base of all errors that a user can cause or repair."""


class InputError(SdkdError, ValueError):
    """An argument, prompt, size, file or option is not usable."""


class ModelError(SdkdError, ValueError):
    """A model is missing, unreadable or not SD-shaped."""


class OutputExistsError(SdkdError, FileExistsError):
    """The output is already there and overwriting was not asked for."""


class BusyError(SdkdError, RuntimeError):
    """Another process holds the lock of the same output."""


class MissingExtraError(SdkdError, ImportError):
    """An optional dependency is not installed, or `found` to be damaged; the message names the pip command.

    `first`: a command to run before it.
    """

    def __init__(
        self, package: str, extra: str, purpose: str, found: str = "is not installed", first: str = ""
    ) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which {found}. "
            f"Install it with: {f'{first}, then ' if first else ''}pip install 'sdkd[{extra}]'"
        )
        self.package = package
        self.extra = extra


class TrainingError(SdkdError, RuntimeError):
    """Training cannot go on: a loss is not finite, or too many images cannot be read."""


class InterruptedRunError(KeyboardInterrupt):
    """Ctrl-C ended a run that can be gone on with; the message says how."""


class ExportError(SdkdError, RuntimeError):
    """A component could not be exported to ONNX."""


class ParityError(ExportError):
    """An exported graph or an engine does not agree with PyTorch."""


class NamesError(ParityError):
    """Tensor names differ from the contract."""


class AxesError(ParityError):
    """An axis that must be dynamic is static, or the other way round."""


class ShapesError(ParityError):
    """An output shape differs from PyTorch's."""


class ValuesError(ParityError):
    """Output values differ from PyTorch's by more than the tolerance, or are not finite."""


class BuildError(SdkdError, RuntimeError):
    """An engine could not be built."""


class NotFasterError(BuildError):
    """An engine of eight bits was built and is not faster than the half precision of its target, so it was not kept."""


class BundleError(SdkdError, ValueError):
    """A bundle folder is missing, damaged or of an unknown schema."""


class StaleEngineError(BundleError):
    """An engine was built from other weights, by another version or for another device."""


class EngineError(SdkdError, RuntimeError):
    """An engine could not be loaded or run."""


class OutOfMemoryError(EngineError):
    """Memory of the GPU or the host ran out while an engine was opened, run or given other weights."""


class RangeError(EngineError, ValueError):
    """A request lies outside the shapes that the engine was built for."""


class RegressionError(SdkdError, RuntimeError):
    """A subject is slower than in an earlier report by more than the threshold, or its images became wrong."""


_ALREADY = "nothing half-written was kept"
# What the operating system refuses, for what is called `it` below: the rule, and what to do.
_SYSTEM: dict[int, str] = {
    errno.ENOSPC: f"the disk is full{{while}}: free some space and run the command again; {_ALREADY}",
    errno.EDQUOT: f"the disk quota is used up{{while}}: free some space and run the command again; {_ALREADY}",
    errno.EACCES: "no permission for {it}: choose another folder or change its rights",
    errno.EPERM: "no permission for {it}: choose another folder or change its rights",
    errno.EROFS: "{it} is on a read-only file system: choose another folder",
    errno.EISDIR: "{it} is a folder, and a file is wanted: give a file's name",
    errno.ENOTDIR: "{it} is no folder, or lies below a file: give another name",
    errno.ENAMETOOLONG: "{it} has too long a name: give a shorter one",
    errno.ENOENT: "{it} does not exist: look at the name, or make it again",
    errno.EEXIST: "{it} is there already: choose another name",
    errno.EBUSY: "{it} is in use by the system (a mount point?): choose another folder",
    errno.EIO: "the disk answers with errors{while}: look at the system's log, and use another one",
    errno.EMFILE: "too many files are open: raise the limit (ulimit -n) and run the command again",
    errno.ENOMEM: "the memory is full: close other programs, or ask for fewer images, a smaller size or batch",
}
# How the libraries that give no number spell the same: safetensors, onnxruntime, protobuf.
_SPELLED = {os.strerror(number).lower(): number for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)}


def an(name: str) -> str:
    """A name, such as a class's, behind its article: a UNet2DConditionModel, an AutoencoderKL."""
    return f"{'an' if name[:1] in tuple('AEIOaeio') else 'a'} {name}"


def in_words(error: BaseException) -> str | None:
    """The one message that a user sees of an error, or None when it is a bug of ours."""
    if isinstance(error, SdkdError):
        return str(error)
    if isinstance(error, OSError) and error.errno in _SYSTEM:
        return _of_system(error.errno, error.filename)
    spelled = re.search(r"\(os error (\d+)\)", str(error))
    number = int(spelled[1]) if spelled else next((n for text, n in _SPELLED.items() if text in str(error).lower()), 0)
    if number in _SYSTEM:
        return _of_system(number, getattr(error, "filename", None))
    return _of_kind(error)


def one_line(error: BaseException) -> str:
    """As `in_words`, and of a bug its type and text: the reason of a row or note, without line breaks."""
    return " ".join((in_words(error) or f"{type(error).__name__}: {error}").split())


def _of_system(number: int, name: object) -> str:
    known = name is not None and not isinstance(name, int)
    it = repr(os.fsdecode(name)) if isinstance(name, str | bytes | os.PathLike) else "a file"
    return _SYSTEM[number].format(**{"it": it, "while": f" while writing {it}" if known else ""})


def _of_kind(error: BaseException) -> str | None:
    name, said = type(error).__name__, " ".join(str(error).split())
    if isinstance(error, OSError):
        return f"{said or name}: look at the file or connection, and run the command again"
    if name == "SafetensorError":
        return f"a .safetensors file cannot be read or written ({said}): restore it or make it again"
    if isinstance(error, MemoryError) or name == "OutOfMemoryError" or "can't allocate memory" in said:
        return _SYSTEM[errno.ENOMEM] + (f" ({said})" if said else "")
    if isinstance(error, RecursionError):
        return "something that was given is nested too deeply: look at the JSON and YAML files of model and data"
    if isinstance(error, UnicodeDecodeError):
        return f"a text is not {error.encoding} (byte {error.start}: {error.reason}): save the file as UTF-8"
    if isinstance(error, UnicodeError):
        return f"a text cannot be written here ({said}): set PYTHONIOENCODING=utf-8, or take the character out"
    return None
