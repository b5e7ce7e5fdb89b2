from __future__ import annotations

import struct
import sys
from hashlib import blake2b

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mplus_agents.errors import CorruptBlobError, InvalidInputError
from mplus_agents.store.blobs import (
    decode_arrays,
    decode_tensor,
    decode_text,
    encode_arrays,
    encode_tensor,
    encode_text,
    open_tensor,
)
from tests.store.samples import bits

_DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.uint8]


@given(
    st.sampled_from(_DTYPES),
    st.lists(st.integers(0, 4), max_size=5),
    st.randoms(use_true_random=False),
)
@settings(max_examples=150, deadline=None)
def test_tensors_come_back_bit_for_bit(dtype: torch.dtype, shape: list[int], moments: object) -> None:
    # From random bytes: every bit pattern, so NaNs with payloads and negative zeros too.
    num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    random_bytes = torch.tensor([moments.randrange(256) for _ in range(num_bytes)], dtype=torch.uint8)  # type: ignore[attr-defined]  # a Random
    tensor = random_bytes.view(dtype).reshape(shape)
    assert bits(decode_tensor(encode_tensor(tensor), "row")) == bits(tensor)


@given(st.text())
@settings(max_examples=100, deadline=None)
def test_texts_come_back(text: str) -> None:
    assert decode_text(encode_text(text), "row") == text


@given(
    st.dictionaries(
        st.text(),
        st.tuples(
            st.sampled_from(["<i8", "<i4", "<i2", "u1", "<f4", "<f2", ">i4"]), st.lists(st.integers(0, 3), max_size=3)
        ),
        max_size=5,
    )
)
@settings(max_examples=100, deadline=None)
def test_named_arrays_come_back(described: dict[str, tuple[str, list[int]]]) -> None:
    arrays = {
        name: np.arange(np.prod(shape, dtype=np.int64)).astype(dtype).reshape(shape)
        for name, (dtype, shape) in described.items()
    }
    decoded = decode_arrays(encode_arrays(arrays), "row")
    assert list(decoded) == list(arrays)
    for name, array in arrays.items():
        assert decoded[name].dtype == array.dtype.newbyteorder("<")
        assert decoded[name].shape == array.shape
        assert decoded[name].tolist() == array.tolist()


def test_decoded_tensors_and_arrays_can_be_changed() -> None:
    tensor = decode_tensor(encode_tensor(torch.zeros(3)), "row")
    tensor[1] = 5.0
    assert tensor.tolist() == [0.0, 5.0, 0.0]
    array = decode_arrays(encode_arrays({"a": np.zeros(3, dtype=np.int64)}), "row")["a"]
    array[1] = 5
    assert array.tolist() == [0, 5, 0]


def test_views_are_stored_by_value() -> None:
    whole = torch.arange(24, dtype=torch.int32).reshape(4, 6)
    assert decode_tensor(encode_tensor(whole.T[1:3]), "row").tolist() == whole.T[1:3].tolist()
    assert decode_tensor(encode_tensor(whole[:, ::2]), "row").tolist() == whole[:, ::2].tolist()


def test_the_layout_is_the_documented_one() -> None:
    blob = encode_tensor(torch.tensor([[1.5, -2.0, 0.25]], dtype=torch.float32))
    assert sys.byteorder == "little"
    head = b"MPLB" + bytes([1, 0, 1, 2]) + struct.pack("<Q", 12)
    shape = struct.pack("<QQ", 1, 3)
    payload = struct.pack("<fff", 1.5, -2.0, 0.25)
    assert blob == head + blake2b(head + shape + payload, digest_size=16).digest() + shape + payload
    text = encode_text("a\x00é")
    assert text[40:] == "a\x00é".encode()
    assert text[:8] == b"MPLB" + bytes([1, 0, 65, 1])
    assert encode_arrays({})[:8] == b"MPLB" + bytes([1, 1, 64, 1])


def _blobs() -> list[tuple[str, bytes]]:
    return [
        ("tensor", encode_tensor(torch.arange(6, dtype=torch.float32).reshape(2, 3))),
        ("bfloat16", encode_tensor(torch.ones(2, 2, dtype=torch.bfloat16))),
        ("empty", encode_tensor(torch.empty(2, 0))),
        ("arrays", encode_arrays({"a": np.arange(5), "b": np.zeros((2, 2), dtype=np.int32)})),
        ("text", encode_text("Maya lives in Oslo.")),
    ]


def _decode(name: str, blob: bytes) -> object:
    if name == "arrays":
        return decode_arrays(blob, "the row")
    return decode_text(blob, "the row") if name == "text" else decode_tensor(blob, "the row")


@pytest.mark.parametrize(("name", "blob"), _blobs(), ids=[name for name, _ in _blobs()])
def test_any_changed_byte_is_found(name: str, blob: bytes) -> None:
    _decode(name, blob)
    for at in range(len(blob)):
        for change in (1, 128, 255):
            altered = bytearray(blob)
            altered[at] ^= change
            with pytest.raises(CorruptBlobError, match="the row"):
                _decode(name, bytes(altered))


@pytest.mark.parametrize(("name", "blob"), _blobs(), ids=[name for name, _ in _blobs()])
def test_any_other_length_is_found(name: str, blob: bytes) -> None:
    for length in range(len(blob)):
        with pytest.raises(CorruptBlobError, match="the row"):
            _decode(name, blob[:length])
    with pytest.raises(CorruptBlobError, match=f"the row has {len(blob) + 1} bytes where its header says {len(blob)}"):
        _decode(name, blob + b"\x00")


def test_a_blob_of_another_kind_is_refused() -> None:
    tensor, text, arrays = encode_tensor(torch.zeros(1)), encode_text("x"), encode_arrays({})
    for blob in (text, arrays):
        with pytest.raises(CorruptBlobError, match="row is no tensor this version can read"):
            open_tensor(blob, "row")
    with pytest.raises(CorruptBlobError, match="row is no text this version can read"):
        decode_text(tensor, "row")
    with pytest.raises(CorruptBlobError, match="row holds no arrays this version can read"):
        decode_arrays(tensor, "row")
    with pytest.raises(CorruptBlobError, match="row is no blob of this package"):
        decode_tensor(b"\x80\x04" * 50, "row")


def test_a_later_format_is_named() -> None:
    blob = bytearray(encode_tensor(torch.zeros(1)))
    blob[4] = 2
    with pytest.raises(CorruptBlobError, match="row has blob format 2; this version reads 1"):
        decode_tensor(bytes(blob), "row")


def test_what_cannot_be_stored_is_refused_by_name() -> None:
    with pytest.raises(InvalidInputError, match=r"tensor\.dtype is torch\.float64; allowed: torch\.float32"):
        encode_tensor(torch.zeros(1, dtype=torch.float64))
    with pytest.raises(InvalidInputError, match=r"tensor\.shape is .*; allowed: at most 8 dimensions"):
        encode_tensor(torch.zeros([1] * 9))
    with pytest.raises(InvalidInputError, match=r"arrays\['x'\]\.dtype is dtype\('float64'\)"):
        encode_arrays({"x": np.zeros(2)})
    with pytest.raises(InvalidInputError, match=r"text is .*; allowed: text that has a UTF-8 form"):
        encode_text("\ud800")
