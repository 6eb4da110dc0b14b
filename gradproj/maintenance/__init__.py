"""Inspects, checks, repairs, merges and exports an output directory."""
