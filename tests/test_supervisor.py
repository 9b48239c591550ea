"""The supervisor starts what died, later each time, and ends everything when told to."""

import os
import threading

from hospitium_client.supervisor import LAST_PAUSE_S, Part, supervise


def part(*words):
    return Part(name="trainer", arguments=list(words), environment=dict(os.environ))


def die(one, now):
    """Let a part be started at ``now`` and die at once."""
    one.look(now)
    one.process.wait()
    one.look(now)


def test_what_dies_at_once_is_started_later_each_time(tmp_path):
    one, now, pauses = part("site", "health", "--home", str(tmp_path)), 0.0, []
    for _ in range(3):
        die(one, now)
        pauses.append(one.next_start - now)
        one.look(now + 0.9 * pauses[-1])
        assert one.process is None
        now = one.next_start
    assert pauses == [0.5, 1.0, 2.0]


def test_the_pause_has_a_limit_and_a_long_life_is_forgiven(tmp_path):
    one = part("site", "health", "--home", str(tmp_path))
    one.deaths = 50
    die(one, 0.0)
    assert one.next_start == LAST_PAUSE_S
    one.look(LAST_PAUSE_S)
    one.process.wait()
    one.look(LAST_PAUSE_S + 100)
    assert one.next_start == LAST_PAUSE_S + 100.5


def test_everything_ends_when_told_to(tmp_path):
    stop = threading.Event()
    parts = [part("site", "health", "--home", str(tmp_path)) for _ in range(2)]
    supervising = threading.Thread(target=supervise, args=(parts, stop))
    supervising.start()
    while not all(one.started_at > 0 for one in parts):
        stop.wait(0.01)
    stop.set()
    supervising.join()
    assert [one.process for one in parts] == [None, None]
