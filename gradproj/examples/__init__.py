"""Examples to run and to copy from: ``python -m gradproj.examples.NAME``."""
