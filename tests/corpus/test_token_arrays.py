"""Token ids in numpy's format are read as numpy reads them; all else is one clear reason."""

import io

import numpy as np
import pytest

from gradproj.corpus.token_arrays import BadArrayError, ids_bytes, npy_bytes, read_integers


def saved(array, version=None, **options):
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asanyarray(array), version=version, **options)
    return file.getvalue()


@pytest.mark.parametrize("dtype", ["u1", "<u2", "<u4", "<i4", "<i8", "<i2", "<u8"])
@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_arrays_that_numpy_wrote_are_read_as_numpy_reads_them(dtype, version):
    for n in (0, 1, 1000):
        values = np.arange(n).astype(dtype)
        got = read_integers(saved(values, version))
        np.testing.assert_array_equal(got, values)
        assert got.dtype == values.dtype


@pytest.mark.parametrize("n", [0, 1, 12345])
def test_numpy_reads_what_is_written(n):
    ids = np.arange(n, dtype=np.int64)
    np.testing.assert_array_equal(np.load(io.BytesIO(npy_bytes(ids)), allow_pickle=False), ids)
    assert len(npy_bytes(ids)) % 64 == 8 * n % 64


def test_ids_take_two_bytes_unless_one_needs_four():
    assert read_integers(ids_bytes(np.array([0, 65535]))).dtype == np.uint16
    assert read_integers(ids_bytes(np.array([0, 65536]))).dtype == np.uint32
    assert read_integers(ids_bytes(np.array([], np.int64))).dtype == np.uint16


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("the pickle was run",))


GOOD = saved(np.arange(5, dtype="<u2"))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is not in numpy's format"),
        (b"\x00\x01" * 40, "is not in numpy's format"),
        (GOOD[:9], "is cut short in its header"),
        (GOOD[:60], "is cut short in its header"),
        (GOOD[:-1], "has 9 bytes of data, and its header says 5 integers of 2 bytes"),
        (GOOD + b"\0", "has 11 bytes of data"),
        (GOOD[:6] + b"\x09" + GOOD[7:], "is of version 9 of numpy's format; 1 to 3 are read"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b" " * 99, "has a header of 4,294,967,295 bytes"),
        (b"\x93NUMPY\x01\x00\x02\x00{}", "without a dtype, an order and a shape"),
        (saved(np.zeros(3)), "holds floating-point numbers, not little-endian integers ('<f8')"),
        (saved(np.zeros(3, ">u2")), "holds big-endian numbers, not little-endian integers ('>u2')"),
        (saved(np.zeros(3, bool)), "holds booleans"),
        (saved(np.array([Trap()], object)), "holds Python objects (a pickle)"),
        (saved(np.zeros(3, [("a", "<u2")])), "holds records"),
        (saved(np.array("text")), "holds other things, not little-endian integers ('<U4')"),
        (saved(np.zeros((2, 3), "<u2")), "is an array of shape (2, 3), not a list of token ids"),
        (saved(np.zeros((2, 3), "<u2", "F")), "is in Fortran's order, not in C's"),
        (saved(np.array(7)), "is an array of shape (), not a list of token ids"),
        (GOOD.replace(b"(5,)", b"(9" + b"9" * 30 + b",)"), "its header says 9"),
        (GOOD.replace(b"(5,)", b"(5 5)"), "has the shape (5 5), which is none"),
        (GOOD.replace(b"(5,)", b"(" + b"9" * 5000 + b",)").replace(b"\x76\x00", b"\xff\x1f"), ""),
    ],
)
def test_a_malformed_array_is_one_reason_and_nothing_is_run(data, reason):
    with pytest.raises(BadArrayError) as caught:
        read_integers(data)
    assert reason in str(caught.value)
