"""Fused operations with autograd: one folder per op, its reference beside it."""

from .spiking_layer import SpikingLayerOutput, spiking_layer

__all__ = ["SpikingLayerOutput", "spiking_layer"]
