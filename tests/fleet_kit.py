"""A coordinator's end for a node under test: a real SuperLink over TLS, and a ServerApp's hands."""

import asyncio
import contextlib
import datetime
import socket
import ssl
import threading
import time

import uvicorn
from flwr.app import Message, RecordDict
from flwr.app.metadata import Metadata
from flwr.common.constant import (
    NOOP_ACCOUNT_NAME,
    NOOP_FLWR_AID,
    SUPERLINK_NODE_ID,
    SubStatus,
)
from flwr.supercore.constant import NOOP_FEDERATION_ID, NodeStatus, TaskType
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_children_ids_from_object_content,
    get_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from hospitium_common.flower_record import MESSAGE_TYPE, as_record, payload_of
from hospitium_server.certificates import certificate_pem, key_pem, make_ca, make_server_certificate
from hospitium_server.listeners import Gate, PublicListener
from hospitium_server.superlink import SuperLinkOrder, application


def wait_for(condition, within_s=60.0):
    """Wait until something is so; a test that waits for ever says nothing."""
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        found = condition()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError(f"it did not happen within {within_s} s")


class Coordinator:
    """A SuperLink on loopback; ``address`` and ``authority`` (its CA) are what a site pins."""

    def __init__(self, folder):
        now = datetime.datetime.now(datetime.UTC)
        ca_key, ca = make_ca("a test's coordinator", now)
        key, certificate = make_server_certificate(ca_key, ca, ["127.0.0.1", "localhost"], now)
        self.authority = certificate_pem(ca)
        self._certificate, self._key = folder / "server.pem", folder / "server.key"
        self._certificate.write_bytes(certificate_pem(certificate))
        self._key.write_bytes(key_pem(key))
        self._database = str(folder / "superlink.db")
        self.port, self._server, self._thread = 0, None, None
        self.start()

    @property
    def address(self):
        return f"127.0.0.1:{self.port}"

    def start(self):
        """Start, or start again on the same port and database."""
        listening = socket.create_server(("127.0.0.1", self.port))
        self.port = listening.getsockname()[1]
        order = SuperLinkOrder(
            database=self._database,
            certificate=str(self._certificate),
            private_key=str(self._key),
            public_socket=0,
            loopback_socket=0,
            control_token="unused",  # noqa: S106 - a test's token
            executor_secret="00" * 32,
        )
        app = application(order)
        self.state = app.state.linkstate_factory.state()
        self._gate = Gate(app)
        config = uvicorn.Config(
            PublicListener(self._gate), lifespan="off", log_config=None, access_log=False,
            ssl_certfile=order.certificate, ssl_keyfile=order.private_key,
            timeout_graceful_shutdown=1,
        )  # fmt: skip
        config.load()
        config.ssl.minimum_version = ssl.TLSVersion.TLSv1_3
        self._server = uvicorn.Server(config)
        self._server.capture_signals = contextlib.nullcontext
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_until_complete, args=(self._server.serve(sockets=[listening]),)
        )
        self._thread.start()

    def stop(self):
        self._loop.call_soon_threadsafe(self._gate.end)
        self._server.should_exit = True
        self._thread.join()

    def enrol(self, public_key):
        """Register a node's key; return its node id."""
        return self.state.create_node(
            NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, public_key_to_bytes(public_key), 0
        )

    def revoke(self, node_id):
        self.state.delete_node(NOOP_FLWR_AID, node_id)

    def is_online(self, node_id):
        found = self.state.get_node_info(node_ids=[node_id])
        return bool(found) and found[0].status == NodeStatus.ONLINE

    def begin_run(self, fab=None):
        """Begin a run; with a FAB for stock nodes, which fetch one."""
        named = (None, None, None)
        if fab is not None:
            named = ("hospitium/hospitium-run", "1.0.0", self.state.store_fab(fab))
        run = self.state.create_run(
            *named, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP
        )
        task = self.state.get_run_info(run_ids=[run])[0].primary_task_id
        assert self.state.claim_task(task)
        assert self.state.activate_task(task)
        self._task = task
        self._keep_alive()
        return run

    def _keep_alive(self):
        """Without a ServerApp's heartbeat Flower ends the run after a while."""
        self.state.acknowledge_task_heartbeat(self._task)
        timer = threading.Timer(5.0, self._keep_alive)
        timer.daemon = True
        if self._thread.is_alive():
            timer.start()

    def end_run(self):
        assert self.state.finish_task(self._task, SubStatus.COMPLETED, "")

    def send(self, run, node_id, payload, ttl_s=600.0):
        """Put bytes into the node's mailbox, as a ServerApp does; return the message's id."""
        content = payload if isinstance(payload, RecordDict) else as_record(payload)
        metadata = Metadata(
            run_id=run, message_id="", src_node_id=SUPERLINK_NODE_ID, dst_node_id=node_id,
            reply_to_message_id="", group_id="", created_at=time.time(), ttl=ttl_s,
            message_type=MESSAGE_TYPE,
        )  # fmt: skip
        metadata.delivered_at = ""
        message = Message(content=content, metadata=metadata)
        message.metadata.__dict__["_message_id"] = message.object_id
        session = self.state.start_session(run)
        stored, missing = self.state.store_message_and_object_tree(
            message, get_object_tree(message), session
        )
        assert stored
        for name, part in get_all_nested_objects(message).items():
            if name in missing:
                assert self.state.store_object(run, session, name, part.deflate())
        self._loop.call_soon_threadsafe(self._gate.questions.bell.ring)
        return message.object_id

    def reply(self, run, message_id, within_s=20.0):
        """Wait for the whole reply to a message."""
        until, found = time.monotonic() + within_s, []
        while time.monotonic() < until:
            found = found or self.state.get_message_res({message_id}, run)  # given out once
            if found and found[0].has_error():
                return found[0]
            if found:
                with contextlib.suppress(KeyError):
                    return self._whole(found[0])
            time.sleep(0.02)
        raise AssertionError(f"no reply within {within_s} s")

    def ask(self, run, node_id, payload, within_s=20.0):
        return payload_of(self.reply(run, self.send(run, node_id, payload), within_s).content)

    def _whole(self, message):
        store = self.state.object_store
        contents, open_ids = {}, [message.metadata.message_id]
        while open_ids:
            name = open_ids.pop()
            content = store.get(name)
            if not content:
                raise KeyError(name)
            contents[name] = content
            open_ids += get_object_children_ids_from_object_content(content)
        return inflate_object_from_contents(message.metadata.message_id, contents)
