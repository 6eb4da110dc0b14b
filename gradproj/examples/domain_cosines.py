"""How alike a store's domains are, with xarray and dask only: cosines of their mean gradients.

    python -m gradproj.examples.domain_cosines OUTPUT [--layer NAME]

It computes what ``gradproj.analysis.domain_matrix`` has as ``cosine``, and shows how a store is worked on in tools that
know nothing of gradproj: rows and columns are dask arrays, so that the sums below read a thousand rows at a time, in
bounded memory.
Needs ``pip install 'gradproj[xarray]'``.
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
    """Cosines of the domains' mean rows.

    Args:
        dataset: what ``ProjectionStore.to_xarray`` gives, or a part of it: ``dataset.sel(layer=...)``, say.
        names: of the domains, G of them.

    Returns:
        ``(G, G)`` float64, labelled by ``domain`` and ``other``; NaN for a domain without a row.
    """
    import xarray as xr

    there = dataset.status == STATUS["ok"]
    member = xr.concat([there & (dataset.domain == name) for name in names], "domain")
    rows = dataset.rows.fillna(0).astype(np.float64)
    # One product with a matrix of zeros and ones gives all domains' sums, and reads each row once.
    mean = xr.dot(member.chunk({"domain": -1}).astype(np.float64), rows, dim="sample") / member.sum(
        "sample"
    )
    mean = mean.assign_coords(domain=names).compute()
    unit = mean / np.sqrt((mean**2).sum("value"))
    return xr.dot(unit, unit.rename(domain="other"), dim="value")


def main(argv: list[str] | None = None) -> int:
    """Print the matrix of one store; the exit code."""
    return exit_code(lambda: _print(argv))


def _print(argv: list[str] | None) -> None:
    parser = argparse.ArgumentParser(
        prog="gradproj.examples.domain_cosines", description="How alike a store's domains are."
    )
    parser.add_argument("output", help="a job's --output_dir")
    parser.add_argument("--layer", help="of this layer only; default: whole rows")
    args = parser.parse_args(argv)
    with ProjectionStore(args.output) as store:
        if not store.domains:
            raise ConfigError(f"{store.path} has no domains: its documents name none")
        known = [layer.name for layer in store.layers]
        if args.layer not in (None, *known):
            raise ConfigError(f"{store.path} has no layer {args.layer!r}; it has {listed(known)}")
        dataset = store.to_xarray(_ROWS_PER_CHUNK)
        found = domain_cosines(
            dataset.sel(layer=args.layer) if args.layer else dataset, store.domains
        )
    names = [one_line(name, _NAME) for name in store.domains]
    width = max(map(len, names))
    for name, line in zip(names, found.values, strict=True):
        print(f"{name:{width}}", *(f"{value:7.4f}" for value in line))


if __name__ == "__main__":
    sys.exit(main())
