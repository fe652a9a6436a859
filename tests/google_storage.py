"""A local Google Cloud Storage: the two requests of its JSON API that a reader makes, answered from a folder.

    python -m tests.google_storage FOLDER     serves FOLDER/BUCKET/OBJECT on loopback, prints the port, ends with stdin

Written from the JSON API's reference, https://cloud.google.com/storage/docs/json_api/v1/objects/get: an object's
metadata, and with alt=media its content or the part that Range names.
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer leaves in one piece; in two, the second waits 40 ms for the first to be acknowledged
    root: Path

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        bucket, _, name = map(unquote, url.path.partition("/b/")[2].partition("/o/"))
        file = self.root / bucket / name
        if not file.is_file():
            self.answer(
                404, json.dumps({"error": {"code": 404, "message": f"No such object: {bucket}/{name}"}}).encode()
            )
            return
        content = file.read_bytes()
        if parse_qs(url.query).get("alt") != ["media"]:
            facts = {"kind": "storage#object", "bucket": bucket, "name": name, "generation": "1"}
            self.answer(200, json.dumps(facts | {"size": str(len(content))}).encode())
        elif "Range" not in self.headers:
            self.answer(200, content)
        else:
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            part = content[int(first) : int(last or len(content)) + 1]
            place = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
            self.answer(206 if part else 416, part, {"Content-Range": place})

    def answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


if __name__ == "__main__":
    Handler.root = Path(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    sys.stdout.write(f"{server.server_address[1]}\n")
    sys.stdout.flush()
    sys.stdin.read()
