"""What holds an engine: closed at the end of a `with`, and never copied."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from engines.refusals import COPIES
from sdkd.errors import EngineError


class Closing:
    """A context manager that closes what it stands for."""

    def close(self) -> None:
        """Release what is held."""
        raise NotImplementedError

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise EngineError(
            f"{type(self).__name__} {COPIES}: open another with engines.session.open_session(bundle, slot, component)"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
