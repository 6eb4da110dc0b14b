"""Loads a checkpoint as a frozen causal language model with its tokenizer, and identifies both."""
