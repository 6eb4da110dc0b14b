"""Documents: anything to WebDataset tars, tars to global sample ids, ids to documents."""
