"""What the backend says it can do, and why not; needs no device."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from snn_sparse_plugin.backends import select
from snn_sparse_plugin.backends.triton import TritonBackend
from snn_sparse_plugin.core.dynamics import NeuronSpec
from snn_sparse_plugin.core.errors import UnsupportedError
from snn_sparse_plugin.core.surrogates import Surrogate
from snn_sparse_plugin.triton_kernels import OLDEST

CALL = {
    "device": torch.device("cuda"),
    "dtype": torch.float32,
    "spec": NeuronSpec(),
    "surrogate": Surrogate("atan", (2.0,)),
}


@pytest.mark.parametrize(
    ("op", "change", "reason"),
    [
        ("convolution", {}, "no op 'convolution'"),
        ("spiking_layer", {"device": torch.device("meta")}, "not on meta"),
        ("spiking_layer", {"dtype": torch.float16}, "not in torch.float16"),
        ("spiking_layer", {"surrogate": Surrogate("custom", function=torch.sigmoid)}, "sigmoid"),
        (
            "spiking_layer",
            {"spec": NeuronSpec(reset="none", spiking=False), "recurrent": True},
            "a readout has none",
        ),
    ],
    ids=["op", "device", "dtype", "surrogate", "recurrent readout"],
)
def test_refuses_with_a_reason(op, change, reason):
    ok, why = TritonBackend().supports(op, **(CALL | change))
    assert not ok
    assert reason in why


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("recurrent", [False, True], ids=["feed-forward", "recurrent"])
def test_supports_the_family_on_cuda(dtype, recurrent):
    assert TritonBackend().supports("spiking_layer", **(CALL | {"dtype": dtype}), recurrent=recurrent) == (
        True,
        "",
    )


@pytest.mark.skipif(
    torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1", reason="the backend can run here"
)
def test_asked_for_by_name_without_a_device_it_raises():
    assert not TritonBackend().available()[0]
    with pytest.raises(UnsupportedError, match="'triton' cannot run"):
        select("triton", "spiking_layer", **(CALL | {"device": torch.device("cpu")}))


def test_importing_the_backend_leaves_triton_alone():
    code = "import sys, snn_sparse_plugin.backends.triton; print('triton' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("file", "claim"),
    [
        ("pyproject.toml", r'^triton = \["triton>=(\d+)\.(\d+)'),
        ("Makefile", r"^TRITON_VERSIONS \?= (\d+)\.(\d+)"),
    ],
)
def test_every_place_claims_the_same_oldest_triton(file, claim):
    found = re.search(claim, (Path(__file__).parents[2] / file).read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    assert tuple(map(int, found.groups())) == OLDEST
