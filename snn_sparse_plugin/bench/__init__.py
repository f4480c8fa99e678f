"""``snn-sparse bench``: this package against snnTorch, Norse and SpikingJelly, in one alternating run."""

from .runs import (
    CONVOLUTIONAL,
    BenchOptions,
    run_conv,
    run_conv_sweep,
    run_network,
    run_s3gd,
    run_surrogates,
    run_sweep,
)

__all__ = [
    "CONVOLUTIONAL",
    "BenchOptions",
    "run_conv",
    "run_conv_sweep",
    "run_network",
    "run_s3gd",
    "run_surrogates",
    "run_sweep",
]
