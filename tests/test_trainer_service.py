"""The socket between node and trainer: real gRPC, real files."""

import os
import stat
import subprocess
import sys
import threading

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hospitium_client.trainer_service import (
    FRAME_BYTES,
    TrainerClient,
    TrainerServer,
    TrainerUnavailable,
    in_frames,
)
from hospitium_common.errors import ConfigError


@pytest.fixture
def serve(tmp_path):
    """Start a server with the given answer; return a client and the socket."""
    opened = []

    def start(answer, **options):
        socket = tmp_path / "run" / "trainer.sock"
        server = TrainerServer(socket, answer, **options)
        server.start()
        client = TrainerClient(socket, ready_s=5.0)
        opened.extend([(client.close, ()), (server.stop, (0.1,))])
        return client, socket

    yield start
    for close, arguments in opened:
        close(*arguments)


def test_a_request_of_many_frames_is_answered_with_many_frames(serve):
    request = os.urandom(3 * FRAME_BYTES + 17)
    client, _ = serve(lambda data: data[::-1])
    assert client.exchange(request, deadline_s=20) == request[::-1]


def test_no_bytes_are_a_request_and_an_answer_too(serve):
    client, _ = serve(lambda data: data)
    assert client.exchange(b"", deadline_s=5) == b""


@given(st.integers(0, 3), st.integers(-1, 1))
def test_frames_put_together_are_the_bytes_that_were_cut(frames, more):
    data = bytes(max(0, frames * FRAME_BYTES + more))
    pieces = list(in_frames(data))
    assert b"".join(pieces) == data
    assert all(len(piece) <= FRAME_BYTES for piece in pieces)


def test_only_the_owner_may_open_the_socket(serve):
    _, socket = serve(lambda data: data)
    assert stat.S_IMODE(socket.stat().st_mode) == 0o600
    assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700


def test_a_group_may_be_let_in_and_nobody_else(serve):
    import grp

    _, socket = serve(lambda data: data, group=grp.getgrgid(os.getgid()).gr_name)
    assert stat.S_IMODE(socket.stat().st_mode) == 0o660


def test_a_request_above_the_limit_is_refused_before_it_is_answered(serve):
    answered = []
    client, _ = serve(answered.append, largest_bytes=2 * FRAME_BYTES)
    with pytest.raises(TrainerUnavailable, match="RESOURCE_EXHAUSTED"):
        client.exchange(bytes(3 * FRAME_BYTES), deadline_s=10)
    assert not answered


def test_a_frame_above_the_limit_is_refused(serve):
    client, socket = serve(lambda data: data)
    with grpc.insecure_channel(f"unix:{socket}") as channel:
        call = channel.stream_stream("/hospitium.Trainer/Exchange")
        with pytest.raises(grpc.RpcError) as refused:
            list(call(iter([bytes(FRAME_BYTES + 1)]), timeout=5))
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert client.exchange(b"still there", deadline_s=5) == b"still there"


def test_what_goes_wrong_inside_leaves_as_one_word(serve, caplog):
    def answer(data):
        raise ValueError("patient 4711, potassium 5.9")

    client, socket = serve(answer)
    with grpc.insecure_channel(f"unix:{socket}") as channel:
        call = channel.stream_stream("/hospitium.Trainer/Exchange")
        with pytest.raises(grpc.RpcError) as refused:
            list(call(iter([b"x"]), timeout=5))
    assert refused.value.details() == "fault"
    assert "4711" not in caplog.text
    with pytest.raises(TrainerUnavailable, match="INTERNAL"):
        client.exchange(b"x", deadline_s=5)


def test_a_slow_answer_ends_at_the_deadline_and_the_next_request_is_answered(serve):
    gate = threading.Event()

    def answer(data):
        if data == b"slow":
            gate.wait(10)
        return data

    client, _ = serve(answer)
    with pytest.raises(TrainerUnavailable, match="DEADLINE_EXCEEDED"):
        client.exchange(b"slow", deadline_s=0.3)
    assert client.exchange(b"quick", deadline_s=5) == b"quick"
    gate.set()


