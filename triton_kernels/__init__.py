"""Triton kernels. Import them as ``snn_sparse_plugin.triton_kernels``; importing this package needs triton."""
