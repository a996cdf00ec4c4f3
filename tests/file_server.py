"""Files over HTTP, from this machine, sent rightly and in every wrong way."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from nn_backprop.data import files


class Server:
    """The archives over HTTP; ``answer`` may be replaced by another way to answer."""

    def __init__(self, contents: dict[str, bytes]) -> None:
        self.contents = contents
        self.requests: Counter[str] = Counter()
        self.over, self.hung_up = threading.Event(), threading.Event()
        self.answer = self.send

    def send(self, handler, name: str) -> None:
        self.send_body(handler, self.contents[name], len(self.contents[name]))

    def send_body(self, handler, body: bytes, length: int) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(length))
        handler.end_headers()
        handler.wfile.write(body)


class Http(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address) -> None:
        pass  # a client that has hung up is part of the tests


@contextmanager
def serving(contents: dict[str, bytes]) -> Iterator[Server]:
    server = Server(contents)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server.requests[self.path] += 1
            server.answer(self, self.path.rpartition("/")[2])

        def log_message(self, *args) -> None:
            pass

    with Http(("127.0.0.1", 0), Handler) as http:
        server.url = f"http://127.0.0.1:{http.server_port}"
        threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}).start()
        yield server
        server.over.set()
        http.shutdown()


FAULTS = {
    "truncated": lambda data: data[:47],
    "empty": lambda data: b"",
    "one bit": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "too long": lambda data: data + b"\0",
}


def not_found(server, handler, name):
    handler.send_error(404)


def half(server, handler, name):
    data = server.contents[name]
    server.send_body(handler, data[: len(data) // 2], len(data))


def body(content):
    """Answers with what this makes of the right one."""

    def answer(server, handler, name):
        data = content(server.contents[name])
        server.send_body(handler, data, len(data))

    return answer


one_bit = body(FAULTS["one bit"])


def endless(server, handler, name):
    handler.send_response(200)
    handler.end_headers()
    try:
        while not server.over.is_set():
            handler.wfile.write(bytes(1 << 16))
    except OSError:  # the connection is closed while we send
        server.hung_up.set()


def stalled(server, handler, name):
    server.over.wait()


def stalled_half_way(server, handler, name):
    half(server, handler, name)
    handler.wfile.flush()
    server.over.wait()


def leftovers(raw: Path) -> set[str]:
    return {path.name for path in raw.iterdir()} - set(files.OFFICIAL)
