"""Command-line tools; each module adds its command to ``python -m sgl_comm``."""
