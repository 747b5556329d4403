"""Hybrid data parallelism for PyTorch: communication groups made anew for every batch."""
