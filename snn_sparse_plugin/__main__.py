"""``python -m snn_sparse_plugin`` is ``snn-sparse``."""

from .interfaces.cli import main

if __name__ == "__main__":
    main()
