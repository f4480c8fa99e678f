"""A study: what of the publication's section 3 is asked for on one data set, and where its results are kept."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.config import check_device
from ..core.errors import ConfigError
from ..files import reading
from .settings import Settings


@dataclass(frozen=True)
class Study:
    """What is studied, and where it goes.

    Args:
        settings: network and training.
        root: folder of the data's files.
        out: folder of logs, checkpoints, results and the report.
        seeds: of weights and batches, all different; each is trained sparse and dense.
        samples: training samples, 0 for all.
        title: the data's name in the report.
        sizes: N of the sweep over hidden size. ``thresholds``: B_th of that sweep. ``deep``: layers and N of the deep
            network. ``sweep_epochs``: how long the networks of the sweeps are trained.
        rounds: alternating rounds of a time, at most. ``budget``: seconds after which a row gets fewer of them.
        device, threads: where it runs; 0 threads leaves torch's choice.
    """

    settings: Settings
    out: Path
    root: Path | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    samples: int = 0
    title: str | None = None
    sizes: tuple[int, ...] = (100, 200, 400, 600, 800, 1000)
    thresholds: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4, 0.8)
    deep: tuple[int, int] = (5, 300)
    sweep_epochs: int = 1
    rounds: int = 7
    budget: float = 20.0
    device: str = "cpu"
    threads: int = 0

    def __post_init__(self) -> None:
        if not self.seeds or not self.sizes or not self.thresholds:
            raise ConfigError("seeds, sizes and thresholds need at least one entry.")
        if len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"each seed is one network, got seeds {', '.join(map(str, self.seeds))}.")
        if not all(threshold > 0 for threshold in self.thresholds):
            raise ConfigError(f"thresholds must be > 0, got {', '.join(map(str, self.thresholds))}.")
        if min(self.rounds, self.sweep_epochs, *self.sizes, *self.deep) < 1 or self.samples < 0:
            raise ConfigError("rounds, sweep epochs and sizes must be at least 1, samples at least 0.")
        check_device(self.device)

    def path(self, part: str) -> Path:
        """The file of a part's results."""
        return self.out / f"{part}.json"

    def results(self, part: str) -> dict[str, Any] | None:
        """What a part found, with the ``conditions`` it was done under, or None where it is not done."""
        path = self.path(part)
        if not path.is_file():
            return None
        with reading(path, "a part's results", "Delete it."):
            found = json.loads(path.read_text())
            if not isinstance(found["conditions"]["settings"]["data"], str):
                raise ValueError("its conditions are not those of a study")
            return {key: found[key] for key in ("request", "conditions", "result")}
