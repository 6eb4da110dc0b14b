"""Readers of the kinds of input that `prepare` takes."""
