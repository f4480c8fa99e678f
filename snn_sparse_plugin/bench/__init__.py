"""``snn-sparse bench``: this package against snnTorch, Norse and SpikingJelly, in one alternating run."""

from .runs import BenchOptions, run_network, run_s3gd, run_surrogates, run_sweep

__all__ = ["BenchOptions", "run_network", "run_s3gd", "run_surrogates", "run_sweep"]
