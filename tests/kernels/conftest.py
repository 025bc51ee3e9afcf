"""Kernel tests run in processes of three kinds, as TRITON_INTERPRET is read when triton is imported."""

import os
from importlib.util import find_spec

import pytest

if find_spec("triton") is None:  # there is none for this system
    collect_ignore = ["test_aot.py"]

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what this process can't run."""
    for item in items:
        if item.get_closest_marker("interpret") and not INTERPRETING:
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1"))
        if item.get_closest_marker("aot") and INTERPRETING:
            item.add_marker(pytest.mark.skip(reason="kernels don't compile under TRITON_INTERPRET=1"))


@pytest.fixture(params=["naive", pytest.param("triton", marks=pytest.mark.interpret)])
def impl(request: pytest.FixtureRequest) -> str:
    """Each implementation of an operation, in the process where it runs."""
    return request.param
