"""E-prop: an online learning rule for spiking networks (Bellec et al., Nat. Commun. 11:3625, 2020)."""

from .detached import detached
from .lsnn import LSNN, LeakyReadout, LSNNNetwork, LSNNState

__all__ = ["LSNN", "LSNNNetwork", "LSNNState", "LeakyReadout", "detached"]
