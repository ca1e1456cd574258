"""HTTP of the Hub's stand-in: requests that are counted and can be spoilt, refusals, and the storage server."""

import hashlib
import hmac
import json
import re
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit


class Request(NamedTuple):
    method: str
    path: str


class Refusal(Exception):
    """An answer of the Hub that is an error."""

    def __init__(self, status: int, message: str, code: str | None = None, commit: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.commit = status, message, code, commit


class Fault:
    """Spoils requests whose `METHOD path` holds a pattern: `times` of them, or all until `times` is set to 0."""

    def __init__(self, pattern: str, times: float, drop: bool) -> None:
        self.pattern, self.times, self.drop = re.compile(pattern), times, drop
        self.spoilt: list[Request] = []


class Handler(BaseHTTPRequestHandler):
    """Reads a request whole, spoils it if a fault says so, and answers by what `answer` gives or raises."""

    protocol_version = "HTTP/1.1"
    hub: Any
    body: bytes

    def log_message(self, *arguments: object) -> None:
        pass

    def handle_request(self) -> None:
        request = Request(self.command, unquote(urlsplit(self.path).path))
        with self.hub.lock:
            self.hub.requests.append(request)
            fault = next((each for each in self.hub.faults if self._spoils(each, request)), None)
            if fault is not None:
                fault.times -= 1
                fault.spoilt.append(request)
        length = int(self.headers.get("Content-Length") or 0)
        if fault is not None and fault.drop:
            self.rfile.read(length // 2)
            self.close_connection = True
            return
        self.body = self._chunks() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
        try:
            if fault is not None:
                raise Refusal(500, "Internal Error - We're working hard to fix this as soon as possible!")
            with self.hub.lock:
                self.answer(request)
        except Refusal as refusal:
            named = {"X-Error-Code": refusal.code, "X-Repo-Commit": refusal.commit}
            headers = {name: value for name, value in named.items() if value is not None}
            headers["X-Error-Message"] = refusal.message
            self.send(refusal.status, {"error": refusal.message}, headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    @staticmethod
    def _spoils(fault: Fault, request: Request) -> bool:
        return fault.times > 0 and fault.pattern.search(" ".join(request)) is not None

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, request: Request) -> None:
        raise NotImplementedError

    def send(self, status: int, content: Any = b"", headers: Mapping[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class StorageHandler(Handler):
    """Objects by signed address, as S3 and the CDN in front of it: whoever sends a token is refused."""

    def answer(self, request: Request) -> None:
        given = parse_qs(urlsplit(self.path).query).get("signature", [""])[0]
        if "Authorization" in self.headers:
            raise Refusal(400, "Only one auth mechanism allowed")
        if not hmac.compare_digest(given, self.hub.signature(request.method, request.path)):
            raise Refusal(403, "SignatureDoesNotMatch")
        name, _, oid = request.path[1:].rpartition("/")
        repo = self.hub.repos[name]
        if request.method == "PUT":
            if hashlib.sha256(self.body).hexdigest() != oid:
                raise Refusal(400, "XAmzContentSHA256Mismatch")
            repo.objects[oid] = self.body
            self.send(200, headers={"ETag": '"part"'})
        elif oid in repo.objects:
            self.send(200, repo.objects[oid], {"ETag": f'"{oid}"'})
        else:
            raise Refusal(404, "NoSuchKey")


def serve(hub: Any, handler: type[Handler]) -> ThreadingHTTPServer:
    """Starts a server on a free port; `hub` is what its handler asks."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type(handler.__name__, (handler,), {"hub": hub}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    return server


def whole_text(error: BaseException | None) -> str:
    """An error with all that it was raised from, in which no token may stand."""
    text = ""
    while error is not None:
        text, error = f"{text}\n{error!r}\n{error}", error.__cause__ or error.__context__
    return text
