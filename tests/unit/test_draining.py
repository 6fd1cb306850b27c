"""The sockets of a server are found and shut, and nothing else is touched or left open."""

import gc
import os
import socket

from runtime.draining import Drain


async def test_only_the_connections_to_the_port_are_shut() -> None:
    with socket.create_server(("127.0.0.1", 0)) as ours, socket.create_server(("127.0.0.1", 0)) as other:
        port = ours.getsockname()[1]
        with (
            socket.create_connection(("127.0.0.1", port)) as client,
            ours.accept()[0] as served,
            socket.create_connection(other.getsockname()) as stranger,
            other.accept()[0] as elsewhere,
        ):
            # What other tests left to the garbage collector may be closed meanwhile.
            gc.collect()
            before = set(os.listdir("/dev/fd"))
            await Drain().run(port)
            assert set(os.listdir("/dev/fd")) <= before
            assert client.recv(1) == b""
            assert served.recv(1) == b""
            stranger.send(b"x")
            assert elsewhere.recv(1) == b"x"
            with socket.socket() as late:
                late.settimeout(0.1)
                assert late.connect_ex(("127.0.0.1", port)) != 0
