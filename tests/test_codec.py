import pytest
from hypothesis import given
from hypothesis import strategies as st

from hospitium_common.codec import Reader, encode_parts
from hospitium_common.errors import PeerProtocolError

parts = st.lists(st.binary(max_size=40), max_size=8)


@given(parts)
def test_what_is_encoded_is_read_back(values):
    reader = Reader(encode_parts(*values))
    assert [reader.bytes() for _ in values] == values
    reader.finish()


@given(parts, parts)
def test_different_parts_never_encode_to_the_same_bytes(one, other):
    assert (encode_parts(*one) == encode_parts(*other)) == (one == other)


def test_an_integer_is_eight_bytes_big_endian():
    assert encode_parts(258) == bytes([0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 1, 2])


def test_a_truncated_message_is_refused():
    with pytest.raises(PeerProtocolError, match="truncated"):
        Reader(encode_parts(b"abc")[:-1]).part()


def test_trailing_bytes_are_refused():
    reader = Reader(encode_parts(b"abc") + b"x")
    reader.part()
    with pytest.raises(PeerProtocolError, match="1 more bytes"):
        reader.finish()
