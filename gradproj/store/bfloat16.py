"""bfloat16: conversion in numpy, and the Zarr data type of that name.

numpy has no bfloat16, so such an array is read and written as uint16 bits. tensorstore and other
readers have a bfloat16 type. Plain zarr-python opens the array once ``gradproj.store`` is imported.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np
from zarr.core.dtype.common import DataTypeValidationError, HasEndianness, HasItemSize
from zarr.core.dtype.npy.common import endianness_to_numpy_str
from zarr.core.dtype.wrapper import ZDType
from zarr.dtype import data_type_registry

from gradproj.store.layout import NAN_BITS


def float32_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round float32 values to bfloat16, ties to even, as uint16 bits. All NaN become 0x7FC0."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    rounded[np.isnan(values)] = NAN_BITS
    return rounded


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    """Convert uint16 bits to float32 values; exact."""
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


@dataclass(frozen=True, kw_only=True)
class BFloat16(ZDType[np.dtypes.UInt16DType, np.uint16], HasEndianness, HasItemSize):
    """Zarr's ``bfloat16`` as numpy's uint16. Scalars are bits: the fill value NaN is 0x7FC0."""

    dtype_cls: ClassVar[Any] = np.dtypes.UInt16DType
    _zarr_v3_name: ClassVar[Literal["bfloat16"]] = "bfloat16"

    @property
    def item_size(self) -> int:
        return 2

    @classmethod
    def from_native_dtype(cls, dtype: np.dtype) -> Self:
        # A numpy uint16 must stay Zarr's uint16, so this type is chosen by name only.
        raise DataTypeValidationError(f"bfloat16 cannot be inferred from the numpy type {dtype}")

    def to_native_dtype(self) -> Any:
        return np.dtype(np.uint16).newbyteorder(endianness_to_numpy_str(self.endianness))

    @classmethod
    def _from_json_v2(cls, data: Any) -> Self:
        raise DataTypeValidationError("bfloat16 is a Zarr v3 data type")

    @classmethod
    def _from_json_v3(cls, data: Any) -> Self:
        if data == cls._zarr_v3_name:
            return cls()
        raise DataTypeValidationError(f"{data!r} is not 'bfloat16'")

    def to_json(self, zarr_format: int) -> Any:
        if zarr_format != 3:
            raise ValueError("bfloat16 is a Zarr v3 data type")
        return self._zarr_v3_name

    def _check_scalar(self, data: object) -> bool:
        return isinstance(data, (int, float, np.integer, np.floating))

    def cast_scalar(self, data: object) -> np.uint16:
        """Return uint16 bits unchanged; round any other number to bfloat16."""
        if isinstance(data, np.uint16):
            return data
        if not self._check_scalar(data):
            raise TypeError(f"cannot make a bfloat16 of {data!r}")
        return float32_to_bfloat16(np.array([data], np.float32))[0]

    def default_scalar(self) -> np.uint16:
        return np.uint16(0)

    def from_json_scalar(self, data: Any, *, zarr_format: int) -> np.uint16:
        if isinstance(data, str) and data.startswith("0x"):
            return np.uint16(int(data, 16))
        return self.cast_scalar(float(data))

    def to_json_scalar(self, data: object, *, zarr_format: int) -> float | str:
        value = float(bfloat16_to_float32(np.array([self.cast_scalar(data)]))[0])
        if np.isnan(value):
            return "NaN"
        if np.isinf(value):
            return "Infinity" if value > 0 else "-Infinity"
        return value


def register() -> None:
    """Register bfloat16 with zarr-python, unless another package has."""
    if "bfloat16" not in data_type_registry.contents:
        data_type_registry.register("bfloat16", BFloat16)
