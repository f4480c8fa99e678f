"""What older Tritons lack to compile for a device that is not there."""

import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

try:
    TRITON = tuple(map(int, version("triton").split(".")[:2]))
except PackageNotFoundError:
    TRITON = None

# Before 3.5 Triton leaves the last step of an AMD binary to ROCm's linker. The object is compiled by then,
# which is all that a test without a device asks for.
if TRITON is not None and TRITON < (3, 5) and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_HIP_LLD_PATH", str(Path(__file__).with_name("copy_instead_of_linking.sh")))


def pytest_collection_modifyitems(items):
    if TRITON is None or TRITON >= (3, 3):
        return
    skip = pytest.mark.skip(reason="Triton 3.2 bundles no assembler for sm_100")
    for item in items:
        if getattr(item, "callspec", None) and item.callspec.params.get("target") == "sm_100":
            item.add_marker(skip)
