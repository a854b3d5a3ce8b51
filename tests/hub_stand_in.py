"""A stand-in for the Hugging Face hub on this machine: who asks, repositories, and commits with large files."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_" + "a" * 34


class Hub:
    """The stand-in's answers, and a record of what it was asked for.

    Attributes:
        role: of the token that is known.
        refuse: the status of the answer to whoever makes a repository or asks to write into one; None: they may.
        repositories: what was said of each when it was made.
        files: of the last commit, by their paths; the content of large ones was uploaded beforehand.
        cards: that were sent to be looked at.
    """

    def __init__(self) -> None:
        self.endpoint = ""
        self.role = "write"
        self.refuse: int | None = None
        self.repositories: dict[str, dict[str, Any]] = {}
        self.files: dict[str, bytes] = {}
        self.cards: list[str] = []
        self.asked: list[str] = []
        self._large: dict[str, bytes] = {}

    def answer(self, method: str, path: str, token: str, body: bytes) -> tuple[int, Any]:
        path = path.partition("?")[0]
        self.asked.append(f"{method} {path}")
        if path == "/api/validate-yaml":
            self.cards.append(json.loads(body)["content"])
            return 200, {"errors": [], "warnings": []}
        if method == "PUT":
            self._large[path.rpartition("/")[2]] = body
            return 200, {}
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "who are you"}
        if path == "/api/whoami-v2":
            return 200, {"name": "anna", "auth": {"accessToken": {"role": self.role}}}
        if path.endswith("/auth-check/write"):
            there = path.removeprefix("/api/models/").removesuffix("/auth-check/write") in self.repositories
            return (self.refuse or 200, {}) if there else (404, {})
        if path == "/api/repos/create":
            if self.refuse is not None:
                return self.refuse, {"error": "not for you"}
            facts = json.loads(body)
            name = f"{facts['organization']}/{facts['name']}"
            self.repositories[name] = facts
            return 200, {"url": f"{self.endpoint}/{name}", "name": name}
        if "/preupload/" in path:
            return 200, {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                        "oid": None,
                    }
                    for file in json.loads(body)["files"]
                ]
            }
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.endpoint}/large/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        if "/commit/" in path:
            self._commit([json.loads(line) for line in body.splitlines() if line])
            return 200, {"commitUrl": f"{self.endpoint}/anna/emoji/commit/1", "commitOid": "1" * 40}
        return 404, {"error": path}

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                self.files[value["path"]] = self._large[value["oid"]]


@contextmanager
def hub() -> Iterator[Hub]:
    """Inside, a stand-in listens at its `endpoint`."""
    served = Hub()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = self._chunks()
            status, content = served.answer(self.command, self.path, self.headers.get("Authorization") or "", body)
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = answer

        def _chunks(self) -> bytes:
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
