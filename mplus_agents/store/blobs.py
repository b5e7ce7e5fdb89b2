"""Blobs that describe themselves: a header, a checksum, then the bytes of a tensor, of named arrays or of a text.

Layout, little-endian (docs/schema.md has the table): magic, format version, codec, content, number of dimensions,
payload length, digest, shape, payload. The digest covers everything else, so that any changed byte is found. It is a
checksum and no signature: who can write the database can also write a blob that passes.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch

from mplus_agents.errors import CorruptBlobError, InvalidInputError

__all__ = [
    "StoredTensor",
    "check_dtype",
    "decode_arrays",
    "decode_tensor",
    "decode_text",
    "encode_arrays",
    "encode_tensor",
    "encode_text",
    "open_tensor",
    "to_utf8",
]

_MAGIC = b"MPLB"
_FORMAT_VERSION = 1
_CODEC_RAW, _CODEC_ZLIB = 0, 1
_CONTENT_ARRAYS, _CONTENT_TEXT = 64, 65
_DIGEST_BYTES = 16
_FIXED = struct.Struct("<4sBBBBQ")  # magic, format version, codec, content, number of dimensions, payload bytes
_SHAPE_AT = _FIXED.size + _DIGEST_BYTES
_MAX_DIMS = 8

# Codes are part of the format: append, never renumber.
_TENSOR_DTYPES: dict[int, torch.dtype] = {
    1: torch.float32,
    2: torch.float16,
    3: torch.bfloat16,
    4: torch.int64,
    5: torch.int32,
    6: torch.int16,
    7: torch.uint8,
}
_TENSOR_CODES = {dtype: code for code, dtype in _TENSOR_DTYPES.items()}
_ARRAY_DTYPES: dict[int, np.dtype[np.generic]] = {
    1: np.dtype("<f4"),
    2: np.dtype("<f2"),
    4: np.dtype("<i8"),
    5: np.dtype("<i4"),
    6: np.dtype("<i2"),
    7: np.dtype("u1"),
}
_ARRAY_CODES = {dtype: code for code, dtype in _ARRAY_DTYPES.items()}
_ARRAY_HEAD = struct.Struct("<HBB")  # bytes of the name, dtype code, number of dimensions


@dataclass(frozen=True, slots=True, eq=False)
class StoredTensor:
    """A tensor still in its blob, its checksum already verified.

    Args:
        dtype: The tensor's dtype.
        shape: The tensor's shape.
        payload: Its bytes, row-major and little-endian; a view of the blob.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    payload: memoryview


def encode_tensor(tensor: torch.Tensor) -> bytes:
    """Encode a tensor.

    Args:
        tensor: Any shape of at most 8 dimensions and any device; float32, float16, bfloat16, int64, int32, int16 or
            uint8.

    Returns:
        The blob: a header of 32 bytes and 8 more per dimension, then the values, row-major.

    Raises:
        InvalidInputError: If the dtype is another one, or there are more than 8 dimensions.
    """
    check_dtype("tensor", tensor)
    _check_dims("tensor.shape", tensor.shape)
    # numpy has no bfloat16: every dtype leaves torch as plain bytes.
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return _seal(_TENSOR_CODES[tensor.dtype], _CODEC_RAW, tuple(tensor.shape), flat.view(torch.uint8).numpy().data)


def check_dtype(argument: str, tensor: torch.Tensor) -> None:
    """Check that a tensor's dtype can be stored.

    Args:
        argument: Name of the argument, for the error.
        tensor: The tensor.

    Raises:
        InvalidInputError: If it cannot.
    """
    if tensor.dtype not in _TENSOR_CODES:
        allowed = ", ".join(str(dtype) for dtype in _TENSOR_CODES)
        raise InvalidInputError(f"{argument}.dtype", tensor.dtype, allowed)


def open_tensor(blob: bytes, what: str) -> StoredTensor:
    """Verify a tensor's blob without copying its values.

    Args:
        blob: A blob made by `encode_tensor`.
        what: Names the row and column, for the error.

    Returns:
        The tensor's dtype, shape and bytes.

    Raises:
        CorruptBlobError: If the blob is cut short, altered, or no tensor.
    """
    content, codec, shape, payload = _open(blob, what)
    dtype = _TENSOR_DTYPES.get(content)
    if dtype is None or codec != _CODEC_RAW:
        raise CorruptBlobError(f"{what} is no tensor this version can read (content {content}, codec {codec})")
    if len(payload) != math.prod(shape) * dtype.itemsize:
        raise CorruptBlobError(f"{what} has {len(payload)} bytes, which do not fill shape {list(shape)} of {dtype}")
    return StoredTensor(dtype, shape, payload)


