"""Hugging Face's accelerate: its usual loop, with the model sparse before ``prepare``."""

from __future__ import annotations

import pytest
import torch
from frameworks import whole_torchvision  # noqa: F401

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
pytest.importorskip("snntorch", reason="snnTorch is not installed")

from frameworks.networks import Looping, apart, batch, gradients_of_the_whole_batch, loss_of  # noqa: E402

from snn_sparse_plugin import sparsify  # noqa: E402


def test_its_loop() -> None:
    expected = gradients_of_the_whole_batch()
    accelerator = accelerate.Accelerator(cpu=True)
    model = Looping()
    report = sparsify(model)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(3):  # layers with weights take part from the second or third pass on
        optimizer.zero_grad()
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model(batch())))
    assert apart([p.grad for p in model.parameters()], expected) < 1e-5
    optimizer.step()
    assert report.runs()["net.3"]["fused"] == 3
