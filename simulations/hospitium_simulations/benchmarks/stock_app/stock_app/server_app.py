"""Times exchanges with every node, the way Flower's own strategies make them."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Wait for every node, exchange, and write the seconds of each exchange."""
    config = context.run_config
    while len(list(grid.get_node_ids())) < int(config["sites"]):
        time.sleep(0.2)
    seconds = []
    for exchange in range(int(config["exchanges"])):
        # Fresh numbers every time: Flower stores and sends equal content only once.
        numbers = np.random.default_rng(exchange).standard_normal(
            int(config["numbers"]), dtype=np.float32
        )
        content = RecordDict({"model": ArrayRecord([numbers])})
        begun = time.monotonic()
        messages = [
            Message(content, dst_node_id=node, message_type="train") for node in grid.get_node_ids()
        ]
        answers = list(grid.send_and_receive(messages))
        seconds.append(time.monotonic() - begun)
        if len(answers) != int(config["sites"]) or any(one.has_error() for one in answers):
            raise RuntimeError("expected an answer from every node")
    Path(str(config["result"])).write_text(json.dumps(seconds), encoding="utf-8")
