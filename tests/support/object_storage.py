"""An S3-compatible server on the loopback interface (moto), whose requests can be watched, delayed, refused and changed.

    with serve() as server:         # the environment of this process and its children points there
        server.objects()            # key → bytes of all that is in the bucket
        server.at("PUT", 3, kill)   # called before the third request of this kind
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

BUCKET = "bucket"
KEY, SECRET = "AKIDOFTHETESTS", "secret/of+the/tests"  # noqa: S105  # which must be found nowhere
CREDENTIALS = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"}

Answer = tuple[str, str, str]  # status line, code and message of an error
SLOW = ("503 Slow Down", "SlowDown", "Please reduce your request rate.")
BUSY = ("503 Service Unavailable", "ServiceUnavailable", "try again")
DENIED = ("403 Forbidden", "AccessDenied", "Access Denied")


class Server:
    """``rule(method, key)`` may give an answer in the place of the server's own; ``after(method, key)`` is called when
    a request was carried out."""

    def __init__(self, app: Any) -> None:
        self._app, self._turn = app, threading.Lock()
        self.rule: Callable[[str, str], Answer | None] = lambda method, key: None
        self.after: Callable[[str, str], None] = lambda method, key: None
        self.requests: list[tuple[str, str]] = []
        self.address = f"s3://{BUCKET}/caches/main"

    def __call__(self, environ: dict[str, Any], start: Any) -> Any:
        key = environ["PATH_INFO"].removeprefix(f"/{BUCKET}").removeprefix("/")
        method = environ["REQUEST_METHOD"]
        with self._turn:  # moto looks at a condition and stores an object in two steps
            self.requests.append((method, key))
            if answer := self.rule(method, key):
                status, code, message = answer
                body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                start(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
                return [body]
            parts = list(self._app(environ, start))
            self.after(method, key)
            return parts

    def puts(self) -> list[str]:
        return [key for method, key in self.requests if method == "PUT"]

    def _bucket(self) -> Any:
        from moto.s3.models import s3_backends

        return next(iter(s3_backends.values()))["aws"].buckets[BUCKET]

    def objects(self) -> dict[str, bytes]:
        return {key: self._bucket().keys[key].value for key in sorted(self._bucket().keys)}

    def write(self, key: str, data: bytes) -> None:
        """As somebody else would."""
        from moto.s3.models import s3_backends

        next(iter(s3_backends.values()))["aws"].put_object(BUCKET, key, data)

    def remove(self, key: str) -> None:
        del self._bucket().keys[key]


@contextlib.contextmanager
def serve() -> Iterator[Server]:
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log(self, *_: Any, **__: Any) -> None:
            pass

    server = Server(DomainDispatcherApplication(create_backend_app))
    made = make_server("127.0.0.1", 0, server, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    settings = {**CREDENTIALS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{made.server_port}", "AWS_MAX_ATTEMPTS": "2"}
    try:
        with mock.patch.dict(os.environ, {**settings, "AWS_EC2_METADATA_DISABLED": "true"}):
            import fsspec

            fsspec.filesystem("s3", skip_instance_cache=True).mkdir(BUCKET)
            yield server
    finally:
        made.shutdown()
        made.server_close()
        thread.join()
