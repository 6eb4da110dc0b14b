"""Reads, scans and writes WebDataset tars."""
