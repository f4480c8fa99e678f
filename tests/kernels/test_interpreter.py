"""The kernels on CPU tensors; TRITON_INTERPRET=1 must be set before they are imported."""

import os

import pytest

pytest.importorskip("triton.language", reason="the triton extra is not installed")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 in the environment", allow_module_level=True)

import torch
from eprop_scan_cases import ScanTests
from eprop_step_cases import StepTests
from equation_cases import EquationTests
from half_cases import HalfTests
from layer_cases import LayerTests
from product_cases import ProductTests
from ttfs_cases import TtfsTests
from ttfs_event_cases import TtfsEventTests


@pytest.mark.triton_interpreter
class TestInterpreter(LayerTests):
    device = "cpu"


@pytest.mark.triton_interpreter
class TestEquations(EquationTests):
    device = "cpu"


@pytest.mark.triton_interpreter
class TestHalf(HalfTests):
    device = "cpu"


@pytest.mark.triton_interpreter
class TestTtfs(TtfsTests):
    device = "cpu"
    backend = "triton"
    truncates = (torch.bfloat16,)  # as the interpreter does


@pytest.mark.triton_interpreter
class TestTtfsEvents(TtfsEventTests):
    device = "cpu"


@pytest.mark.triton_interpreter
class TestEPropScan(ScanTests):
    device = "cpu"


@pytest.mark.triton_interpreter
class TestEPropStep(StepTests):
    device = "cpu"


@pytest.mark.triton_interpreter
class TestProducts(ProductTests):
    device = "cpu"
