"""``python -m snn_sparse_plugin`` is ``snn-sparse``."""

from .cli import main

if __name__ == "__main__":
    main()
