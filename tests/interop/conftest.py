"""The Python of the other projects' environment."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from interop_environment import EnvironmentFailedError, interop_python


@pytest.fixture(scope="session")
def python() -> Path:
    """The environment's Python. Without a network a person's run skips; continuous integration (CI is set) fails."""
    try:
        return interop_python()
    except EnvironmentFailedError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"{error} (with CI set this is a failure)")
