"""Small image sets as spikes, from scikit-learn or files on disk, and recorded spikes from HDF5 files."""

from .coding import latency_spikes
from .images import NAMES, ImageData, load_images
from .spike_files import SpikeFile

__all__ = ["NAMES", "ImageData", "SpikeFile", "latency_spikes", "load_images"]
