"""Runnable examples: ``python -m gradproj.examples.NAME``."""
