"""An object store on loopback as far away as a test wants it: latency, bandwidth, silence, damage, death.

    python -m tests.slow_store FOLDER PORT     serves FOLDER with byte ranges, prints its port, ends with its input

It answers plain HTTP (http://127.0.0.1:PORT/set/file) and, with GOOGLE_BASE_URL, obstore's client for gs://BUCKET,
whose objects are FOLDER/BUCKET/... `SlowStore` runs it in a process of its own. Requests under /-/ steer it:
/-/set?NAME=VALUE changes one of `Settings`, /-/counts gives {path: [requests, bytes of bodies sent]}.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit
from urllib.request import urlopen

ROOT = Path(__file__).resolve().parents[1]
CHUNK = 1 << 18  # bytes sent at a time, so that connections share a capped bandwidth


class SlowStore:
    """The server's process, from the side of a test."""

    def __init__(self, folder: Path, **settings: float) -> None:
        self.folder, self.settings, self.port = folder, settings, 0
        self.start()

    def start(self) -> None:
        """Start, or come back under the same port, with the same settings and counts from 0."""
        command = [sys.executable, "-m", "tests.slow_store", str(self.folder), str(self.port)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())
        self.set(**self.settings)

    def kill(self) -> None:
        """Die: connections break, and new ones are refused."""
        self.process.kill()
        self.process.communicate()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def set(self, **settings: float) -> None:
        """See `Settings`."""
        self.settings |= settings
        words = "&".join(f"{name}={value}" for name, value in settings.items())
        urlopen(f"{self.url}/-/set?{words}").read()

    def counts(self) -> dict[str, tuple[int, int]]:
        """Requests and bytes sent for each path since the start."""
        found = json.loads(urlopen(f"{self.url}/-/counts").read())
        return {path: (requests, size) for path, (requests, size) in found.items()}


@contextmanager
def slow_store(folder: Path, **settings: float) -> Iterator[SlowStore]:
    store = SlowStore(folder, **settings)
    try:
        yield store
    finally:
        store.kill()


class Settings:
    latency_ms = 0.0  # from a request to the first byte of its answer
    mib_per_s = 0.0  # over all connections; 0: as fast as it goes
    silent = 0.0  # 1: take requests and never answer
    damage = 0.0  # so many of the next bodies have a byte changed
    status = 0.0  # answer this instead of a file


class Server(ThreadingHTTPServer):
    request_queue_size = 256

    def __init__(self, folder: Path, port: int) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.folder, self.settings = folder, Settings()
        self.counts: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
        self.lock = threading.Lock()
        self.free_at = 0.0  # when the capped line has sent all that was given to it

    def take_turn(self, size: int) -> None:
        """Wait until `size` bytes have passed the capped line."""
        if not self.settings.mib_per_s:
            return
        with self.lock:
            self.free_at = max(self.free_at, time.monotonic()) + size / self.settings.mib_per_s / 2**20
            wait = self.free_at - time.monotonic()
        time.sleep(max(0.0, wait))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or a small answer waits 40 ms for the other side to acknowledge its headers
    wbufsize = 1 << 16
    server: Server

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        server, settings = self.server, self.server.settings
        url = urlsplit(self.path)
        path = unquote(url.path)
        if path.startswith("/-/"):
            for name, value in parse_qsl(url.query):
                setattr(settings, name, float(value))
            with server.lock:
                self.answer(200, json.dumps(server.counts).encode())
            return
        time.sleep(settings.latency_ms / 1000)
        while settings.silent:
            time.sleep(0.05)
        with server.lock:
            server.counts[path][0] += 1
        file = server.folder / path.lstrip("/")
        if settings.status or not file.is_file():
            self.answer(int(settings.status) or 404, b"")
            return
        size = file.stat().st_size
        start, end = 0, size
        if asked := self.headers.get("Range"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end = int(first), min(size, int(last or size) + 1)
            if start >= size:
                self.answer(416, b"", {"Content-Range": f"bytes */{size}"})
                return
        headers = {"Content-Range": f"bytes {start}-{end - 1}/{size}"} if asked else {}
        self.answer(206 if asked else 200, None, headers | {"Content-Length": str(end - start)})
        if self.command == "GET":
            self.send_file(path, file, start, end)

    def send_file(self, path: str, file: Path, start: int, end: int) -> None:
        server = self.server
        self.wfile.flush()
        with open(file, "rb") as content:
            if server.settings.damage:
                server.settings.damage -= 1
                server.counts[path][1] += end - start
                changed = bytearray(os.pread(content.fileno(), end - start, start))
                changed[-1] ^= 1
                self.wfile.write(changed)
                return
            while start < end:
                server.take_turn(min(CHUNK, end - start))
                sent = os.sendfile(self.connection.fileno(), content.fileno(), start, min(CHUNK, end - start))
                start += sent
                with server.lock:
                    server.counts[path][1] += sent

    def answer(self, status: int, content: bytes | None, headers: dict[str, str] | None = None) -> None:
        """The head of an answer, and its body unless `content` is None: that is then sent by the caller."""
        self.send_response(status)
        length = {} if content is None else {"Content-Length": str(len(content))}
        facts = {"Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT", "ETag": '"1"'}  # obstore's client for gs:// insists
        for name, value in {**length, **facts, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if content and self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Nothing: the counts tell."""

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:  # the other side has gone
            self.close_connection = True

    def finish(self) -> None:
        with suppress(OSError):
            super().finish()


if __name__ == "__main__":
    running = Server(Path(sys.argv[1]), int(sys.argv[2]))
    threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    sys.stdout.write(f"{running.server_address[1]}\n")
    sys.stdout.flush()
    sys.stdin.read()
    os._exit(0)
