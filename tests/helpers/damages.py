"""What can happen to a finished output behind its back, and what ``verify`` has to say of it."""

from pathlib import Path

import numpy as np
from helpers.jobs import make_corpus, mixed_documents
from helpers.outputs import change_record, cut, flip_byte, shard_of

from gradproj.corpus.index import build_index, list_tars, save_index
from gradproj.store.unit_record import record_name
from gradproj.store.writer import write_array


def swap_corpus(output: Path) -> None:
    (output / "corpus.json").unlink()
    corpus = make_corpus(output.parent / "other", mixed_documents(3, seed=9))
    save_index(build_index(list_tars(str(corpus)), progress=False), output / "corpus.json")


DAMAGES = {
    "a flipped bit in a shard": (lambda o: flip_byte(shard_of(o, 1), 100), "unit", 1, "has the checksum"),
    "a shard cut short": (lambda o: cut(shard_of(o, 1)), "unit", 1, "bytes, its record says"),
    "a shard deleted": (lambda o: shard_of(o, 1).unlink(), "unit", 1, "is gone"),
    "a flipped bit in a record": (lambda o: flip_byte(o / record_name(1)), "unit", 1, "damaged (torn or alt"),
    "a record cut short": (lambda o: cut(o / record_name(1)), "unit", 1, "damaged (torn or altered"),
    "an empty record": (lambda o: (o / record_name(1)).write_bytes(b""), "unit", 1, "damaged (torn or altered"),
    "a merged unit's record deleted": (lambda o: (o / record_name(1)).unlink(), "unit", 1, "was merged"),
    "another unit's record": (lambda o: change_record(o, 2, place=1), "unit", 1, "is the record of unit 2"),
    "a record of other settings": (lambda o: change_record(o, 1, identity="other"), "unit", 1, "other settings"),
    "a record that starts elsewhere": (lambda o: change_record(o, 1, start=0), "unit", 1, "starts at sample 0"),
    "a record without its shard": (lambda o: change_record(o, 1, shard=None), "unit", 1, "names no shard"),
    "a record without statuses": (
        lambda o: change_record(o, 1, statuses={4: 0}), "unit", 1, "documents without a status",
    ),
    "a record of no unit": (lambda o: change_record(o, 1, place=99, unit=99), "unit", 99, "does not want"),
    "a column changed": (
        lambda o: flip_byte(o / "projections.zarr" / "n_tokens" / "c.0", 4 * 37),
        "columns", 2, "first at sample 37",
    ),
    "a column cut short": (
        lambda o: cut(o / "projections.zarr" / "key" / "c.0.0"), "columns", 0, "bytes in key/c.0.0",
    ),
    "a column deleted": (
        lambda o: (o / "projections.zarr" / "loss" / "c.0").unlink(), "columns", 0, "first at sample 0",
    ),
    "statuses deleted": (
        lambda o: (o / "projections.zarr" / "status" / "c.0").unlink(), "columns", 0, "never merged",
    ),
    "a sum changed": (
        lambda o: write_array(o / "projections.zarr", "token_covariance_a", np.zeros(3)),
        "columns", None, "not the sum of the records' covariances",
    ),
    "matrices that are not finite": (
        lambda o: write_array(
            o / "projections.zarr", "projection_matrices", np.full(10**5, np.nan, np.float32)
        ),
        "other", None, "that are not finite",
    ),
    "metadata changed": (lambda o: (o / "metadata.json").write_text("{}"), "other", None, "not a copy"),
    "metadata torn": (lambda o: (o / "metadata.json").write_text("{"), "other", None, "cannot be read: Expecting"),
    "the index of another corpus": (swap_corpus, "other", None, "index of another corpus"),
    "a torn index": (lambda o: cut(o / "corpus.json"), "other", None, "torn corpus index"),
}  # fmt: skip
"""Name -> (what happens to the output, kind, unit, a part of what is said)."""
