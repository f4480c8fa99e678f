"""One thread for these tests: their tensors are so small that a second one only waits."""

import pytest
from helpers import torch_threads


@pytest.fixture(autouse=True, scope="package")
def _one_thread():
    with torch_threads(1):
        yield
