"""Command-line tools; ``python -m sgl_comm`` imports the one that is asked for."""
