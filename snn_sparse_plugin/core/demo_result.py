"""What ``snn-sparse demo`` was told and what it found: its maker, its table and its picture share it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class DemoOptions:
    """What ``snn-sparse demo`` can be told."""

    data: str = "digits"
    root: Path | None = None
    library: str = "snntorch"
    epochs: int = 8
    samples: int = 6000
    steps: int = 100
    batch: int = 64
    hidden: int = 200
    seed: int = 0
    threads: int = 0
    out: Path = Path("demo.png")


@dataclass
class Activity:
    """Per layer, in the course of training: spikes, and neurons near threshold, per neuron-step."""

    spikes: list[list[float]] = field(default_factory=list)
    active: list[list[float]] = field(default_factory=list)


@dataclass
class Training:
    """One trained network: test accuracy after each epoch, step time in ms, bytes kept for backward."""

    accuracy: list[float] = field(default_factory=list)
    step_ms: float = 0.0
    saved_bytes: int = 0


@dataclass
class DemoResult:
    """What the demo found. ``raster``: times, neurons and their number, of input and spiking layers."""

    options: DemoOptions
    sparse: Training
    dense: Training
    activity: Activity
    raster: list[tuple[list[int], list[int], int]]
    label: int

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        options = asdict(self.options) | {"root": self.options.root and str(self.options.root)}
        return {
            "options": options | {"out": str(self.options.out)},
            "sparse": asdict(self.sparse),
            "dense": asdict(self.dense),
            "activity": asdict(self.activity),
            "step_ratio": self.dense.step_ms / self.sparse.step_ms,
            "saved_ratio": self.dense.saved_bytes / max(1, self.sparse.saved_bytes),
        }
