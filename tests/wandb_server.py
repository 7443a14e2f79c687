"""A W&B server that fits in a file: it answers on loopback as far as runs, a sweep and its agent need.

It remembers what it was sent.
"""

from __future__ import annotations

import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

VIEWER = {"id": "1", "username": "me", "entity": "me", "email": "", "flags": "{}", "teams": {"edges": []}}
BUCKET = {
    "id": "1",
    "displayName": "run",
    "config": "{}",
    "historyLineCount": 0,
    "project": {"id": "1", "name": "project", "entity": {"id": "1", "name": "me"}},
}


class Received:
    """What the server was sent: rows of history, summary, config, files, exit code, a sweep; what it hands an agent."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.config: dict[str, Any] = {}
        self.files: dict[str, bytes] = {}
        self.exit_code: int | None = None
        self.bucket: dict[str, Any] = {}
        self.url = ""
        self.sweep = ""
        self.arguments: list[dict[str, Any]] = []
        """The parameters of the runs that an agent is still to be given, one run at a time."""

    def query(self, text: str, variables: dict[str, Any]) -> dict[str, Any]:
        """Answers a GraphQL query."""
        if "upsertBucket" in text:
            self.bucket |= {key: value for key, value in variables.items() if value is not None}
            config = json.loads(variables.get("config") or "{}")
            self.config |= {key: one["value"] for key, one in config.items()}
            return {"upsertBucket": {"bucket": {**BUCKET, "name": variables.get("name")}, "inserted": True}}
        if "createRunFiles" in text:
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}
        if "upsertSweep" in text:
            self.sweep = variables["config"]
            return {"upsertSweep": {"sweep": {"name": "sweep1", "project": BUCKET["project"]}}}
        if "sweep(sweepName" in text:
            return {"project": {"sweep": {"name": "sweep1", "config": self.sweep, "runs": {"edges": []}}}}
        if "createAgent" in text:
            return {"createAgent": {"agent": {"id": "agent1"}}}
        if "agentHeartbeat" in text:
            commands = json.dumps(self._commands(json.loads(variables["runState"])))
            return {"agentHeartbeat": {"agent": {"id": "agent1"}, "commands": commands}}
        return {"viewer": VIEWER} if "viewer" in text.lower() else {}

    def _commands(self, running: dict[str, bool]) -> list[dict[str, Any]]:
        """What an agent is to do next: nothing while a run is under way, then another run, in the end nothing more."""
        if running:
            return []
        if not self.arguments:
            return [{"type": "exit"}]
        values = self.arguments.pop(0)
        program = re.search(r"(?m)^program: (.*)$", self.sweep)
        assert program is not None
        arguments = {key: {"value": value} for key, value in values.items()}
        return [{"type": "run", "run_id": f"run{len(self.arguments)}", "program": program[1], "args": arguments}]

    def stream(self, content: dict[str, Any]) -> None:
        """Takes a message of the file stream."""
        files = content.get("files", {})
        self.rows += [json.loads(line) for line in files.get("wandb-history.jsonl", {}).get("content", [])]
        for line in files.get("wandb-summary.json", {}).get("content", []):
            self.summary = json.loads(line)
        if content.get("complete"):
            self.exit_code = content.get("exitcode")


def handler(received: Received) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None: ...

        def _body(self) -> bytes:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            return gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body

        def _reply(self, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            content = json.loads(self._body() or b"{}")
            if self.path == "/graphql":
                self._reply({"data": received.query(content["query"], content.get("variables") or {})})
            else:
                received.stream(content)
                self._reply({"exitcode": None, "limits": {}})

        def do_PUT(self) -> None:
            received.files[self.path.removeprefix("/upload/")] = self._body()
            self._reply({})

        def do_GET(self) -> None:
            self._reply({})

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
