"""What the core asks of a device, in one place: events of dense spikes and back, and masks of single steps."""

from .counts import count_events, pick_counts
from .events import SMALLEST, events_from_dense, few_events, share_of_nonzeros
from .masked import fire, passed

__all__ = [
    "SMALLEST",
    "count_events",
    "events_from_dense",
    "few_events",
    "fire",
    "passed",
    "pick_counts",
    "share_of_nonzeros",
]
