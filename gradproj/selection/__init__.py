"""Select documents of a store by scores: the best, by query in turn, diverse; and write them."""
