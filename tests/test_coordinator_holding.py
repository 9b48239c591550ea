"""Questions that wait: held until there is an answer, and lost deliveries handed out again."""

import asyncio

from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse
from flwr.proto.message_pb2 import Message, Metadata, ObjectTree, PullObjectRequest
from flwr.proto.node_pb2 import Node

from hospitium_server.holding import HOLD_S, UNFETCHED_S, HeldQuestions

NODE = 7
BODY = PullMessagesRequest(node=Node(node_id=NODE)).SerializeToString()
EMPTY = [{"type": "http.response.start", "status": 200}, {"type": "http.response.body"}]
NOW = 1_800_000_000.0


class Clock:
    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds


def delivery(root="root", ttl=60.0):
    tree = ObjectTree(object_id=root, children=[ObjectTree(object_id=root + "-part")])
    message = Message(metadata=Metadata(message_id=root, created_at=NOW, ttl=ttl))
    response = PullMessagesResponse(messages_list=[message], message_object_trees=[tree])
    return [EMPTY[0], {"type": "http.response.body", "body": response.SerializeToString()}]


async def stays():
    await asyncio.Event().wait()


async def leaves():
    return {"type": "http.disconnect"}


def questions(clock=None):
    return HeldQuestions(clock or Clock(), lambda: NOW)


def ask(held, *answers, receive=stays):
    """Ask once; Flower gives these answers one after the other. Return what the node gets."""
    left = list(answers)

    async def flower():
        if len(left) > 1:
            asyncio.get_running_loop().call_soon(held.bell.ring)
        return left.pop(0)

    return asyncio.run(held.answer(BODY, receive, flower)), left


def test_a_question_waits_for_the_bell_and_is_asked_again():
    answer, left = ask(questions(), EMPTY, EMPTY, delivery())
    assert answer == delivery()
    assert left == []


def test_a_node_that_left_is_not_asked_for_again():
    """A message must not be handed to a line that is closed."""
    answer, left = ask(questions(), EMPTY, delivery(), receive=leaves)
    assert answer == EMPTY
    assert left == [delivery()]


def test_nobody_is_held_at_the_end_or_for_ever():
    held = questions()
    held.end()
    assert ask(held, EMPTY)[0] == EMPTY
    clock = Clock()
    held = questions(clock)

    async def flower():
        clock.seconds += HOLD_S + 1
        return EMPTY

    assert asyncio.run(held.answer(BODY, stays, flower)) == EMPTY


def test_a_refusal_goes_out_at_once_and_opens_nothing():
    clock = Clock()
    held = questions(clock)
    ask(held, delivery())
    clock.seconds += UNFETCHED_S
    refusal = [{"type": "http.response.start", "status": 401}, {"type": "http.response.body"}]
    assert ask(held, refusal)[0] == refusal


def test_a_delivery_that_was_not_fetched_is_handed_out_again_until_it_is():
    clock = Clock()
    held = questions(clock)
    ask(held, delivery())
    held.end()  # do not wait
    assert ask(held, EMPTY)[0] == EMPTY  # it may still be on its way
    for _ in range(2):
        clock.seconds += UNFETCHED_S
        assert ask(held, EMPTY)[0] == delivery()
    fetched = PullObjectRequest(node=Node(node_id=NODE), object_id="root-part")
    held.on_fetch(fetched.SerializeToString())
    clock.seconds += UNFETCHED_S
    assert ask(held, EMPTY)[0] == EMPTY


def test_fetching_another_message_or_as_another_node_does_not_count():
    clock = Clock()
    held = questions(clock)
    ask(held, delivery())
    held.end()
    for node, name in ((NODE, "another"), (NODE + 1, "root")):
        request = PullObjectRequest(node=Node(node_id=node), object_id=name)
        held.on_fetch(request.SerializeToString())
    held.on_fetch(b"\xff garbage")
    clock.seconds += UNFETCHED_S
    assert ask(held, EMPTY)[0] == delivery()


def test_a_delivery_whose_time_is_over_is_forgotten():
    clock = Clock()
    held = questions(clock)
    ask(held, delivery(ttl=-1.0))
    held.end()
    clock.seconds += UNFETCHED_S
    assert ask(held, EMPTY)[0] == EMPTY
