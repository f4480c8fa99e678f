"""What :class:`~snn_sparse_plugin.core.spikes.SpikeTrain` asks of a device, in one place."""

from .counts import count_events, pick_counts
from .events import events_from_dense

__all__ = ["count_events", "events_from_dense", "pick_counts"]
