"""An order of domains in which alike ones stand together."""

import numpy as np


def by_similarity(cosine: np.ndarray, sizes: np.ndarray) -> list[int]:
    """Domains along the direction in which neighbours are most alike; those without a row come last.

    Args:
        cosine: ``(G, G)``, symmetric; NaN where a domain has no row.
        sizes: ``(G,)`` rows; the end that has more of them comes first.

    Returns:
        Every domain's number once. The order is that of the Fiedler vector of the graph whose edges are the cosines,
        counted from the least of them.
    """
    there = np.flatnonzero((sizes > 0) & np.isfinite(np.diagonal(cosine)))
    absent = [i for i in range(len(sizes)) if i not in set(there.tolist())]
    if len(there) < 3:
        return [*sorted(there.tolist(), key=lambda i: (-sizes[i], i)), *absent]
    edges = cosine[np.ix_(there, there)]
    edges = edges - edges.min()
    np.fill_diagonal(edges, 0)
    _, vectors = np.linalg.eigh(np.diag(edges.sum(axis=1)) - edges)
    place = vectors[:, 1]
    if (place * sizes[there]).sum() > 0:
        place = -place
    return [*there[np.argsort(place, kind="stable")].tolist(), *absent]
