"""An S3-compatible server on the loopback interface (moto), whose requests are watched, refused, lost and changed.

with serve() as server:                 # for processes that have ``server.environment``
    server.objects()                    # key → bytes of all that is in the bucket
    server.rule = lambda method, key: DENIED if method == "PUT" else None
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from featurecache.files import storage

BUCKET = "bucket"
KEY, SECRET = "AKIDOFTHETESTS", "secret/of+the/tests"  # which must be found nowhere
CREDENTIALS = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"}

Answer = tuple[str, str, str]  # status line, code and message of an error
BUSY = ("503 Service Unavailable", "ServiceUnavailable", "try again")
DENIED = ("403 Forbidden", "AccessDenied", "Access Denied")


class Server:
    """``rule(method, key)``: an error in the place of the server's answer, or None; ``lost``: the same, once what was
    asked has been carried out; ``changed(key, body)``: what is sent of an object; ``lenient``: no condition counts."""

    address = f"s3://{BUCKET}/caches/main"

    def __init__(self, app: Any) -> None:
        self._app, self._turn = app, threading.Lock()
        self.environment = {**CREDENTIALS, "AWS_MAX_ATTEMPTS": "2", "AWS_EC2_METADATA_DISABLED": "true"}
        self.requests: list[tuple[str, str]] = []
        self.reset()

    def reset(self) -> None:
        self.rule: Callable[[str, str], Answer | None] = lambda method, key: None
        self.lost: Callable[[str, str], Answer | None] = lambda method, key: None
        self.changed: Callable[[str, bytes], bytes] = lambda key, body: body
        self.lenient = False
        self.requests.clear()

    def __call__(self, environ: dict[str, Any], start: Any) -> Any:
        key = environ["PATH_INFO"].removeprefix(f"/{BUCKET}").removeprefix("/")
        method = environ["REQUEST_METHOD"]
        with self._turn:  # moto looks at a condition and stores an object in two steps
            self.requests.append((method, key))
            if answer := self.rule(method, key):
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                return _refuse(answer, start)
            if self.lenient:
                environ.pop("HTTP_IF_NONE_MATCH", None)
            held: list[Any] = []
            body = b"".join(self._app(environ, lambda *words: held.append(words)))
            if answer := self.lost(method, key):
                return _refuse(answer, start)
            start(*held[0])
            return [self.changed(key, body) if method == "GET" and key else body]

    def of(self, method: str) -> list[str]:
        """Keys of the requests of a kind, without those that list."""
        return [key for each, key in self.requests if each == method and key]

    def _backend(self) -> Any:
        from moto.s3.models import s3_backends

        return s3_backends["123456789012"]["aws"]

    def objects(self) -> dict[str, bytes]:
        keys = self._backend().buckets[BUCKET].keys
        return {key: keys[key].value for key in sorted(keys)}

    def write(self, key: str, data: bytes) -> None:
        """As somebody else would."""
        self._backend().put_object(BUCKET, key, data)

    def empty(self) -> None:
        for key in self.objects():
            self.remove(key)

    def remove(self, key: str) -> None:
        self._backend().delete_object(BUCKET, key)


def _refuse(answer: Answer, start: Any) -> list[bytes]:
    status, code, message = answer
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
    start(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
    return [body]


@contextlib.contextmanager
def serve() -> Iterator[Server]:
    from moto.s3.models import s3_backends
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log(self, *_: Any, **__: Any) -> None:
            pass

    server = Server(DomainDispatcherApplication(create_backend_app))
    made = make_server("127.0.0.1", 0, server, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    server.environment["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{made.server_port}"
    s3_backends["123456789012"]["aws"].create_bucket(BUCKET, "us-east-1")
    try:
        yield server
    finally:
        made.shutdown()
        made.server_close()
        thread.join()


@contextlib.contextmanager
def machine(name: str) -> Iterator[None]:
    """Another machine: it has a state folder of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEATURECACHE_STATE", f"{os.environ['FEATURECACHE_STATE']}-{name}")
        yield


def copied(server: Server, folder: Path) -> Path:
    """The bucket as a folder, as any tool copies it."""
    shutil.rmtree(folder, ignore_errors=True)
    for key, data in server.objects().items():
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        (folder / key).write_bytes(data)
    return folder / server.address.removeprefix(f"s3://{BUCKET}/")


@contextlib.contextmanager
def killed_at_upload(at: int, where: str) -> Iterator[None]:
    """The upload of this number never ends: it is killed before, or behind what it does."""
    from support.caches import Killed

    numbers = itertools.count(1)

    def killing(upload: Callable[..., Any]) -> Callable[..., Any]:
        def killed(*words: Any) -> Any:
            number = next(numbers)
            if number == at and where == "before":
                raise Killed
            try:
                return upload(*words)
            finally:
                if number == at:
                    raise Killed

        return killed

    with pytest.MonkeyPatch.context() as patch:
        for name in ("upload_record", "upload_file"):
            patch.setattr(storage, name, killing(getattr(storage, name)))
        yield
