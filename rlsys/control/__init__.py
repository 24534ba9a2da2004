"""The training loop and the supervision of its processes. This package imports neither Ray nor torch."""
