"""Data as spike events: images in a latency code, recordings of spikes and of event cameras, and batches of them."""

from .batches import collate, loader
from .coding import latency_spikes
from .dataset import SpikeDataset
from .images import NAMES, ImageData, load_images
from .official import check_files
from .recordings import from_tonic
from .sets import SETS, SpikeData, load_spikes
from .spike_files import SpikeFile

__all__ = [
    "NAMES",
    "SETS",
    "ImageData",
    "SpikeData",
    "SpikeDataset",
    "SpikeFile",
    "check_files",
    "collate",
    "from_tonic",
    "latency_spikes",
    "load_images",
    "load_spikes",
    "loader",
]
