"""``SparseCallback`` in Lightning's trainer, in one process and in two."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from frameworks import whole_torchvision  # noqa: F401

pl = pytest.importorskip("pytorch_lightning", reason="Lightning is not installed")
pytest.importorskip("snntorch", reason="snnTorch is not installed")

from frameworks.networks import Looping, batch, loss_of, network  # noqa: E402
from frameworks.processes import needs_gloo, run  # noqa: E402
from pytorch_lightning.loggers import CSVLogger  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

import snn_sparse_plugin as ssp  # noqa: E402
from snn_sparse_plugin.core import tally  # noqa: E402
from snn_sparse_plugin.lightning import SparseCallback  # noqa: E402


class Module(pl.LightningModule):
    """A tutorial's loop, with nothing of this package in it."""

    def __init__(self, model: torch.nn.Module | None = None) -> None:
        super().__init__()
        self.model = Looping() if model is None else model

    def training_step(self, x: torch.Tensor, index: int) -> torch.Tensor:
        loss = loss_of(self.model(x.transpose(0, 1)))
        self.log("loss", loss)
        return loss

    def test_step(self, x: torch.Tensor, index: int) -> None:
        self.model(x.transpose(0, 1))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        return DataLoader(batch().transpose(0, 1), batch_size=2)

    test_dataloader = train_dataloader


def trainer(folder: Any, *callbacks: Any, **options: Any) -> Any:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    options = {"logger": CSVLogger(folder), "max_epochs": 2, "log_every_n_steps": 1} | quiet | options
    return pl.Trainer(accelerator="cpu", callbacks=list(callbacks), **options)


def trained(folder: Any, *callbacks: Any) -> list[torch.Tensor]:
    module = Module()
    trainer(folder, *callbacks).fit(module)
    return list(module.parameters())


def test_an_unmodified_module_trains_sparse(tmp_path, capsys) -> None:
    callback = SparseCallback(backprop_threshold=None)
    found = trained(tmp_path, callback)
    for mine, upstreams in zip(found, trained(tmp_path / "upstream"), strict=True):
        torch.testing.assert_close(mine, upstreams, rtol=1e-5, atol=1e-7)
    runs = callback.report.runs()
    assert runs["model.net.3"]["fused"] == 4  # two batches in two epochs
    assert "model.net.3  Leaky" in capsys.readouterr().out
    lines = next((tmp_path / "lightning_logs").rglob("metrics.csv")).read_text().splitlines()
    assert {"spike rate/model.net.1", "active/model.net.3", "loss"} <= set(lines[0].split(","))
    assert len(lines) == 5


def test_after_a_run_the_model_is_as_it_was(tmp_path) -> None:
    module, callback = Module(), SparseCallback(print_report=False)
    runner = trainer(tmp_path, callback, max_epochs=1)
    for run_it in (runner.fit, runner.test):
        run_it(module)
        before = tally.by_class()
        module.model(batch())
        assert tally.by_class() == before
    assert callback.report.runs()["model.net.1"]


def test_a_model_that_is_sparse_keeps_its_options_and_stays_sparse(tmp_path, capsys) -> None:
    module = Module()
    ssp.sparsify(module, backprop_threshold=0.123)
    trainer(tmp_path, SparseCallback(), max_epochs=1).fit(module)
    assert "fused 2" in capsys.readouterr().out
    assert ssp.restore(module)


def test_an_error_in_a_step_leaves_nothing_behind(tmp_path) -> None:
    class Broken(Module):
        def training_step(self, x: torch.Tensor, index: int) -> torch.Tensor:
            raise ZeroDivisionError

    module, callback = Broken(), SparseCallback(print_report=False)
    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path, callback).fit(module)
    assert not tally.watchers.all()


def test_what_is_wrong_is_told_where_it_is_written(tmp_path) -> None:
    with pytest.raises(ssp.ConfigError, match="backprop_threshold"):
        SparseCallback(backprop_threshold=-1)
    with pytest.raises(ssp.ConfigError, match="treshold"):
        SparseCallback(backprop_treshold=0.1)
    with pytest.raises(ssp.InputError, match="SparseCallback: Module has no spiking neurons"):
        trainer(tmp_path, SparseCallback()).fit(Module(torch.nn.Linear(12, 5)))
    assert pickle.loads(pickle.dumps(SparseCallback(min_active=0)))._options == {"min_active": 0}


@needs_gloo
def test_two_processes(tmp_path) -> None:
    """Lightning starts the second by running the script again; both end with the weights of the whole batches."""
    script = """
    import torch
    from frameworks import whole_torchvision
    from frameworks.test_lightning import Module, SparseCallback, trainer

    torch.set_num_threads(1)
    callback = SparseCallback(backprop_threshold=None)
    options = {"accelerator": "cpu", "devices": 2, "strategy": "ddp", "use_distributed_sampler": True}
    module = Module()
    run = trainer(".", callback, devices=2, strategy="ddp", max_epochs=1)
    run.fit(module)
    assert callback.report.runs()["model.net.1"]["fused"] == 1  # half of the samples: one batch of two
    torch.save(module.state_dict(), f"weights{run.global_rank}.pt")
    print("rank", run.global_rank, "is done")
    """
    out = run(tmp_path, script)
    assert "rank 0 is done" in out
    assert out.count("model.net.1  Leaky") == 1  # one report, the first process's
    one, two = (torch.load(tmp_path / f"weights{rank}.pt") for rank in (0, 1))
    # without shuffling the first process has samples 0 and 2, the second 1 and 3
    net = network()
    model = Looping()
    model.net = net
    loss_of(model(batch())).backward()
    for name, parameter in model.named_parameters():
        expected = parameter - 0.1 * parameter.grad
        torch.testing.assert_close(one[f"model.{name}"], expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(one[f"model.{name}"], two[f"model.{name}"])
