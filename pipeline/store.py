"""Files of a data set, on disk or in object storage: s3://, gs:// and https:// addresses, read through obstore.

s3:// takes what obstore takes from the environment: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_REGION,
AWS_ENDPOINT_URL, AWS_SKIP_SIGNATURE=true for public buckets, a container's or an instance's role. obstore does not read
~/.aws; where boto3 is installed, its profiles are used through it. gs:// takes Google's default credentials, or
GOOGLE_SERVICE_ACCOUNT, or GOOGLE_SKIP_SIGNATURE=true. https:// is any server that answers range requests.

All requests run on one thread's event loop, so that callers can be interrupted and nothing is left running at exit.
"""

import asyncio
import concurrent.futures.thread  # noqa: F401  registers its own end before ours
import errno
import functools
import io
import os
import random
import re
import threading
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

from tools.files import open_binary, read_bytes

Result = TypeVar("Result")

PATIENCE_S = 300.0  # how long a request is tried again before it is an error
CONNECTIONS = 32  # requests at a time, of this process
GAP, SPAN = 1 << 16, 8 << 20  # bytes: parts as near as GAP are asked for together, up to SPAN at a time
BLOCK = 4 << 20  # bytes that `opened` asks for at a time
BLOCKS_AHEAD = 4  # of them in flight while a file is read from front to back
REQUEST_TIMEOUT = "120s"  # of one attempt, from connecting to the last byte
CHECK = {  # what to look at first when a store complains
    "s3": "AWS_ENDPOINT_URL and the credentials: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ~/.aws and boto3",
    "gs": "the credentials: Google's default ones, GOOGLE_SERVICE_ACCOUNT, or GOOGLE_SKIP_SIGNATURE=true",
    "http": "whether a browser or curl can read it, and that the server answers range requests",
}


def address(path: str | Path) -> str:
    """The address of a file or folder. pathlib folds the slashes of a URL, as in s3:/bucket; they are put back here."""
    return re.sub(r"^(s3|gs|https?):/+", r"\1://", str(path))


def is_remote(address: str) -> bool:
    return address.startswith(("s3://", "gs://", "https://", "http://"))


def fetch(addresses: Sequence[str], *, patience_s: float = 60.0) -> list[bytes]:
    """The contents of whole files, in order. Remote ones are fetched many at a time.

    patience_s  seconds for which each remote file is tried again after trouble that may pass
    Raises FileNotFoundError where there is no such file; other OSErrors name the address, the store's complaint and
    what to check.
    """

    async def whole(store: Any, path: str) -> bytes:
        import obstore

        return bytes(await (await obstore.get_async(store, path)).bytes_async())

    requests = [_begin(each, each, whole, patience_s) if is_remote(each) else None for each in addresses]
    try:
        return [
            request.result() if request else read_bytes(each) for each, request in zip(addresses, requests, strict=True)
        ]
    finally:
        for request in filter(None, requests):
            request.cancel()


def read_ranges(
    address: str, offsets: Sequence[int], sizes: Sequence[int], *, patience_s: float = PATIENCE_S
) -> list[bytes]:
    """Parts of one file, in order: `sizes` bytes from each of `offsets`.

    Remote parts less than `GAP` bytes apart come in one request, and many requests run in parallel. Raises OSError as
    `fetch` does, and where the file ends before a part does.
    """
    if not is_remote(address):
        with open_binary(address) as file:
            parts = [os.pread(file.fileno(), size, offset) for offset, size in zip(offsets, sizes, strict=True)]
        for part, offset, size in zip(parts, offsets, sizes, strict=True):
            if len(part) != size:
                raise _cut_off(address, offset, size, len(part))
        return parts
    spans: list[list[int]] = []  # [start, end] of each request. obstore's own get_ranges panics where a file is cut off
    for offset, size in sorted(zip(offsets, sizes, strict=True)):
        if size and spans and offset - spans[-1][1] < GAP and offset + size - spans[-1][0] <= SPAN:
            spans[-1][1] = max(spans[-1][1], offset + size)
        elif size:
            spans.append([offset, offset + size])
    requests = [begin_range(address, start, end - start, patience_s=patience_s) for start, end in spans]
    try:
        contents = [request.result() for request in requests]
    finally:
        for request in requests:
            request.cancel()
    starts = [start for start, _ in spans]
    found = []
    for offset, size in zip(offsets, sizes, strict=True):
        at = bisect_right(starts, offset) - 1 if size else 0
        found.append(bytes(contents[at][offset - starts[at] :][:size]) if size else b"")
    return found