def test_a_short_request_is_answered_while_a_long_one_runs(serve):
    gate, began = threading.Event(), threading.Event()

    def answer(data):
        if data == b"train":
            began.set()
            gate.wait(20)
        return data

    client, _ = serve(answer)
    long = threading.Thread(target=client.exchange, args=(b"train",), kwargs={"deadline_s": 20})
    long.start()
    assert began.wait(5)
    assert client.exchange(b"offer", deadline_s=5) == b"offer"
    gate.set()
    long.join()


def test_health_says_serving_while_the_trainer_runs_and_no_afterwards(tmp_path):
    socket = tmp_path / "trainer.sock"
    client = TrainerClient(socket)
    assert not client.is_serving(timeout_s=0.2)
    server = TrainerServer(socket, lambda data: data)
    server.start()
    assert TrainerClient(socket).is_serving(timeout_s=5)
    assert server.stop(1.0)
    assert not socket.exists()
    assert not client.is_serving(timeout_s=0.2)
    client.close()


def test_without_a_trainer_the_node_is_told_what_to_start(tmp_path):
    client = TrainerClient(tmp_path / "trainer.sock", ready_s=0.2)
    with pytest.raises(TrainerUnavailable, match="hospitium site trainer"):
        client.exchange(b"x", deadline_s=1)
    client.close()


def test_a_second_trainer_on_the_same_socket_is_refused(serve, tmp_path):
    client, socket = serve(lambda data: data)
    with pytest.raises(ConfigError, match="another one is running"):
        TrainerServer(socket, lambda data: data).start()
    assert client.exchange(b"first", deadline_s=5) == b"first"


def test_a_path_that_is_too_long_for_the_kernel_works_all_the_same(tmp_path):
    socket = tmp_path / ("deep" * 30) / "trainer.sock"
    server = TrainerServer(socket, lambda data: data[::-1])
    server.start()
    client = TrainerClient(socket, ready_s=5.0)
    assert client.exchange(b"abc", deadline_s=5) == b"cba"
    assert stat.S_IMODE(socket.stat().st_mode) == 0o600
    client.close()
    assert server.stop(0.1)
    assert not socket.exists()


def test_a_long_path_without_its_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="at most 107 bytes"):
        TrainerClient(tmp_path / ("x" * 120) / "trainer.sock")


MORTAL = """
import os, signal, sys, threading
from pathlib import Path
from hospitium_client.trainer_service import TrainerServer
died = Path(sys.argv[2])
def answer(data):
    if data == b"deadly" or (data == b"once" and not died.exists()):
        died.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return data.upper()
TrainerServer(Path(sys.argv[1]), answer).start()
threading.Event().wait()
"""


@pytest.fixture
def mortal(tmp_path):
    """A trainer process that is started again whenever it dies."""
    socket, stopping = tmp_path / "trainer.sock", threading.Event()
    starts = []

    def keep():
        while not stopping.is_set():
            process = subprocess.Popen(
                [sys.executable, "-c", MORTAL, str(socket), str(tmp_path / "died")]
            )
            starts.append(process)
            process.wait()

    keeper = threading.Thread(target=keep)
    keeper.start()
    yield TrainerClient(socket, ready_s=20), starts
    stopping.set()
    starts[-1].kill()
    keeper.join()
    starts[-1].kill()


def test_a_trainer_killed_in_mid_request_is_asked_again_when_it_is_back(mortal):
    client, starts = mortal
    assert client.exchange(b"once", deadline_s=20) == b"ONCE"
    assert len(starts) == 2


def test_a_request_that_kills_every_trainer_is_given_up(mortal):
    client, starts = mortal
    with pytest.raises(TrainerUnavailable, match="died 3 times"):
        client.exchange(b"deadly", deadline_s=20)
    assert len(starts) >= 3
    assert client.exchange(b"alive", deadline_s=20) == b"ALIVE"
