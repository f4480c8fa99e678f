"""What the core asks of a device, in one place: events of dense spikes and back, and masks of single steps."""

from .counts import count_events, pick_counts
from .events import events_from_dense
from .masked import keep, passed

__all__ = ["count_events", "events_from_dense", "keep", "passed", "pick_counts"]
