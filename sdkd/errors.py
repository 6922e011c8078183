"""Every error that sdkd raises on purpose: each message says the value, the rule, and what to do."""

from __future__ import annotations


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
    """An optional dependency is not installed; the message names the pip command."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed. "
            f"Install it with: pip install 'sdkd[{extra}]'"
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
