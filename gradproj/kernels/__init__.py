"""Tensor kernels and device helpers that know nothing of gradproj."""
