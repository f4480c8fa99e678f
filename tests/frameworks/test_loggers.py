"""Activity for any logger: flat names and numbers."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("snntorch", reason="snnTorch is not installed")

from frameworks.networks import Unrolling, batch, loss_of

import snn_sparse_plugin as ssp


def recorded(model: torch.nn.Module) -> ssp.ActivityLog:
    ssp.sparsify(model, backprop_threshold=0.2, min_active=0)
    with ssp.record_activity(model) as log:
        loss_of(model(batch())).backward()
    return log


def test_scalars_are_the_means() -> None:
    log = recorded(Unrolling())
    assert log.scalars() == {
        f"{what}/{name}": share
        for name, shares in log.mean().items()
        for what, share in zip(("spike rate", "active"), shares, strict=True)
    }
    assert len(log.scalars()) == 4


def test_what_is_not_known_is_left_out() -> None:
    model = Unrolling()
    ssp.sparsify(model)
    with ssp.record_activity(model) as log:
        assert log.scalars() == {}
        with torch.no_grad():
            model(batch())
    assert sorted(log.scalars()) == ["spike rate/net.1", "spike rate/net.3"]


def test_tensorboard(tmp_path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scalars = recorded(Unrolling()).scalars()
    with tensorboard.SummaryWriter(str(tmp_path)) as writer:
        for name, value in scalars.items():
            writer.add_scalar(name, value, 7)
    events = EventAccumulator(str(tmp_path)).Reload()
    for name, value in scalars.items():
        (event,) = events.Scalars(name)
        assert event.step == 7
        assert event.value == pytest.approx(value)
