"""A hub on loopback that serves one small repository the way huggingface.co does, and fails as
told.

`mode` is `fine`, a status code as text (`401`), `cut` (half of the weights, then nobody answers any
more: `gone`), `blink` (the same once, then all is fine), `short` (half of what is asked for, every
    time) or `portal` (a page instead of an answer).
"""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """`files` is name → bytes of the repository, whatever it is called; `data` the same of a data
    set, where that differs. `sent` says which byte ranges of the weights went out, `asked` which
    paths were asked for.
    """

    def __init__(
        self,
        files: dict[str, bytes],
        weights: str = "model.safetensors",
        data: dict[str, bytes] | None = None,
    ):
        self.files, self.weights, self.mode = files, weights, "fine"
        self.data = data
        self.sent: list[tuple[int, int]] = []
        self.asked: list[str] = []
        self.tokens: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_HEAD(self):
                self.answer(body=False)

            def do_GET(self):
                self.answer(body=True)

            def answer(self, body: bool) -> None:
                hub.tokens.append(self.headers.get("Authorization", ""))
                if hub.mode == "gone":
                    self.close_connection = True
                    return
                if hub.mode.isdigit():
                    self.send_response(int(hub.mode))
                    self.send_header("X-Error-Message", f"no: {self.headers.get('Authorization')}")
                    self.finish_with(b"")
                    return
                path = self.path.split("?")[0]
                hub.asked.append(path)
                self.files = hub.files
                if hub.data is not None and "datasets/" in path:
                    self.files = hub.data
                if path == "/":  # whether the hub can be reached
                    self.send_response(200)
                    self.finish_with(b"")
                    return
                if path.startswith("/api/"):
                    siblings = [
                        {"rfilename": n, "size": len(c), "blobId": blob(c)}
                        for n, c in self.files.items()
                    ]
                    tree = [
                        {"type": "file", "path": n, "size": len(c), "oid": blob(c)}
                        for n, c in self.files.items()
                    ]
                    said = (
                        tree
                        if "/tree/" in path
                        else {"id": "a/b", "sha": SHA, "siblings": siblings}
                    )
                    self.send_response(200)
                    self.send_header("Content-Type", "application/json")
                    self.finish_with(
                        b"<html>please log in"
                        if hub.mode == "portal"
                        else json.dumps(said).encode()
                    )
                    return
                self.file(path.split("/resolve/")[1].split("/", 1)[1], body)

            def finish_with(self, content: bytes) -> None:
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def file(self, name: str, body: bool) -> None:
                if name not in self.files:
                    self.send_response(404)
                    self.send_header("X-Error-Code", "EntryNotFound")
                    self.finish_with(b"")
                    return
                content, start = self.files[name], 0
                if wanted := self.headers.get("Range"):
                    start = int(wanted.removeprefix("bytes=").split("-")[0])
                self.send_response(206 if wanted else 200)
                self.send_header("ETag", f'"{blob(content)}"')
                self.send_header("X-Repo-Commit", SHA)
                self.send_header("Accept-Ranges", "bytes")
                if wanted:
                    self.send_header(
                        "Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}"
                    )
                self.send_header("Content-Length", str(len(content) - start))
                self.end_headers()
                if not body:
                    return
                end = len(content)
                if name == hub.weights and hub.mode in ("cut", "short", "blink"):
                    end = (start + len(content)) // 2
                    hub.mode = {"cut": "gone", "blink": "fine"}.get(hub.mode, hub.mode)
                    self.close_connection = True
                self.wfile.write(content[start:end])
                if name == hub.weights:
                    hub.sent.append((start, end))

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def blob(content: bytes) -> str:
    """The name that git gives to a file's content, which is the hub's ETag."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
