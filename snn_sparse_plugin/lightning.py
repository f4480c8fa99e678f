"""``SparseCallback``: sparse mode, activity and the report in a Lightning ``Trainer``."""

from __future__ import annotations

from typing import Any

from .activity import record_activity
from .adapters import MARK
from .core.config import SparseConfig, current_config
from .core.errors import InputError, MissingDependencyError
from .mode import SparsityReport, restore, sparsify

try:
    try:
        from lightning.pytorch import Callback
    except ModuleNotFoundError:
        from pytorch_lightning import Callback
except ImportError as error:
    raise MissingDependencyError(
        "SparseCallback is a callback of Lightning: pip install pytorch-lightning"
    ) from error
except RuntimeError as error:
    if "torchvision" not in str(error):
        raise
    raise MissingDependencyError(
        f"Lightning imports torchvision, and the one that is installed was built for another torch ({error}): "
        "install both from the same index."
    ) from error

__all__ = ["SparseCallback"]


class SparseCallback(Callback):  # type: ignore[misc]  # of either distribution
    """Makes the neurons of an unmodified ``LightningModule`` sparse while a trainer runs it, and tells what they do.

    Spike rate and active share of each layer go to the trainer's logger, at the training steps whose metrics it logs
    (``log_every_n_steps``). The report is printed when ``fit`` ends. With several processes each counts its own
    part of the batch, and what is logged and printed is the first one's.

    A model that is sparse already (``sparsify``) stays as it is, with its own options, unless some are given here.

    Args:
        print_report: print the report at the end of ``fit``.
        **options: of :class:`~snn_sparse_plugin.SparseConfig`.

    Attributes:
        report: the :class:`~snn_sparse_plugin.SparsityReport` of the last run.

    Raises:
        ConfigError: an unknown option or a value outside its range.
        InputError: when the trainer starts: a model without neurons of a supported library.

    Example:
        >>> import torch, snntorch, pytorch_lightning as pl
        >>> from snn_sparse_plugin.lightning import SparseCallback
        >>> trainer = pl.Trainer(max_epochs=3, callbacks=[SparseCallback(backprop_threshold=0.2)])
    """

    report: SparsityReport | None = None

    def __init__(self, *, print_report: bool = True, **options: Any) -> None:
        SparseConfig().updated(**options)  # a wrong one is told here, not in the middle of a run
        self._print, self._options = print_report, options
        self._began = self._marked = False
        self._recording: Any = None

    # after setup() and configure_model(), which may build the network, in each process
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self._begin(pl_module)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._begin(pl_module)

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        self._begin(pl_module)

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        self._begin(pl_module)

    def _begin(self, model: Any) -> None:
        if self._began:
            return
        already = any(hasattr(module, MARK) for module in model.modules())
        if self._options or not already:
            report = sparsify(model, **self._options)
            self._marked = not already
        else:
            report = SparsityReport((), current_config()).of(model)
        if not report.entries:
            raise InputError(
                f"SparseCallback: {type(model).__name__} has no spiking neurons of a supported library."
            )
        self.report, self._began = report, True

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.loggers:
            self._recording = record_activity(pl_module)
            self._log = self._recording.__enter__()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._recording is not None:
            self._stop()
            pl_module.log_dict(self._log.scalars())

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        if self._print and trainer.is_global_zero:
            print(self.report)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._stop()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._stop()
        if self._marked:
            restore(pl_module)
        self._began = self._marked = False

    def _stop(self) -> None:
        recording, self._recording = self._recording, None
        if recording is not None:
            recording.__exit__(None, None, None)
