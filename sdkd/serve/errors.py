"""What a server answers when it cannot do what was asked: the error's own words, and an HTTP status."""

from __future__ import annotations

from http import HTTPStatus

from sdkd.errors import (
    BundleError,
    EngineError,
    InputError,
    MissingExtraError,
    ModelError,
    OutOfMemoryError,
    SdkdError,
    in_words,
)

CLIENT_GONE = 499  # nginx's number for it; nobody reads it


class RefusedError(SdkdError):
    """A request that is not drawn, with the status of its answer."""

    status: int = HTTPStatus.BAD_REQUEST


class UnknownNameError(RefusedError):
    """A model, LoRA or job that is not there."""

    status = HTTPStatus.NOT_FOUND


class ForbiddenError(RefusedError):
    """A request that a page of another site made, or that names another host."""

    status = HTTPStatus.FORBIDDEN


class UnauthorizedError(RefusedError):
    """A request without the key."""

    status = HTTPStatus.UNAUTHORIZED


class TooLargeError(RefusedError):
    """A body or an image beyond the limit."""

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE


class TooSlowError(RefusedError):
    """A body that does not arrive."""

    status = HTTPStatus.REQUEST_TIMEOUT


class QueueFullError(RefusedError):
    """More images wait than may."""

    status = HTTPStatus.TOO_MANY_REQUESTS


class StoppingError(RefusedError):
    """The server is about to end."""

    status = HTTPStatus.SERVICE_UNAVAILABLE


class CancelledJobError(RefusedError):
    """Somebody took the request back."""

    status = CLIENT_GONE


class WorkerError(RefusedError):
    """The process that drew it died, or a library failed in it."""

    status = HTTPStatus.INTERNAL_SERVER_ERROR


# The first row that an error is of counts.
_STATUS: tuple[tuple[type[BaseException], int], ...] = (
    (OutOfMemoryError, HTTPStatus.SERVICE_UNAVAILABLE),
    (BundleError, HTTPStatus.SERVICE_UNAVAILABLE),  # stale or damaged since the server was started
    (MissingExtraError, HTTPStatus.BAD_REQUEST),
    (InputError, HTTPStatus.BAD_REQUEST),
    (ModelError, HTTPStatus.BAD_REQUEST),
    (EngineError, HTTPStatus.BAD_REQUEST),
)


def status_of(error: BaseException) -> int:
    """The HTTP status of an error: of a refusal its own, 400 for what a request asks wrongly, else 500."""
    if isinstance(error, RefusedError):
        return int(error.status)
    return int(next((status for kind, status in _STATUS if isinstance(error, kind)), 500))


def answer(error: BaseException, status: int | None = None) -> dict[str, object]:
    """The JSON of an error answer, in the forms that OpenAI's and A1111's clients read."""
    message = in_words(error) or "the server failed at this request; its log says where"
    code = status_of(error) if status is None else status
    return {"error": {"message": message, "type": type(error).__name__, "code": code}, "detail": message}
