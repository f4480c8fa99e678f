"""Triton kernels, imported as ``snn_sparse_plugin.triton_kernels``; its modules need triton installed."""

# the oldest Triton that compiles every kernel; pyproject.toml and the Makefile say the same, and a test compares them
OLDEST = (3, 4)
