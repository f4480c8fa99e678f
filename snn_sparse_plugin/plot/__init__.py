"""Pictures drawn without a display: recorded activity, rasters of spikes, time-to-first-spike networks."""

from .demo import demo_figure
from .spikes import activity, raster
from .ttfs import ttfs_kernels, ttfs_preactivations, ttfs_spike_times

__all__ = ["activity", "demo_figure", "raster", "ttfs_kernels", "ttfs_preactivations", "ttfs_spike_times"]
