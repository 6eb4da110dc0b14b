"""Evaluates attribution scores against retraining: LDS, leave-out, retrieval."""
