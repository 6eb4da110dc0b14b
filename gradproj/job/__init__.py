"""Runs one rank of the job, from its flags to its commits."""
