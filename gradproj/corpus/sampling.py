"""The documents of a sample that is spread evenly over a corpus and the same in every process."""

from collections.abc import Iterator


def spread_order(n_samples: int) -> Iterator[int]:
    """Yield every sample id once, so that any beginning of the sequence lies at equal steps.

    The first ids of 8 samples are 0, 4, 2, 6: halves, then quarters. So a sample that must reach a
    number of tokens grows until it has them, and nobody needs the documents' lengths before.

    Source: the van der Corput sequence, which reverses the bits of 0, 1, 2, ...
    """
    n_bits = max(n_samples - 1, 0).bit_length()
    for number in range(2**n_bits):
        reversed_bits = int(f"{number:0{max(n_bits, 1)}b}"[::-1], 2)
        if reversed_bits < n_samples:
            yield reversed_bits
