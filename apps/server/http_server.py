"""uvicorn as this server runs it."""

import argparse
import asyncio
import signal

import uvicorn
from fastapi import FastAPI


class HttpServer(uvicorn.Server):
    """uvicorn with a clean second Ctrl-C: it breaks off answers and ends the application. A third kills the process."""

    def handle_exit(self, sig: int, frame) -> None:
        if self.force_exit:
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets=None) -> None:
        ending = asyncio.ensure_future(super().shutdown(sockets))
        while not ending.done():
            if self.force_exit:
                for connection in list(self.server_state.connections):
                    connection.transport.abort()
            await asyncio.wait([ending], timeout=0.1)
        if self.force_exit:
            await self.lifespan.shutdown()


def http_config(app: FastAPI, arguments: argparse.Namespace) -> uvicorn.Config:
    """An HTTP server that is the same whatever else is installed: uvicorn's own choice goes by what it finds."""
    return uvicorn.Config(
        app,
        host=arguments.host,
        port=arguments.port,
        loop="asyncio",
        http="h11",
        ws="none",
        server_header=False,
        timeout_keep_alive=arguments.keep_alive,
    )
