"""Cosines of the mean gradients of a store's domains, with xarray and dask only.

    python -m gradproj.examples.domain_cosines OUTPUT [--layer NAME]

Computes the ``cosine`` of ``gradproj.analysis.domain_matrix`` with tools that do not know gradproj:
rows and columns are dask arrays, so that the sums read a thousand rows at a time, in bounded
memory. Needs ``pip install 'gradproj[xarray]'``.
"""

import argparse
import sys
from typing import TYPE_CHECKING

import numpy as np

from gradproj.errors import ConfigError, exit_code
from gradproj.formatting import listed, one_line
from gradproj.store import STATUS, ProjectionStore

if TYPE_CHECKING:
    import xarray as xr

_ROWS_PER_CHUNK = 1024
_NAME = 60


def domain_cosines(dataset: "xr.Dataset", names: list[str]) -> "xr.DataArray":
    """Compute the cosines of the domains' mean rows.

    Args:
        dataset: from ``ProjectionStore.to_xarray``, or a part of it such as
            ``dataset.sel(layer=...)``.
        names: of the G domains.

    Returns:
        ``(G, G)`` float64, labelled by ``domain`` and ``other``; NaN for a domain without a row.
    """
    import xarray as xr

    is_ok = dataset.status == STATUS["ok"]
    member = xr.concat([is_ok & (dataset.domain == name) for name in names], "domain")
    rows = dataset.rows.fillna(0).astype(np.float64)
    # One product with a 0/1 matrix gives the sums of all domains and reads each row once.
    sums = xr.dot(member.chunk({"domain": -1}).astype(np.float64), rows, dim="sample")
    mean = (sums / member.sum("sample")).assign_coords(domain=names).compute()
    unit = mean / np.sqrt((mean**2).sum("value"))
    return xr.dot(unit, unit.rename(domain="other"), dim="value")


def main(argv: list[str] | None = None) -> int:
    """Print the matrix of one store and return the exit code."""
    return exit_code(lambda: _print(argv))


def _print(argv: list[str] | None) -> None:
    parser = argparse.ArgumentParser(
        prog="gradproj.examples.domain_cosines",
        description="Cosines of the mean gradients of a store's domains.",
    )
    parser.add_argument("output", help="a job's output directory")
    parser.add_argument("--layer", help="use this layer only; default: whole rows")
    args = parser.parse_args(argv)
    with ProjectionStore(args.output) as store:
        if not store.domains:
            raise ConfigError(f"{store.path} has no domains: its documents name none")
        layers = [layer.name for layer in store.layers]
        if args.layer not in (None, *layers):
            raise ConfigError(f"{store.path} has no layer {args.layer!r}; it has {listed(layers)}")
        dataset = store.to_xarray(_ROWS_PER_CHUNK)
        if args.layer:
            dataset = dataset.sel(layer=args.layer)
        cosines = domain_cosines(dataset, store.domains)
    names = [one_line(name, _NAME) for name in store.domains]
    width = max(map(len, names))
    for name, line in zip(names, cosines.values, strict=True):
        print(f"{name:{width}}", *(f"{value:7.4f}" for value in line))


if __name__ == "__main__":
    sys.exit(main())
