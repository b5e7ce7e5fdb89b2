"""Encoding, cutting documents into pieces, and streaming whole characters up to a stop string."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mplus_agents.engine.text import StreamDecoder, TextCodec
from mplus_agents.errors import CheckpointError
from tests.engine.engines import prose, tiny_codec

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
# Few letters, so that stop strings and their beginnings do occur.
DENSE_TEXT = st.text(st.sampled_from("ab\n é🙂👩‍👧\ufffd"), max_size=40)
STOPS = st.lists(st.text(st.sampled_from("ab\n é🙂\ufffd"), min_size=1, max_size=4), max_size=3)


def stream(ids: list[int], stop: list[str]) -> tuple[list[str], bool]:
    decoder = StreamDecoder(tiny_codec(), stop)
    pieces = []
    for token_id in ids:
        pieces.append(decoder.push(token_id))
        if decoder.is_stopped:
            break
    pieces.append(decoder.finish())
    return pieces, decoder.is_stopped


def byte_ids(text: str) -> list[int]:
    """A token per byte: the hardest case for whole characters."""
    codec = tiny_codec()
    table = {codec.tokenizer.backend_tokenizer.id_to_token(i): i for i in range(2, 258)}
    ids = []
    for byte in text.encode():
        is_plain = 33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174
        strange = [b for b in range(256) if not (33 <= b <= 126 or 161 <= b <= 172 or b >= 174)]
        ids.append(table[chr(byte) if is_plain else chr(256 + strange.index(byte))])
    assert codec.decode(ids) == text
    return ids


def first_stop(text: str, stop: list[str]) -> str:
    return text[: min((text.find(s) for s in stop if s in text), default=len(text))]


@settings(deadline=None)
@given(ANY_TEXT)
def test_decoding_undoes_encoding(text: str) -> None:
    codec = tiny_codec()
    assert codec.decode(codec.encode(text)) == text


def test_an_emoji_byte_by_byte_comes_out_whole() -> None:
    ids = byte_ids("a🙂é")
    decoder = StreamDecoder(tiny_codec())
    assert [decoder.push(token_id) for token_id in ids] == ["a", "", "", "", "🙂", "", "é"]
    assert decoder.finish() == ""
    assert decoder.num_tokens == 7


def test_half_an_emoji_at_the_end_is_shown_as_such() -> None:
    pieces, _ = stream(byte_ids("a🙂")[:-1], [])
    assert pieces == ["a", "", "", "", "\ufffd"]


@settings(deadline=None)
@given(ANY_TEXT, st.booleans())
def test_without_stop_strings_the_pieces_are_the_text(text: str, is_bytewise: bool) -> None:
    pieces, is_stopped = stream(byte_ids(text) if is_bytewise else tiny_codec().encode(text), [])
    assert "".join(pieces) == text
    assert not is_stopped
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)


@settings(deadline=None, max_examples=300)
@given(st.one_of(DENSE_TEXT, ANY_TEXT), STOPS)
@example("ab🙂", ["b🙂"])
@example("ab🙂c", ["b🙂"])
@example("a🙂", ["a\ufffd"])
@example("aab", ["ab"])
@example("ab", ["abc", "b"])
@example("a\ufffda", ["\ufffd", "a\ufffda"])
def test_the_text_ends_at_the_first_stop_string(text: str, stop: list[str]) -> None:
    """Token by token, the text is cut where the first stop string begins that the tokens so far hold for certain."""
    ids = byte_ids(text)
    pieces, is_stopped = stream(ids, stop)
    # A replacement character at the end is not certain: it may be half a character, until another one follows.
    certain = [end for end in range(len(text) + 1) if end == len(text) or not text[:end].endswith("\ufffd")]
    ends = [end for end in certain if any(s in text[:end] for s in stop)]
    expected = first_stop(text[: ends[0]], stop) if ends else text
    assert "".join(pieces) == expected
    assert is_stopped == bool(ends)


@settings(deadline=None, max_examples=200)
@given(DENSE_TEXT, STOPS)
def test_no_stop_string_is_ever_shown(text: str, stop: list[str]) -> None:
    pieces, is_stopped = stream(tiny_codec().encode(text), stop)
    shown = "".join(pieces)
    assert not any(s in shown for s in stop)
    assert text.startswith(shown)
    assert is_stopped or shown == text


def test_what_could_have_become_a_stop_string_is_released() -> None:
    decoder = StreamDecoder(tiny_codec(), ["\nUser:"])
    pieces = [decoder.push(token_id) for token_id in byte_ids("a\nUse b\nUs")]
    assert pieces == ["a", "", "", "", "", "\nUse ", "b", "", "", ""]
    assert decoder.finish() == "\nUs"


@settings(deadline=None, max_examples=60)
@given(
    st.one_of(
        ANY_TEXT, st.text(st.sampled_from("a \n🙂é"), min_size=1, max_size=300), st.builds(prose, st.integers(1, 120))
    ),
    st.integers(5, 60),
)
def test_pieces_are_the_document_and_never_too_large(text: str, max_tokens: int) -> None:
    codec = tiny_codec()
    start, pieces = 0, []
    while start < len(text):
        piece, ids = codec.next_piece(text, start, max_tokens)
        assert piece
        assert ids == codec.encode(piece)
        assert len(ids) <= max_tokens
        assert codec.next_piece(text[start:], 0, max_tokens) == (piece, ids)
        pieces.append(piece)
        start += len(piece)
    assert "".join(pieces) == text


def test_pieces_are_well_filled_and_end_at_blanks() -> None:
    text, start, sizes = prose(2000), 0, []
    while start < len(text):
        piece, ids = tiny_codec().next_piece(text, start, 128)
        start += len(piece)
        sizes.append(len(ids))
        assert start == len(text) or piece.endswith(" ")
    assert min(sizes[:-1]) > 110


def test_a_cut_far_away_does_not_depend_on_how_much_text_follows() -> None:
    text = " " * 60_000 + prose(500)
    assert tiny_codec().next_piece(text, 0, 20) == tiny_codec().next_piece(text[:50_000], 0, 20)


def test_the_fingerprint_tells_tokenizers_apart_and_stays(tmp_path: Path) -> None:
    codec = tiny_codec()
    before = codec.fingerprint()
    codec.encode("<|end|>")
    codec.encode_template("<|end|>")
    assert codec.fingerprint() == before
    other = copy.deepcopy(codec.tokenizer)
    other.chat_template = "{{ messages }}"
    assert TextCodec(other).fingerprint() != before
    third = copy.deepcopy(codec.tokenizer)
    third.add_tokens(["Maya"])
    assert TextCodec(third).fingerprint() != before


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer in '.*'"):
        TextCodec.from_pretrained(tmp_path)


def test_threads_that_read_special_tokens_and_threads_that_do_not_do_not_meet() -> None:
    codec = tiny_codec()
    plain, special = codec.encode("say <|end|> now"), codec.encode_template("say <|end|> now")
    assert 1 in special
    assert 1 not in plain

    def check(number: int) -> bool:
        if number % 3 == 0:
            return codec.encode("say <|end|> now") == plain
        if number % 3 == 1:
            return codec.encode_template("say <|end|> now") == special
        return codec.decode(plain * 50).startswith("say <|end|> now")

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(check, range(6000)))
