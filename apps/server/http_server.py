"""uvicorn as this server runs it."""

import argparse
import asyncio
import signal
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from .connections import MOST, Connection
from .log import log_config

BROKEN_OFF_SECONDS = 5  # for clients to hear that their answers are broken off


class HttpServer(uvicorn.Server):
    """uvicorn that ends in time, and with a clean second Ctrl-C: it breaks off answers and ends the application.

    Running answers have `drain` seconds to finish once the server is told to end; then `break_off` is called, in a
    thread, and clients that still hold on are cut off. A third Ctrl-C kills the process.
    """

    def __init__(self, config: uvicorn.Config, drain: float = 60.0, break_off: Callable[[], None] = lambda: None):
        super().__init__(config)
        self.drain = drain
        self.break_off = break_off

    def handle_exit(self, sig: int, frame) -> None:
        if self.force_exit:
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        if counter % 50 == 0:  # every five seconds
            for connection in list(self.server_state.connections):
                connection.close_if_late()
        return await super().on_tick(counter)

    async def shutdown(self, sockets=None) -> None:
        clock = asyncio.get_running_loop().time
        ending = asyncio.ensure_future(super().shutdown(sockets))
        deadline, told = clock() + self.drain, False
        while not ending.done():
            if clock() > deadline and not told:
                told, deadline = True, clock() + BROKEN_OFF_SECONDS
                await asyncio.to_thread(self.break_off)
            if self.force_exit or (told and clock() > deadline):
                for connection in list(self.server_state.connections):
                    connection.transport.abort()
            await asyncio.wait([ending], timeout=0.1)
        if self.force_exit:
            await self.lifespan.shutdown()


def http_config(app: FastAPI, arguments: argparse.Namespace) -> uvicorn.Config:
    """An HTTP server that behaves the same whatever else is installed; uvloop, where it is, only makes it faster."""
    Connection.most = min(MOST, _open_files() - 128)
    json_log = {"log_config": log_config()} if getattr(arguments, "log_json", False) else {}
    return uvicorn.Config(
        app,
        host=arguments.host,
        port=arguments.port,
        loop="auto",
        http=Connection,
        ws="none",
        server_header=False,
        timeout_keep_alive=arguments.keep_alive,
        **json_log,
    )


def _open_files() -> int:
    """How many files may be open: as many as the system lets this process ask for."""
    try:
        import resource
    except ImportError:  # Windows
        return 2 * MOST
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 2 * MOST and soft != resource.RLIM_INFINITY:
        soft = 2 * MOST if hard == resource.RLIM_INFINITY else min(2 * MOST, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return 2 * MOST if soft == resource.RLIM_INFINITY else soft
