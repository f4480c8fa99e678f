"""Fused operations with autograd: one folder per op, its reference beside it."""

from .spiking_conv import spiking_conv
from .spiking_layer import SpikingLayerOutput, spiking_layer

__all__ = ["SpikingLayerOutput", "spiking_conv", "spiking_layer"]
