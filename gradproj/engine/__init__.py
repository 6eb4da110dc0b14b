"""Computes per-sample projected gradients of a batch with hooks."""
