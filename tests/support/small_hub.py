"""A Hugging Face hub on this machine: one repository, the files of a folder, by the addresses its client asks for; and
its client's cache, as if somebody had fetched from it before."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

COMMIT = "c" * 40  # of the hub's one repository
CACHED = "0123456789abcdef0123456789abcdef01234567"  # of what `put_in_cache` lays out


def put_in_cache(cache: Path, folder: Path, repo: str, refs: tuple[str, ...] = ("main",), commit: str = CACHED) -> None:
    """Lay a checkpoint out as huggingface_hub does: blobs, snapshots that link to them, refs."""
    home = cache / f"models--{repo.replace('/', '--')}"
    snapshot = home / "snapshots" / commit
    for part in (snapshot, home / "blobs", home / "refs"):
        part.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, home / "blobs" / f"{number:040x}")
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", f"{number:040x}"))
    for ref in refs:
        (home / "refs" / ref).write_text(commit)


@contextmanager
def small_hub(folder: Path, repo: str, kind: str = "datasets") -> Iterator[tuple[str, list[str]]]:
    """(address, names of the files that were asked for) while it serves ``folder`` as ``repo``, a dataset or model."""
    given: list[str] = []

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.command == "GET"
            path = unquote(urlparse(self.path).path)
            files = sorted(file for file in folder.rglob("*") if file.is_file())
            start = f"{'' if kind == 'models' else '/datasets'}/{repo}/resolve/{COMMIT}/"
            if path.startswith(start) and (folder / path.removeprefix(start)).is_file():
                data = (folder / path.removeprefix(start)).read_bytes()
                if body:
                    given.append(path.removeprefix(start))
            elif path.startswith(f"/api/{kind}/{repo}/tree/{COMMIT}"):
                data = json.dumps([_entry(folder, file) for file in files]).encode()
            elif path.startswith(f"/api/{kind}/{repo}"):
                data = json.dumps({"id": repo, "sha": COMMIT, "siblings": []}).encode()
            else:
                return self.send_error(404)
            self.send_response(200)
            headers = {"ETag": f'"{_blob(data)}"', "X-Repo-Commit": COMMIT, "Content-Length": str(len(data))}
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", given
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entry(folder: Path, file: Path) -> dict[str, object]:
    path, data = file.relative_to(folder).as_posix(), file.read_bytes()
    return {"type": "file", "path": path, "size": len(data), "oid": _blob(data)}
