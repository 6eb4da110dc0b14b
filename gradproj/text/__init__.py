"""Scores of text: n-grams that a query and a document share. Needs a tokenizer and no model."""
