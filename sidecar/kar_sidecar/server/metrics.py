"""Owns the metrics endpoint: an HTTP server for Prometheus on a thread and a port of its own."""

import socket
from threading import Thread
from typing import Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import ThreadingWSGIServer, make_wsgi_app

__all__ = ["MetricsServer"]

POLL_S: Final = 0.05
"""Longest time that `stop` waits for the server's loop; prometheus_client's own server takes up to 0.5 s."""


class _SilentHandler(WSGIRequestHandler):
    """Answers without a log line per request."""

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""


class MetricsServer:
    """Serves one registry until `stop`."""

    def __init__(self, host: str, port: int, registry: CollectorRegistry) -> None:
        """Listen on host and port (0: any free one) and start to answer.

        Raises:
            OSError: the port is taken, or the host is not one of this machine's.
        """
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        server_class = type("_MetricsServer", (ThreadingWSGIServer,), {"address_family": family})
        self._server: WSGIServer = make_server(
            str(address[0]), port, make_wsgi_app(registry), server_class, handler_class=_SilentHandler
        )
        self._thread = Thread(target=self._server.serve_forever, args=(POLL_S,), name="metrics", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self._server.server_port)

    def stop(self) -> None:
        """Stop answering and close the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
