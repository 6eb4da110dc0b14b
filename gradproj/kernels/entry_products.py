"""Products of sparse entries of signs with vectors, compiled by numba for the CPU."""

import numpy as np

from gradproj.kernels.compiled import compiled


@compiled(fastmath={"reassoc", "contract", "nsz"})
def add_entry_products(
    entries: np.ndarray,
    id_bytes: int,
    scales: np.ndarray,
    first: np.ndarray,
    owner: np.ndarray,
    values: np.ndarray,
    out: np.ndarray,
) -> None:
    """Add to ``out (n, Q)`` the products of rows' entries with the queries' values of their tokens.

    Entries ``(n, m, bytes)`` uint8 are a token id, a scale byte and signs; ``scales`` has the scale
    of each byte: 0 for no entry, NaN for a row that does not exist. The values ``(hits, k)`` of
    token v are those from ``first[v]`` to ``first[v + 1]``; ``owner`` has their queries.
    """
    k, vocabulary = values.shape[1], len(first) - 1
    row = np.empty(k, np.float32)
    for n in range(entries.shape[0]):
        if np.isnan(scales[entries[n, 0, id_bytes]]):
            out[n] = np.nan
            continue
        for j in range(entries.shape[1]):
            entry = entries[n, j]
            scale = scales[entry[id_bytes]]
            if scale == 0:
                continue
            token = np.int64(0)
            for byte in range(id_bytes):
                token |= np.int64(entry[byte]) << (8 * byte)
            if token >= vocabulary or first[token] == first[token + 1]:
                continue
            for i in range(k):
                bit = (entry[id_bytes + 1 + (i >> 3)] >> (i & 7)) & 1
                row[i] = scale if bit else -scale
            for hit in range(first[token], first[token + 1]):
                total = np.float32(0)
                for i in range(k):
                    total += values[hit, i] * row[i]
                out[n, owner[hit]] += total
