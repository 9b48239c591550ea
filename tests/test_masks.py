"""Masks as streams: in order, the same with any number of threads, and exactly undone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hospitium_common.secagg.hashing import Label, PayloadHash, payload_digest
from hospitium_common.secagg.masks import (
    BLOCK,
    CACHE_LINE,
    STRETCH,
    Keystream,
    Mask,
    add_masks,
    aligned,
    keystream,
    masked_stretches,
)

MASKS = [Mask(b"a" * 32, 1), Mask(b"b" * 32, -1), Mask(b"c" * 32, 1)]
OPPOSITE = [Mask(one.key, -one.sign) for one in MASKS]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.uint64])
def test_stretches_come_in_order_when_they_are_done(threads, dtype):
    size = (3 * STRETCH + 4321) // np.dtype(dtype).itemsize
    words = np.arange(size).astype(dtype)
    expected = words.copy()
    for one in MASKS:
        stream = np.frombuffer(keystream(one.key, words.nbytes), dtype)
        expected = expected + stream if one.sign > 0 else expected - stream
    seen = b"".join(one.tobytes() for one in masked_stretches(words, MASKS, threads))
    assert seen == words.tobytes() == expected.tobytes()


@settings(max_examples=30, deadline=None)
@given(size=st.integers(0, 3000), threads=st.integers(1, 3))
def test_opposite_masks_leave_nothing(size, threads):
    words = np.arange(size, dtype=np.uint16)
    add_masks(words, MASKS, threads)
    add_masks(words, OPPOSITE, threads)
    assert np.array_equal(words, np.arange(size, dtype=np.uint16))


def test_a_key_stream_in_pieces_is_the_key_stream():
    whole = np.frombuffer(keystream(b"k" * 32, 3 * BLOCK), np.uint16)
    stream, at = Keystream(b"k" * 32), 0
    for count in (5, BLOCK // 2, 1, 1000):
        assert np.array_equal(stream.words(count), whole[at : at + count])
        at += count
    later = Keystream(b"k" * 32, offset=160)
    assert np.array_equal(later.words(7), whole[80:87])


def test_arrays_begin_with_a_cache_line():
    for dtype in (np.uint8, np.uint16, np.uint32):
        found = aligned(1001, dtype)
        assert found.ctypes.data % CACHE_LINE == 0
        assert (len(found), found.dtype) == (1001, dtype)


@settings(max_examples=50, deadline=None)
@given(buffers=st.lists(st.binary(max_size=50), max_size=4), cut=st.integers(0, 50))
def test_a_digest_of_pieces_is_the_digest_of_the_whole(buffers, cut):
    pieces = PayloadHash(Label.PAYLOAD, len(buffers))
    for buffer in buffers:
        pieces.begin(len(buffer))
        pieces.update(buffer[:cut])
        pieces.update(memoryview(buffer)[cut:])
    assert pieces.digest() == payload_digest(Label.PAYLOAD, *buffers)
