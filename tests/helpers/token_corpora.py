"""Token corpora of other tools, their bytes written by the formats' specifications."""

import struct

import numpy as np

END = 50256
DOCUMENTS = [[5, 6, 7, END], [END], [8] * 300 + [END], [1, 65535, END]]


def joined(documents):
    return np.array([token for document in documents for token in document])


def write_datatrove(path, documents, dtype="<u2", ends=None):
    joined(documents).astype(dtype).tofile(path)
    ends = np.cumsum([len(document) for document in documents]) if ends is None else ends
    path.with_name(path.name + ".index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))
    path.with_name(path.name + ".metadata").write_text("gpt2|2\n308\n308 T")


def write_megatron(path, sequences, documents, dtype="<u2", code=8, modes=b""):
    """Write ``path.bin`` and ``path.idx``: MMIDIDX version 1, as Megatron-LM and GPT-NeoX do."""
    joined(sequences).astype(dtype).tofile(f"{path}.bin")
    lengths = [len(sequence) for sequence in sequences]
    pointers = np.concatenate([[0], np.cumsum(lengths)[:-1]]) * np.dtype(dtype).itemsize
    index = b"MMIDIDX\0\0" + struct.pack("<QB", 1, code) + struct.pack("<Q", len(lengths))
    if documents is not None:
        index += struct.pack("<Q", len(documents))
    index += np.array(lengths, "<i4").tobytes() + np.array(pointers, "<i8").tobytes()
    index += np.array(documents or [], "<i8").tobytes() + modes
    path.with_suffix(".idx").write_bytes(index)


def write_old_megatron(path, sequences, documents, dtype="<i4", code=4):
    """Write TNTIDX, as ``--dataset-impl lazy`` of the older versions."""
    joined(sequences).astype(dtype).tofile(f"{path}.bin")
    lengths = [len(sequence) for sequence in sequences]
    counts = [1, code, np.dtype(dtype).itemsize, len(lengths), len(lengths)]
    counts += [] if documents is None else [len(documents)]
    dims, bounds = range(len(lengths) + 1), [0, *np.cumsum(lengths)]
    numbers = [*counts, *dims, *bounds, *lengths, *(documents or [])]
    path.with_suffix(".idx").write_bytes(b"TNTIDX\0\0" + np.array(numbers, "<i8").tobytes())
