"""Exact curvature of a store's layers, and scores with whole gradients."""
