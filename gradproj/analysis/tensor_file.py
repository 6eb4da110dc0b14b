"""safetensors files with settings and a checksum, written atomically."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from gradproj.errors import StoreError
from gradproj.files import crc32c, explain_os_errors
from gradproj.storage.contents import local_file, read_start
from gradproj.storage.publish import replace

FORMAT_VERSION = 2
"""2 added the checksum."""
_MAX_HEADER_BYTES = 2**24


def write_tensors(path: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write the file; ``StoreError`` if the system refuses."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    text = json.dumps(settings)
    metadata = {
        "format_version": str(FORMAT_VERSION),
        "settings": text,
        "crc32c": _checksum(text, contiguous),
    }
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, [save(contiguous, metadata)])


def read_tensors(path: Path, way_out: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return settings and tensors.

    Raises:
        StoreError: a damaged file, or one of another format version. ``way_out`` ends the message:
            "fit it again".
    """
    try:
        with local_file(path) as local, safe_open(local, "pt") as file:
            metadata = file.metadata() or {}
            version = metadata.get("format_version")
            if version != str(FORMAT_VERSION):
                raise StoreError(
                    f"{path} has format {version}, this gradproj reads {FORMAT_VERSION}: {way_out}"
                )
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        if _checksum(metadata["settings"], tensors) != metadata["crc32c"]:
            raise ValueError("its checksum does not match")
        return json.loads(metadata["settings"]), tensors
    except (SafetensorError, KeyError, ValueError) as error:
        raise StoreError(f"{path} is damaged ({error}): delete it and {way_out}") from error


def read_settings(path: Path, way_out: str) -> tuple[dict[str, Any], str]:
    """Return a file's settings and the checksum that it states; the tensors are not read.

    Raises:
        StoreError: a damaged file.
    """
    try:
        (n_bytes,) = struct.unpack("<Q", read_start(path, 8))
        header = read_start(path, 8 + min(n_bytes, _MAX_HEADER_BYTES))[8:]
        metadata = json.loads(header)["__metadata__"]
        return json.loads(metadata["settings"]), metadata["crc32c"]
    except (struct.error, KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{path} is damaged ({error}): delete it and {way_out}") from error


def _checksum(settings: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the checksum of the settings and of every tensor with its name."""
    value = crc32c(settings.encode())
    for name in sorted(tensors):
        values = tensors[name].contiguous().cpu().numpy().reshape(-1)
        value = crc32c(values.view(np.uint8), crc32c(name.encode(), value))
    return f"{value:08x}"
