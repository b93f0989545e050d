"""The service under uvicorn, on a socket of its own, until Ctrl-C."""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator

import uvicorn
from fastapi import FastAPI

from ...spec.errors import MoeplanError
from ..jobs.pool import Pool
from ..jobs.settings import Settings
from .app import create_app

HEAD = 2**16  # bytes of a request before its body
LAST = 5  # seconds that answers under way have at the end


class Server(uvicorn.Server):
    """Ends by SIGINT and SIGTERM, and does not pass them on: to end is what they ask for."""

    def __init__(self, config: uvicorn.Config, app: FastAPI) -> None:
        super().__init__(config)
        self._app = app

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():  # which alone can listen to signals
            yield
            return
        before = {number: signal.signal(number, self._end) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _end(self, number: int, frame: object) -> None:
        self._app.state.ending.set()  # what is told piece by piece ends
        self.should_exit = True


def serve(settings: Settings, started: Callable[[str], object], pool: Pool | None = None) -> None:
    """Serve until a signal. started: hears the URL at the start. pool: where jobs run. Raises MoeplanError."""
    listener = _listener(settings.host, settings.port)
    with listener:
        app = create_app(settings, pool=pool)
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            lifespan="on",
            timeout_graceful_shutdown=LAST,
            h11_max_incomplete_event_size=HEAD,
        )
        host, port = listener.getsockname()[:2]
        started(f"http://{f'[{host}]' if ':' in host else host}:{port}")
        server = Server(config, app)
        server.run(sockets=[listener])
        if not server.started:
            raise MoeplanError("the service did not start; the lines above say why")


def _listener(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises MoeplanError where the address cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or error
        raise MoeplanError(f"--host {host} --port {port}: cannot be had ({reason})") from None
