"""Learning rules that attach to a model from outside."""
