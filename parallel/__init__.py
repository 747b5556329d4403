"""Hybrid data parallelism on torch.distributed: channels, engines, planned loaders, exact losses, guards."""