def decode_tensor(blob: bytes, what: str) -> torch.Tensor:
    """Decode a tensor.

    Args:
        blob: A blob made by `encode_tensor`.
        what: Names the row and column, for the error.

    Returns:
        The tensor on the CPU, bit for bit as it was encoded, owning its memory.

    Raises:
        CorruptBlobError: If the blob is cut short, altered, or no tensor.
    """
    stored = open_tensor(blob, what)
    tensor = torch.empty(stored.shape, dtype=stored.dtype)
    tensor.reshape(-1).view(torch.uint8).numpy()[:] = np.frombuffer(stored.payload, dtype=np.uint8)
    return tensor


def encode_arrays(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Encode named arrays, compressed with zlib.

    Args:
        arrays: Names and arrays: any shape of at most 8 dimensions; float32, float16, int64, int32, int16 or uint8.

    Returns:
        The blob.

    Raises:
        InvalidInputError: If a dtype is another one, an array has more than 8 dimensions, or a name is no UTF-8 text
            of at most 65,535 bytes.
    """
    parts: list[bytes] = []
    for name, array in arrays.items():
        code = _ARRAY_CODES.get(array.dtype.newbyteorder("<"))
        if code is None:
            raise InvalidInputError(f"arrays[{name!r}].dtype", array.dtype, ", ".join(str(d) for d in _ARRAY_CODES))
        _check_dims(f"arrays[{name!r}].shape", array.shape)
        encoded_name = to_utf8(f"arrays[{name!r}]", name, max_bytes=65_535)
        parts.append(_ARRAY_HEAD.pack(len(encoded_name), code, array.ndim) + encoded_name)
        parts.append(struct.pack(f"<{array.ndim}Q", *array.shape))
        parts.append(np.ascontiguousarray(array, dtype=_ARRAY_DTYPES[code]).tobytes())
    # Level 1: snapshots are runs of small numbers, which the fastest level already packs well.
    return _seal(_CONTENT_ARRAYS, _CODEC_ZLIB, (len(arrays),), zlib.compress(b"".join(parts), level=1))


def decode_arrays(blob: bytes, what: str) -> dict[str, np.ndarray]:
    """Decode named arrays.

    Args:
        blob: A blob made by `encode_arrays`.
        what: Names the row and column, for the error.

    Returns:
        Names and arrays, in the order they were encoded; the arrays own their memory.

    Raises:
        CorruptBlobError: If the blob is cut short, altered, or holds no named arrays.
    """
    content, codec, shape, payload = _open(blob, what)
    if content != _CONTENT_ARRAYS or codec != _CODEC_ZLIB or len(shape) != 1:
        raise CorruptBlobError(f"{what} holds no arrays this version can read (content {content}, codec {codec})")
    try:
        return _split_arrays(zlib.decompress(payload), shape[0])
    except (zlib.error, struct.error, ValueError, KeyError) as error:
        raise CorruptBlobError(f"{what} does not decode: {error}") from error


def encode_text(text: str) -> bytes:
    """Encode a text as UTF-8; every character survives, NUL too.

    Args:
        text: Any text without lone surrogates.

    Returns:
        The blob: a header of 40 bytes, then the UTF-8.

    Raises:
        InvalidInputError: If the text has no UTF-8 form.
    """
    payload = to_utf8("text", text)
    return _seal(_CONTENT_TEXT, _CODEC_RAW, (len(payload),), payload)


def decode_text(blob: bytes, what: str) -> str:
    """Decode a text.

    Args:
        blob: A blob made by `encode_text`.
        what: Names the row and column, for the error.

    Returns:
        The text.

    Raises:
        CorruptBlobError: If the blob is cut short, altered, or no text.
    """
    content, codec, _, payload = _open(blob, what)
    if content != _CONTENT_TEXT or codec != _CODEC_RAW:
        raise CorruptBlobError(f"{what} is no text this version can read (content {content}, codec {codec})")
    try:
        return str(payload, "utf-8")
    except UnicodeDecodeError as error:
        raise CorruptBlobError(f"{what} is no UTF-8: {error}") from error


def to_utf8(argument: str, text: object, max_bytes: int | None = None) -> bytes:
    """Encode a caller's text as UTF-8, or say which argument has no such form.

    Args:
        argument: Name of the argument, for the error.
        text: The text.
        max_bytes: Longest UTF-8 accepted, in bytes; None for any length.

    Returns:
        The UTF-8.

    Raises:
        InvalidInputError: If it is no text, has no UTF-8 form (a lone surrogate), or is too long.
    """
    if not isinstance(text, str):
        raise InvalidInputError(argument, text, "a str")
    try:
        encoded = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidInputError(argument, text, "text that has a UTF-8 form (no lone surrogates)") from error
    if max_bytes is not None and len(encoded) > max_bytes:
        raise InvalidInputError(argument, text, f"at most {max_bytes:,} bytes of UTF-8")
    return encoded


def _seal(content: int, codec: int, shape: tuple[int, ...], payload: bytes | memoryview) -> bytes:
    head = _FIXED.pack(_MAGIC, _FORMAT_VERSION, codec, content, len(shape), len(payload))
    shape_bytes = struct.pack(f"<{len(shape)}Q", *shape)
    return b"".join((head, _digest(head, shape_bytes, payload), shape_bytes, payload))


def _open(blob: object, what: str) -> tuple[int, int, tuple[int, ...], memoryview]:
    """Verify a blob: content code, codec, shape, payload."""
    if not isinstance(blob, bytes) or len(blob) < _SHAPE_AT:
        raise CorruptBlobError(f"{what} is no blob of this package, or its header is cut short")
    magic, version, codec, content, num_dims, payload_bytes = _FIXED.unpack_from(blob)
    if magic != _MAGIC:
        raise CorruptBlobError(f"{what} is no blob of this package: it begins with {magic!r}")
    if version != _FORMAT_VERSION:
        raise CorruptBlobError(f"{what} has blob format {version}; this version reads {_FORMAT_VERSION}")
    payload_at = _SHAPE_AT + 8 * num_dims
    if len(blob) != payload_at + payload_bytes:
        expected = payload_at + payload_bytes
        raise CorruptBlobError(f"{what} has {len(blob)} bytes where its header says {expected}")
    view = memoryview(blob)
    expected_digest = blob[_FIXED.size : _SHAPE_AT]
    if _digest(view[: _FIXED.size], view[_SHAPE_AT:payload_at], view[payload_at:]) != expected_digest:
        raise CorruptBlobError(f"{what} fails its checksum")
    return content, codec, struct.unpack_from(f"<{num_dims}Q", blob, _SHAPE_AT), view[payload_at:]


def _digest(head: bytes | memoryview, shape: bytes | memoryview, payload: bytes | memoryview) -> bytes:
    digest = blake2b(head, digest_size=_DIGEST_BYTES)
    digest.update(shape)
    digest.update(payload)
    return digest.digest()


def _split_arrays(data: bytes, num_arrays: int) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    at = 0
    for _ in range(num_arrays):
        name_bytes, code, num_dims = _ARRAY_HEAD.unpack_from(data, at)
        at += _ARRAY_HEAD.size
        name = data[at : at + name_bytes].decode("utf-8")
        at += name_bytes
        shape = struct.unpack_from(f"<{num_dims}Q", data, at)
        at += 8 * num_dims
        count = math.prod(shape)
        flat = np.frombuffer(data, dtype=_ARRAY_DTYPES[code], count=count, offset=at) if count else np.empty(0)
        arrays[name] = flat.astype(_ARRAY_DTYPES[code], copy=True).reshape(shape)
        at += count * _ARRAY_DTYPES[code].itemsize
    if at != len(data):
        raise ValueError(f"{len(data) - at} bytes are left over")
    return arrays


def _check_dims(argument: str, shape: tuple[int, ...]) -> None:
    if len(shape) > _MAX_DIMS:
        raise InvalidInputError(argument, tuple(shape), f"at most {_MAX_DIMS} dimensions")
