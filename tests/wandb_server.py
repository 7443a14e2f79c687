"""A W&B server that fits in two files: it answers on loopback as far as this project talks to one, and remembers.

It takes runs that are logged online or sent by `wandb sync`, their alerts and artifacts, saved Reports, and a sweep
with its agent; W&B's public API finds the runs again and downloads the artifacts. wandb_graphql knows the answers.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from wandb_graphql import Received


def client(
    url: str, folder: Path, *arguments: str, base: Mapping[str, str] = os.environ, **more: str
) -> subprocess.CompletedProcess[str]:
    """A Python program that talks to a server: in a process of its own, because wandb reads the address once."""
    environment = {
        **base,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
        "WANDB_BASE_URL": url,
        "WANDB_API_KEY": "0" * 40,
        "WANDB_DATA_DIR": str(folder),
        **more,
    }
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def handler(received: Received) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None: ...

        def _body(self) -> bytes:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            return gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body

        def _reply(self, body: bytes, status: int = 200) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            content = json.loads(self._body() or b"{}")
            if self.path == "/graphql":
                with received.lock:
                    data = received.answer(content["query"], content.get("variables") or {})
                self._reply(json.dumps({"data": data}).encode())
            else:
                with received.lock:
                    received.stream(self.path.split("/")[-2], content)  # /files/<entity>/<project>/<run>/file_stream
                self._reply(b'{"exitcode": null, "limits": {}}')

        def do_PUT(self) -> None:
            body = self._body()
            with received.lock:
                received.put(unquote(self.path.removeprefix("/upload/")), body)
            self._reply(b"{}")

        def do_GET(self) -> None:
            body = received.get(unquote(self.path.removeprefix("/upload/")))
            self._reply(b"" if body is None else body, 404 if body is None else 200)

    return Handler


class Server(ThreadingHTTPServer):
    """Quiet about clients that hang up."""

    daemon_threads = True

    def handle_error(self, *_: Any) -> None: ...


@contextmanager
def wandb_server() -> Iterator[Received]:
    """Serves on loopback while the block runs."""
    received = Received()
    with Server(("127.0.0.1", 0), handler(received)) as server:
        received.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield received
        finally:
            server.shutdown()
            thread.join()
