"""Sends back other numbers than it gets, as training would."""

from __future__ import annotations

import numpy as np
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Move every number: equal content would be stored, and sent, only once."""
    model = message.content.array_records["model"].to_numpy_ndarrays()
    moved = [array + np.float32(context.node_id % 1000 + 1) for array in model]
    return Message(RecordDict({"model": ArrayRecord(moved)}), reply_to=message)
