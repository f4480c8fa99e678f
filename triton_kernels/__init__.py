"""Triton kernels, imported as ``snn_sparse_plugin.triton_kernels``; its modules need triton installed."""
