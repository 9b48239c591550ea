"""The Flower ClientApp: a message's bytes to the trainer, the trainer's bytes back; nothing else.

It runs in the site's own node and, unchanged, under a stock ``flower-supernode`` whose FAB holds
nothing but configuration. Where the trainer listens is the node's to say, never the coordinator's.
"""

from __future__ import annotations

import time
from functools import lru_cache
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from hospitium_client.trainer_service import TrainerClient
from hospitium_common.errors import ConfigError
from hospitium_common.flower_record import as_record, payload_of

SOCKET_KEY = "trainer-socket"

app = ClientApp()


@app.query("exchange")
def exchange(message: Message, context: Context) -> Message:
    """Answer one message for as long as it lives."""
    socket = context.node_config.get(SOCKET_KEY)
    if not isinstance(socket, str):
        raise ConfigError(f"expected {SOCKET_KEY} in the node's configuration, got none")
    left_s = message.metadata.created_at + message.metadata.ttl - time.time()
    answer = _trainer(socket).exchange(payload_of(message.content), deadline_s=max(left_s, 1.0))
    return Message(as_record(answer), reply_to=message)


@lru_cache(maxsize=1)
def _trainer(socket: str) -> TrainerClient:
    return TrainerClient(Path(socket))
