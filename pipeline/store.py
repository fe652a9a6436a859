"""Files of a data set in object storage: s3:// and gs:// addresses, read by DALI's own clients.

Credentials, region and endpoint of s3:// are taken as AWS's tools take them (AWS_ACCESS_KEY_ID ..., ~/.aws,
AWS_ENDPOINT_URL); of gs:// they are Google's default credentials, or none with DALI_GCS_ANONYMOUS=1, and
DALI_GCS_ENDPOINT_URL. A gs:// store that does not answer is an error after DALI_GCS_REQUEST_TIMEOUT_SEC, 60.
"""

import errno
import io
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

CONNECTIONS = 16  # requests at a time; a store answers each in tens of milliseconds


def address(path: str | Path) -> str:
    """A folder as DALI takes it. pathlib folds the slashes of a URL, as in s3:/bucket, and they are put back here."""
    return re.sub(r"^(s3|gs):/+", r"\1://", str(path))


def is_remote(address: str) -> bool:
    return address.startswith(("s3://", "gs://"))


def opened(address: str) -> io.BufferedIOBase:
    """A file to read; one in object storage is fetched whole, into memory. Raises OSError."""
    return io.BytesIO(fetch([address])[0]) if is_remote(address) else open(address, "rb")


def fetch(addresses: Sequence[str]) -> list[bytes]:
    """The contents of files, in order. Raises OSError, of object storage with its complaint and what to check."""
    if not any(map(is_remote, addresses)):
        return [Path(address).read_bytes() for address in addresses]
    parts = [addresses[i::CONNECTIONS] for i in range(min(CONNECTIONS, len(addresses)))]
    with ThreadPoolExecutor(len(parts)) as pool:
        fetched = list(pool.map(_fetch, parts))
    return [fetched[i % CONNECTIONS][i // CONNECTIONS] for i in range(len(addresses))]


def _fetch(addresses: Sequence[str]) -> list[bytes]:
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=len(addresses), num_threads=1, device_id=None, prefetch_queue_depth=1)
    def graph() -> object:
        return fn.readers.file(files=list(addresses), tensor_init_bytes=1 << 16)[0]

    try:
        (files,) = graph().run()
    except RuntimeError as error:
        said = " ".join(str(error).rpartition("encountered:")[2].partition("Current pipeline")[0].split())
        raise OSError(
            errno.EIO,
            f"{said.rstrip('.')}. Check the address, the credentials (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or "
            "~/.aws; Google's default credentials for gs://) and AWS_ENDPOINT_URL or DALI_GCS_ENDPOINT_URL",
        ) from error
    return [np.asarray(file).tobytes() for file in files]


def read_ranges(address: str, offsets: Sequence[int], sizes: Sequence[int]) -> list[bytes]:
    raise NotImplementedError
