"""A Hugging Face Hub on this machine, as much of its HTTP as huggingface_hub needs to push a folder and fetch one."""

from __future__ import annotations

import base64
import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Handler(BaseHTTPRequestHandler):
    root: Path  # files of "user/repo" in a folder of that name
    log: list[str]

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, value: Any = None, status: int = 200, **headers: str) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, content in headers.items():
            self.send_header(name.replace("_", "-"), content)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = b""
        while size := int(self.rfile.readline(), 16):
            parts += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return parts

    def do_POST(self) -> None:
        path, body = urlsplit(self.path).path, self.body()
        self.log.append(f"POST {path}")
        if path == "/api/repos/create":
            about = json.loads(body)
            name = f"{about.get('organization') or 'user'}/{about['name']}"
            (self.root / name).mkdir(parents=True, exist_ok=True)
            return self.answer({"url": f"http://{self.headers['Host']}/{name}", "name": name})
        if path == "/api/validate-yaml":  # of a model card
            return self.answer({"errors": [], "warnings": []})
        repo, _, action = path.removeprefix("/api/models/").partition("/preupload/")
        if action:
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            return self.answer({"files": modes})
        repo, _, action = path.removeprefix("/api/models/").partition("/commit/")
        if action:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    file = self.root / repo / entry["value"]["path"]
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(base64.b64decode(entry["value"]["content"]))
            url = f"http://{self.headers['Host']}/{repo}/commit/{COMMIT}"
            return self.answer({"commitUrl": url, "commitOid": COMMIT, "success": True})
        self.answer({"error": "not found"}, 404)

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.log.append(f"{self.command} {path}")
        if path == "/api/whoami-v2":
            return self.answer({"name": "user", "type": "user", "orgs": [], "auth": {"type": "access_token"}})
        if path.startswith("/api/models/"):
            name = "/".join(path.removeprefix("/api/models/").split("/")[:2])
            if not (self.root / name).is_dir():
                return self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            files = sorted(p for p in (self.root / name).rglob("*") if p.is_file())
            siblings = [{"rfilename": str(p.relative_to(self.root / name)), "size": p.stat().st_size} for p in files]
            if "/tree/" in path:
                tree = [{"type": "file", "path": s["rfilename"], "size": s["size"], "oid": COMMIT} for s in siblings]
                return self.answer(tree)
            return self.answer(
                {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
            )
        name, _, rest = path.strip("/").partition("/resolve/")
        file = self.root / name / rest.partition("/")[2]
        if not file.is_file():
            return self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
        content = file.read_bytes()
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        self.answer(content, X_Repo_Commit=COMMIT, ETag=etag, Accept_Ranges="bytes")

    do_HEAD = do_GET


class Server:
    """Serves the folders ``root``/user/repo at ``url``; ``log`` has the requests."""

    def __init__(self, root: Path):
        self.log: list[str] = []
        handler = type("Bound", (Handler,), {"root": root, "log": self.log})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
