"""The search for inputs that break a decoder: it finds nothing, and it would find something."""

import random
from collections import Counter

from hospitium_simulations.benchmarks.fuzz_decoders import Findings, mutate, search, try_one
from hospitium_simulations.benchmarks.specimens import Specimen


def test_two_seconds_of_mutated_inputs_break_no_decoder():
    found = search(2, seed=7)
    assert found.failures == []
    assert min(found.inputs.values()) >= 20
    assert min(found.taken.values()) > 0


def test_a_decoder_that_raises_what_it_did_not_declare_is_noticed():
    found = Findings(inputs=Counter(), taken=Counter(), failures=[])
    broken = Specimen(name="broken", data=b"12", read=lambda data: data.decode("ascii"))
    try_one(broken, b"\xff", found)
    assert found.undeclared == 1
    assert found.failures[0][0] == "broken"
    assert found.failures[0][2] == "ff"


def test_two_encodings_of_one_value_are_noticed():
    found = Findings(inputs=Counter(), taken=Counter(), failures=[])
    lax = Specimen(
        name="lax", data=b"7", read=int, is_same=lambda value, data: b"%d" % value == data
    )
    try_one(lax, b"07", found)
    assert found.undeclared == 1


def test_mutations_repeat_with_their_seed():
    one, other = random.Random(3), random.Random(3)
    inputs = [mutate(b"abcdefgh" * 4, [b"other"], one) for _ in range(50)]
    assert inputs == [mutate(b"abcdefgh" * 4, [b"other"], other) for _ in range(50)]
    assert len(set(inputs)) > 40
