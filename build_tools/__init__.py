"""How sgl_comm is built. Used by `setup.py` and by the build backend; never installed."""
