"""Per-sample projected gradients of a whole corpus, in one shared Zarr array."""