def begin_range(
    address: str, offset: int, size: int, *, file_size: int = -1, patience_s: float = PATIENCE_S
) -> "Future[memoryview]":
    """Ask for `size` > 0 bytes of a remote file from `offset` on, and return at once; result() waits for them.

    file_size  the size that the file must have, -1 where it is not known; result() raises OSError if it has another
    result() raises OSError as `fetch` does, and where the file ends before the part does.
    """

    async def part(store: Any, path: str) -> memoryview:
        import obstore

        answer = await obstore.get_async(store, path, options={"range": (offset, offset + size)})
        if file_size not in (-1, answer.meta["size"]):
            raise OSError(errno.EIO, f"{address} has {answer.meta['size']} bytes, expected {file_size}: copy it again")
        content = memoryview(await answer.bytes_async())
        if len(content) != size:
            raise _cut_off(address, offset, size, len(content))
        return content

    return _begin(address, f"{address}, {size} bytes from byte {offset} on", part, patience_s)


def opened(address: str, *, patience_s: float = PATIENCE_S) -> io.BufferedIOBase:
    """A file to read and seek in. A remote one is fetched block by block and never held whole. Raises OSError."""
    return io.BufferedReader(_RemoteFile(address, patience_s), 1 << 18) if is_remote(address) else open_binary(address)


