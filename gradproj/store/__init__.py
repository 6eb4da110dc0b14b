"""The Zarr store: its layout, its one writer per object, its readers. Only this package imports zarr."""
