"""Layer types registered under ``snn_sparse_plugin.layers``."""
