"""What tests of the compiled operators need."""

from __future__ import annotations

import pytest

from compactmlip.errors import KernelError
from compactmlip.kernels.build import load


@pytest.fixture(scope="session")
def kernels() -> None:
    """Skip where the operators cannot be built."""
    try:
        if load():
            return
    except KernelError as error:
        pytest.skip(f"no compiled kernels: {error}")
    pytest.skip("no compiled kernels")
