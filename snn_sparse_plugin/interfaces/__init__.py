"""What people touch: the command line, notebooks, pytest, the demo."""
