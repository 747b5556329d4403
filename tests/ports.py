"""A port for a job's store that no other process takes before the store listens on it."""

from __future__ import annotations

import socket


class ReservedPort:
    """A TCP port that nobody else is given until it is closed, though a store can listen on it.

    The socket is bound and never listens: Linux hands its port to no other socket that asks for any, nor to an outgoing
    connection. One that names the port may listen on it if it sets SO_REUSEADDR as well, as torch's stores do.
    """

    def __init__(self) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", 0))
        self.number: int = self._socket.getsockname()[1]

    def close(self) -> None:
        self._socket.close()
