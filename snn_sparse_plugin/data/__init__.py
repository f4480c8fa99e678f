"""Small image sets as spikes: scikit-learn's digits, and MNIST or Fashion-MNIST from files on disk."""

from .coding import latency_spikes
from .images import NAMES, ImageData, load_images

__all__ = ["NAMES", "ImageData", "latency_spikes", "load_images"]
