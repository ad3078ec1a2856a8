"""The steps of `scripts/check_gpu.py`, a module each; none is imported before its turn."""
