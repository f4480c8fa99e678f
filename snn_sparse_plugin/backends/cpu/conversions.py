"""What the core asks of a device, in one place: events of dense spikes and back, and masks of single steps."""

from .counts import count_events, pick_counts
from .events import events_from_dense, share_of_nonzeros
from .masked import fire, passed

__all__ = ["count_events", "events_from_dense", "fire", "passed", "pick_counts", "share_of_nonzeros"]