class _RemoteFile(io.RawIOBase):
    """Reads a remote file in blocks; while it is read from front to back, the next blocks are on their way."""

    def __init__(self, address: str, patience_s: float) -> None:
        async def size(store: Any, path: str) -> int:
            import obstore

            return (await obstore.head_async(store, path))["size"]

        self.address, self.patience_s = address, patience_s
        self.size = _wait(_begin(address, address, size, patience_s))
        self.position = 0
        self.last_block = -1
        self.blocks: dict[int, Future[memoryview]] = {}

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        if start + offset < 0:
            raise ValueError(f"cannot seek to byte {start + offset} of {self.address}")
        self.position = start + offset
        return self.position

    def readinto(self, buffer: Any) -> int:
        if self.position >= self.size:
            return 0
        block, start = divmod(self.position, BLOCK)
        in_order = block in (0, self.last_block, self.last_block + 1)
        needed = range(block, min(block + (BLOCKS_AHEAD if in_order else 1), -(-self.size // BLOCK)))
        for number in self.blocks.keys() - set(needed):
            self.blocks.pop(number).cancel()
        for number in needed:
            if number not in self.blocks:
                size = min(BLOCK, self.size - number * BLOCK)
                self.blocks[number] = begin_range(
                    self.address, number * BLOCK, size, file_size=self.size, patience_s=self.patience_s
                )
        self.last_block = block
        content = self.blocks[block].result()[start : start + len(buffer)]
        buffer[: len(content)] = content
        self.position += len(content)
        return len(content)

    def close(self) -> None:
        while self.blocks:
            self.blocks.popitem()[1].cancel()
        super().close()


def _cut_off(address: str, offset: int, size: int, found: int) -> OSError:
    return OSError(
        errno.EIO,
        f"{address} ends at byte {offset + found}, expected {size} bytes from byte {offset} on: it is cut off, or not "
        "the file that was written. Copy it again",
    )


# ---- requests: tried again on one event loop


def _begin(
    address: str, place: str, ask: Callable[[Any, str], Awaitable[Result]], patience_s: float
) -> "Future[Result]":
    """Start ask(store, path) on the event loop. `place` says in errors what was asked for."""
    if _ending.is_set():
        cancelled: Future[Result] = Future()
        cancelled.cancel()
        return cancelled
    return asyncio.run_coroutine_threadsafe(_patiently(address, place, ask, patience_s), _loop())


def _wait(request: "Future[Result]") -> Result:
    """The result of a request; one that is no longer waited for, after Ctrl-C, is cancelled."""
    try:
        return request.result()
    finally:
        request.cancel()


async def _patiently(
    address: str, place: str, ask: Callable[[Any, str], Awaitable[Result]], patience_s: float
) -> Result:
    """The answer of a store. Trouble that may pass is tried again, after pauses that grow from 0.1 s to 10 s."""
    store, path = _store(address)
    from obstore.exceptions import BaseError

    check = f"Check the address, {CHECK[address.split(':')[0].replace('https', 'http')]}"
    complaint, pause_s = "no answer", 0.1
    async with _slots():
        try:
            async with asyncio.timeout(patience_s):
                while True:
                    try:
                        return await ask(store, path)
                    except FileNotFoundError as error:
                        raise OSError(errno.ENOENT, f"{place} is not there: {_first(error)}. {check}") from None
                    except (BaseError, ValueError) as error:
                        complaint = _first(error)
                        if number := _refusal(error):
                            raise OSError(number, f"{place} cannot be read: {complaint}. {check}") from error
                    await asyncio.sleep(pause_s * random.uniform(0.5, 1.5))
                    pause_s = min(2 * pause_s, 10.0)
        except TimeoutError:
            text = f"{place} cannot be read, tried for {patience_s:.0f} s, the last complaint: {complaint}. {check}"
            raise OSError(errno.ETIMEDOUT, text) from None


def _refusal(error: Exception) -> int:
    """The errno of an answer that will not change, or 0: an error of the server's, or of the network, may pass."""
    if type(error).__name__ in ("PermissionDeniedError", "UnauthenticatedError"):
        return errno.EACCES
    if type(error).__name__ != "GenericError":  # a path that cannot be, a server without ranges
        return errno.EINVAL
    status = re.search(r"status code: (\d+)", str(error))
    return errno.EIO if status and 300 <= int(status[1]) < 500 and int(status[1]) not in (408, 429) else 0


def _first(error: Exception) -> str:
    """obstore's complaint in one line, with the cause that it buries in its debugging output."""
    text, _, details = str(error).partition("\n\nDebug source:")
    causes = re.findall(r'kind: (\w+),\s*message: "([^"]*)"|(TimedOut|IncompleteMessage)', details)
    cause = f" ({' '.join(filter(None, causes[-1]))})" if causes else ""
    return f"{' '.join(text.split()).rstrip('.:')[:500]}{cause}"


def _store(address: str) -> tuple[Any, str]:
    """obstore's client for an address, and the path there."""
    scheme, _, rest = address.partition("://")
    root, _, path = rest.partition("/")
    settings = tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith(("AWS_", "GOOGLE_"))))
    return _client(scheme, root, settings), unquote(path) if scheme.startswith("http") else path


@functools.lru_cache(16)
def _client(scheme: str, root: str, settings: tuple[tuple[str, str], ...]) -> Any:
    try:
        from obstore.store import GCSStore, HTTPStore, S3Store
    except ImportError as error:
        text = f"{scheme}://{root} is read through obstore, which is missing: pip install obstore"
        raise OSError(errno.ENOPKG, text) from error
    named = dict(settings)
    endpoints = [named.get(name, "") for name in ("AWS_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")]
    plain = any(each.startswith("http://") for each in (f"{scheme}://", named.get("GOOGLE_BASE_URL", ""), *endpoints))
    options: dict[str, Any] = {
        "client_options": {"allow_http": plain, "connect_timeout": "10s", "timeout": REQUEST_TIMEOUT},
        "retry_config": {"max_retries": 0, "retry_timeout": timedelta(days=1)},  # _patiently tries again
    }
    if scheme == "s3":
        return S3Store(root, **options, credential_provider=_profile(named))
    return GCSStore(root, **options) if scheme == "gs" else HTTPStore(f"{scheme}://{root}", **options)


def _profile(settings: dict[str, str]) -> Any:
    """Credentials of ~/.aws through boto3, where the environment has none and boto3 is there; else None."""
    file = Path(settings.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials").expanduser()
    if "AWS_ACCESS_KEY_ID" in settings or "AWS_SKIP_SIGNATURE" in settings:
        return None
    if "AWS_PROFILE" not in settings and not file.exists():
        return None
    try:
        from botocore.exceptions import BotoCoreError
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        return None
    try:
        return Boto3CredentialProvider()
    except (BotoCoreError, ValueError) as error:
        raise OSError(errno.EACCES, f"~/.aws gives no credentials: {error}") from error


@functools.cache
def _slots() -> asyncio.Semaphore:
    return asyncio.Semaphore(CONNECTIONS)


_starting, _ending = threading.Lock(), threading.Event()


def _loop() -> asyncio.AbstractEventLoop:
    with _starting:
        return _started_loop()


@functools.cache
def _started_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="object storage", daemon=True)

    async def cancel_all() -> None:
        requests = asyncio.all_tasks() - {asyncio.current_task()}
        for request in requests:
            request.cancel()
        await asyncio.gather(*requests, return_exceptions=True)
        loop.stop()

    def stop() -> None:
        """obstore's threads must not call back into an interpreter that is ending, and nobody wait for an answer."""
        _ending.set()
        ending: Coroutine[Any, Any, None] = cancel_all()
        asyncio.run_coroutine_threadsafe(ending, loop)
        thread.join(timeout=2.0)

    thread.start()
    # Before concurrent.futures waits for its threads, which may wait for an answer: the last registered goes first.
    threading._register_atexit(stop)  # type: ignore[attr-defined]
    return loop
