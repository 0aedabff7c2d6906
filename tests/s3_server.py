"""A server on 127.0.0.1 that speaks as much of S3 as `s3fs` asks of it. Objects live in memory."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

PAGE = 100
"""Keys of one page of a listing; S3 gives 1,000."""


class Bucket(ThreadingHTTPServer):
    """One bucket, `bucket`. `requests` counts the requests by method."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Requests)
        self.objects: dict[str, bytes] = {}
        self.requests: dict[str, int] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def environment(self) -> dict[str, str]:
        """For processes that read and write `s3://bucket/…`."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }


@contextmanager
def s3_server() -> Iterator[Bucket]:
    with Bucket() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class _Requests(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Bucket

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        self.key = unquote(address.path).removeprefix("/bucket").removeprefix("/")
        self.query = {name: values[0] for name, values in parse_qs(address.query, keep_blank_values=True).items()}
        self.server.requests[self.command] = self.server.requests.get(self.command, 0) + 1
        body = self._body()
        if not unquote(address.path).startswith("/bucket"):
            self._answer(404)
        elif self.command == "PUT":
            self.server.objects[self.key] = body
            self._answer(200)
        elif self.command == "DELETE":
            self.server.objects.pop(self.key, None)
            self._answer(204)
        elif self.command == "POST":
            self._delete(body.decode())
        elif not self.key:
            self._list()
        elif self.key not in self.server.objects:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        else:
            self._read(self.server.objects[self.key])

    do_PUT = do_POST = do_DELETE = do_HEAD = do_GET  # noqa: N815 - http.server's names

    def _read(self, data: bytes) -> None:
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if found is None:
            self._answer(200, data)
        else:
            self._answer(206, data[int(found[1]) : int(found[2] or len(data)) + 1])

    def _list(self) -> None:
        prefix, after = self.query.get("prefix", ""), self.query.get("continuation-token", "")
        delimiter = self.query.get("delimiter")
        keys = [key for key in sorted(self.server.objects) if key.startswith(prefix) and key > after]
        folders = set()
        if delimiter:
            folders = {key[: key.index("/", len(prefix)) + 1] for key in keys if "/" in key[len(prefix) :]}
            keys = [key for key in keys if "/" not in key[len(prefix) :]]
        page, rest = keys[:PAGE], keys[PAGE:]
        said = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{len(self.server.objects[key])}</Size>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for key in page
        )
        said += "".join(f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>" for folder in folders)
        if rest:
            said += f"<IsTruncated>true</IsTruncated><NextContinuationToken>{escape(page[-1])}</NextContinuationToken>"
        self._answer(200, f"<ListBucketResult>{said}<KeyCount>{len(page)}</KeyCount></ListBucketResult>".encode())

    def _delete(self, wanted: str) -> None:
        for key in re.findall("<Key>(.*?)</Key>", wanted):
            self.server.objects.pop(key, None)
        self._answer(200, b"<DeleteResult/>")

    def _body(self) -> bytes:
        size = int(self.headers.get("Content-Length", 0))
        data = self.rfile.read(size)
        if len(data) < size:  # the client was killed: S3 stores no object then
            raise ConnectionResetError(f"{len(data)} of {size} bytes of {self.path} arrived")
        if "aws-chunked" not in self.headers.get("Content-Encoding", ""):
            return data
        whole = b""
        while data:
            size, _, data = data.partition(b"\r\n")
            length = int(size.split(b";")[0], 16)
            if not length:
                break
            whole, data = whole + data[:length], data[length + 2 :]
        return whole

    def _answer(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()[:32]}"')
        self.send_header("Last-Modified", formatdate(0, usegmt=True))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""
