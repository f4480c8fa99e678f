"""Time-to-first-spike layers: trained like activations, run as a network of single spikes.

Training costs one pass whatever the number of steps; :func:`to_snn` gives the event-level network with the same spike
times. Coding and training methods after Park & Yoon, arXiv 2106.02568.
"""

from ...ops.ttfs import SILENT, Kernel, register_kernel
from .convert import to_ttfs
from .mapping import to_snn
from .network import TTFSNetwork
from .neuron import TTFS, TTFSEncoder, TTFSMaxPool2d, TTFSReadout
from .report import EnergyReference, TTFSReport
from .simulator import TTFSRun
from .training import (
    RelaxationSchedule,
    TTFSBatchNorm1d,
    TTFSBatchNorm2d,
    kernel_parameters,
    kernel_regularization,
    spike_regularization,
    ttfs_loss,
)
from .verify import VerifyReport

__all__ = [
    "SILENT",
    "TTFS",
    "EnergyReference",
    "Kernel",
    "RelaxationSchedule",
    "TTFSBatchNorm1d",
    "TTFSBatchNorm2d",
    "TTFSEncoder",
    "TTFSMaxPool2d",
    "TTFSNetwork",
    "TTFSReadout",
    "TTFSReport",
    "TTFSRun",
    "VerifyReport",
    "kernel_parameters",
    "kernel_regularization",
    "register_kernel",
    "spike_regularization",
    "to_snn",
    "to_ttfs",
    "ttfs_loss",
]


class Plugin:
    """What is registered under ``snn_sparse_plugin.layers``."""

    name = "ttfs"
    layers = (TTFS, TTFSEncoder, TTFSMaxPool2d, TTFSBatchNorm1d, TTFSBatchNorm2d, TTFSReadout)
