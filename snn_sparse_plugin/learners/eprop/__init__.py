"""E-prop: an online learning rule for spiking networks (Bellec et al., Nat. Commun. 11:3625, 2020).

Example:
    >>> import torch
    >>> from snn_sparse_plugin.learners import eprop
    >>> net = eprop.LSNNNetwork(3, 5, 2)
    >>> with eprop.EProp(net) as learner:
    ...     result = learner.run(torch.ones(7, 1, 3), lambda y, target: (y - target).square().sum(), 1.0)
    >>> result.steps
    7
"""

from .detached import detached
from .learner import EProp
from .lsnn import LSNN, LSNNState
from .network import LeakyReadout, LSNNNetwork
from .options import FiringRate
from .sequence import RunResult

__all__ = [
    "LSNN",
    "EProp",
    "FiringRate",
    "LSNNNetwork",
    "LSNNState",
    "LeakyReadout",
    "RunResult",
    "detached",
]


def plugin() -> type[EProp]:
    """What the entry point ``eprop`` of the group ``snn_sparse_plugin.learners`` gives: the learner's class."""
    return EProp
