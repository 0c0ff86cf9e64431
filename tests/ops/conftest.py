"""Every test of an operation runs on its torch reference and on the C++ kernels.

A test that forces a route itself overrides the choice.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from deaddir_fast import _native
from deaddir_fast._backend import backend


@pytest.fixture(autouse=True, params=["reference", "cpu"])
def forced_route(request: pytest.FixtureRequest) -> Iterator[str]:
    """Force the route of the test, or skip it where there is no C++."""
    if request.param == "cpu" and _native.extension is None:
        pytest.skip(f"no C++ here: {_native.why_not}")
    with backend(request.param):
        yield request.param
