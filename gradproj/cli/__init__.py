"""Command-line front ends: flags in, text out. No other package imports this one."""
