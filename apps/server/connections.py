"""HTTP/1.1 connections: cheap events, and limits on what a client can hold."""

import h11
from h11._writers import ChunkedWriter
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_BYTES = 1 << 16  # of a request line with its headers
HEAD_SECONDS = 30  # for them to arrive
UNREAD_SECONDS = 60  # a client may read nothing of what is sent to it
MOST = 4096  # connections


class Http11(h11.Connection):
    """h11 with a short way for chunks of a body, which need none of its checks."""

    def send(self, event):
        if type(event) is h11.Data and event.data and type(self._writer) is ChunkedWriter:
            return b"%x\r\n%b\r\n" % (len(event.data), event.data)
        return super().send(event)


class Connection(H11Protocol):
    """One connection. One that waits for too long is closed; of too many, the one that has waited longest."""

    most = MOST

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.conn = Http11(h11.SERVER, HEAD_BYTES)
        self.waits_since = self.loop.time()
        self._unread_since: float | None = None

    @property
    def waits(self) -> bool:
        """Whether no request is under way."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.most:
            waiting = [connection for connection in self.connections if connection.waits]
            if waiting:
                min(waiting, key=lambda connection: connection.waits_since).transport.abort()

    def on_response_complete(self) -> None:
        self.waits_since = self.loop.time()
        super().on_response_complete()

    def pause_writing(self) -> None:
        self._unread_since = self.loop.time()
        super().pause_writing()

    def resume_writing(self) -> None:
        self._unread_since = None
        super().resume_writing()

    def close_if_late(self) -> None:
        """Cut off a client that has not read for long; close a connection on which no request has come for long."""
        now = self.loop.time()
        if self._unread_since is not None and now - self._unread_since > UNREAD_SECONDS:
            self.transport.abort()
        begun = self.cycle is None or self.conn.trailing_data[0]
        if self.waits and now - self.waits_since > (HEAD_SECONDS if begun else self.timeout_keep_alive):
            self.transport.abort()
