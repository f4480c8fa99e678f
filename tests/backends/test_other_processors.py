"""Kernels for a processor that numba is told to compile for, as in a cache that several machines share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import torch
from snn_sparse_plugin.backends.cpu import bits
from snn_sparse_plugin.core.dynamics import NeuronParams
from snn_sparse_plugin.core.spikes import SpikeTrain
from snn_sparse_plugin.ops import spiking_layer

torch.manual_seed(0)
x = (torch.rand(9, 3, 70) < 0.2).float()
train = SpikeTrain.from_dense(x)
assert torch.equal(train.to_dense(), x)
weight = (torch.randint(-32, 33, (40, 70)) / 64).requires_grad_()
found = []
for backend in ("cpu", "reference"):
    options = {"params": NeuronParams(0.5), "backend": backend, "backprop_threshold": 0.1, "min_active": 0.0}
    found.append(spiking_layer(x, weight, return_mem=True, events=backend == "cpu", **options))
compiled, expected = found
assert torch.equal(compiled.spikes.detach().to_dense(), expected.spikes)
assert torch.equal(compiled.mem, expected.mem)
assert compiled.active_fraction == expected.active_fraction > 0
print("avx512" if bits.HAS_AVX512 else "plain")
"""


@pytest.mark.parametrize(
    "chosen",
    [
        {"NUMBA_CPU_NAME": "generic"},
        {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "+sse4.2"},
    ],
    ids=["generic", "features"],
)
def test_no_kernel_takes_what_such_a_processor_lacks(chosen: dict[str, str], tmp_path: Path) -> None:
    environment = {**os.environ, **chosen, "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", PROGRAM]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.strip() == "plain"
