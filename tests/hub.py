"""A Hugging Face hub on loopback: folders are its repositories, and what it was asked is kept.

    ROOT/models/OWNER/NAME/...    ROOT/datasets/OWNER/NAME/...
"""

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + 34 * "0"
BROKEN = "broken"  # for the repositories of this owner, the hub answers 500


class Handler(BaseHTTPRequestHandler):
    """What huggingface_hub asks: a repository's commit, the list of its files, and each file."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        api = re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(/tree/\w+)?(/revision/\w+)?", path)
        file = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/\w+/(.+)", path)
        if api is None and file is None:
            # It also asks about the program that it is used by.
            return self.answer(404, {})
        kind = api[1] if api else file[1] or "models"
        name = (api or file)[2]
        self.server.asked.append((self.command, path))
        folder = self.server.root / kind / name
        if self.server.is_down or name.startswith(f"{BROKEN}/"):
            self.answer(500, {})
        elif not folder.is_dir():
            self.answer(404, {"X-Error-Code": "RepoNotFound"})
        elif file and (folder / file[3]).is_file():
            content = (folder / file[3]).read_bytes()
            self.answer(200, {"X-Repo-Commit": COMMIT, "ETag": f'"{digest(content)}"'}, content)
        elif file:
            self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        elif api[3]:
            self.answer(200, {}, json.dumps(list_files(folder)).encode())
        else:
            self.answer(200, {}, json.dumps({"id": name, "sha": COMMIT}).encode())

    do_HEAD = do_GET

    def answer(self, status: int, headers: dict, content: bytes = b""):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(content)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def list_files(folder: Path) -> list[dict]:
    entries = []
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            entries.append({"type": "file", "path": file.relative_to(folder).as_posix(),
                            "size": file.stat().st_size, "oid": digest(file.read_bytes())[:40]})
    return entries


@contextmanager
def serve(root: Path):
    """A running hub: `url`, `asked` (a list of method and path), and `is_down`, which makes every answer 500."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.root = root
        server.asked = []
        server.is_down = False
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
