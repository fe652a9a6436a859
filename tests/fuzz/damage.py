"""Ways to spoil a file, at random: bytes, lines of text, JSON, tars, safetensors. All keep to what `rng` draws."""

import copy
import json
import struct
from collections.abc import Callable
from random import Random
from typing import Any

Damage = Callable[[Random, bytes], bytes]

NUMBERS = (0, -1, 1, 255, 256, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**30, -(10**30))
NUMBERS += (0.5, -0.0, 1e308, float("inf"), float("-inf"), float("nan"))  # type: ignore[assignment]
TEXTS = (
    "",
    " ",
    "\0",
    "a\0b",
    "../../x",
    "/etc/passwd",
    ".",
    "..",
    "é猫",
    "x" * 3000,
    "\n",
    "null",
    "%s%n",
    "-1",
    "1e3",
)
TEXTS += ("\ud800", "a/b.tar", "{}", "\x1b[31m", "٣", "1_0")  # a lone surrogate, a digit that is not ASCII
WORDS = (
    "",
    " ",
    "\t",
    ",",
    '"',
    "\\",
    "\0",
    "-1",
    "1.5",
    "nan",
    "1e999",
    "99999999999999999999",
    "true",
    "[]",
    "{}",
    "=",
)
WORDS += ("[views]", "'''", "\ufeff", "\r", "\n\n", "#", "é", "\x1b", "../..", "x" * 300)


def by_bytes(rng: Random, data: bytes) -> bytes:
    """One to three of: flipped bits, a cut, a part doubled, moved, removed or overwritten, an empty file."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = rng.choice(BYTES)(rng, data)
    return data


def flipped(rng: Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 20)) if data else 0):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(rng: Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def part(rng: Random, data: bytes) -> tuple[int, int]:
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + rng.choice((1, 4, 32, 512, 4096)))


def doubled(rng: Random, data: bytes) -> bytes:
    start, stop = part(rng, data)
    return data[:stop] + data[start:]


def moved(rng: Random, data: bytes) -> bytes:
    (start, stop), to = part(rng, data), rng.randrange(len(data) + 1)
    return (data[:to] + data[start:stop] + data[to + stop - start :])[: len(data)]


def removed(rng: Random, data: bytes) -> bytes:
    start, stop = part(rng, data)
    return data[:start] + data[stop:]


def overwritten(rng: Random, data: bytes) -> bytes:
    start, stop = part(rng, data)
    filling = rng.choice((b"\0", b"\xff", b"9", None))
    return data[:start] + (filling * (stop - start) if filling else rng.randbytes(stop - start)) + data[stop:]


def longer(rng: Random, data: bytes) -> bytes:
    return data + rng.choice((b"\0", b"\n", rng.randbytes(10), bytes(1024), data[:2000]))


def emptied(_: Random, __: bytes) -> bytes:
    return b""


BYTES: tuple[Damage, ...] = (flipped, flipped, flipped, cut, doubled, moved, removed, overwritten, longer, emptied)
IN_PLACE: tuple[Damage, ...] = (flipped, flipped, moved, overwritten)  # of the same size


def in_place(rng: Random, data: bytes) -> bytes:
    return rng.choice(IN_PLACE)(rng, data)


def by_lines(rng: Random, data: bytes) -> bytes:
    """Lines removed, doubled, swapped or joined, words put into them; now and then damage to bytes."""
    if rng.random() < 0.2:
        return by_bytes(rng, data)
    lines = data.decode(errors="surrogateescape").split("\n")
    for _ in range(rng.choice((1, 1, 2, 5))):
        i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
        what = rng.randrange(6)
        if what == 0 and len(lines) > 1:
            del lines[i]
        elif what == 1:
            lines.insert(j, lines[i])
        elif what == 2:
            lines[i], lines[j] = lines[j], lines[i]
        elif what == 3:
            lines[i : i + 2] = ["".join(lines[i : i + 2])]
        else:
            words = lines[i].split(" ")
            at = rng.randrange(len(words))
            words[at : at + rng.choice((0, 1, 1))] = [rng.choice((*WORDS, rng.choice(words)))]
            lines[i] = " ".join(words)
    return "\n".join(lines).encode(errors="surrogateescape")


def by_json(rng: Random, data: bytes) -> bytes:
    """Values replaced by ones at the limits or of another type, keys lost, renamed, doubled or added, deep nesting."""
    what = rng.random()
    if what < 0.2:
        return by_bytes(rng, data)
    tree = json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 2))):
        tree = replaced(rng, tree)
    text = json.dumps(tree, indent=1)
    if what < 0.3 and isinstance(tree, dict) and tree:  # deep nesting, or a key twice
        key, deep = rng.choice(list(tree)), "[" * 100_000 + "]" * 100_000
        text = f'{{"{key}": {deep if what < 0.23 else json.dumps(value(rng, None))},{text[1:]}'
    return text.encode(errors="surrogateescape")


def replaced(rng: Random, tree: Any) -> Any:
    """The tree with one node, at any depth, changed."""
    if not isinstance(tree, dict | list) or not tree or rng.random() < 0.1:
        return value(rng, tree)
    if isinstance(tree, list):
        i = rng.randrange(len(tree))
        what = rng.random()
        if what < 0.8:
            return [*tree[:i], replaced(rng, tree[i]), *tree[i + 1 :]]
        return [*tree[:i], *tree[i + 1 :]] if what < 0.9 else [*tree[: i + 1], copy.deepcopy(tree[i]), *tree[i + 1 :]]
    key, what = rng.choice(list(tree)), rng.random()
    if what < 0.8:
        return tree | {key: replaced(rng, tree[key])}
    rest = {name: each for name, each in tree.items() if name != key}
    if what < 0.9:
        return rest
    return rest | {rng.choice((key + "x", *TEXTS)): tree[key]} if what < 0.95 else tree | {"extra": value(rng, None)}


def value(rng: Random, old: Any) -> Any:
    if isinstance(old, int) and rng.random() < 0.3:
        return old + rng.choice((-1, 1))
    return rng.choice((rng.choice(NUMBERS), rng.choice(TEXTS), None, True, [], {}, [old], {"a": old}, str(old)))


def by_json_lines(rng: Random, data: bytes) -> bytes:
    """A line of JSON changed, or lines as text are."""
    lines = data.splitlines(keepends=True)
    if not lines or rng.random() < 0.4:
        return by_lines(rng, data)
    i = rng.randrange(len(lines))
    lines[i] = json.dumps(replaced(rng, json.loads(lines[i]))).encode() + b"\n"
    return b"".join(lines)


# ---- tars ----------------------------------------------------------------------------------------------------------

FIELDS = {  # of a header: start, size
    "name": (0, 100), "mode": (100, 8), "uid": (108, 8), "size": (124, 12), "mtime": (136, 12), "type": (156, 1),
    "link": (157, 100), "magic": (257, 8), "prefix": (345, 155),
}  # fmt: skip
SIZES = (b"0", b"00000000001", b"77777777777", b"9z", b"", b"-1", b"\x80" + (2**70).to_bytes(11, "big"), b"\xff" * 12)
NAMES = (
    b"",
    b"../../x.jpg",
    b"/x.jpg",
    b".hidden.jpg",
    b"a/b/c.JPG",
    b"a.cls",
    b"x" * 100,
    b"\xff\xfe.jpg",
    b"a b.jpg",
)
NAMES += (b"__key__", b"a..jpg", b"a\n.jpg", b".jpg", b"a.jpg/", b"a;b.png")
TYPES = b"0\x0012345678LKxgSVDMN"


def by_tar(rng: Random, data: bytes) -> bytes:
    """Fields of headers, mostly with a checksum that fits; blocks removed, doubled and moved; bytes."""
    if rng.random() < 0.25:
        return by_bytes(rng, data)
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        headers = [at for at in range(0, len(changed) - 511, 512) if changed[at + 257 : at + 262] == b"ustar"]
        at = rng.choice(headers or [0])
        if rng.random() < 0.2:
            stop = at + 512 * rng.choice((1, 2, 3))
            to = 512 * rng.randrange(len(changed) // 512 + 1)
            some = bytes(changed[at:stop])
            if rng.random() < 0.5:
                del changed[at:stop]
            changed[to:to] = some if rng.random() < 0.7 else b""
            continue
        field = rng.choice(list(FIELDS))
        start, size = FIELDS[field]
        choices = {"size": SIZES, "name": NAMES, "type": [bytes([each]) for each in TYPES]}.get(field)
        new = rng.choice([*(choices or ()), rng.randbytes(rng.randrange(size + 1))]) if choices or size else b""
        changed[at + start : at + start + size] = new[:size].ljust(size, b"\0")
        if rng.random() < 0.8 and len(changed) >= at + 512:
            changed[at + 148 : at + 156] = b" " * 8
            changed[at + 148 : at + 156] = b"%06o\0 " % sum(changed[at : at + 512])
    return bytes(changed)


# ---- safetensors ---------------------------------------------------------------------------------------------------


def by_safetensors(rng: Random, data: bytes) -> bytes:
    """The header, our facts in it, or the tensors; the length of the header mostly fits."""
    what = rng.random()
    size = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + size], data[8 + size :]
    if what < 0.25:
        return by_bytes(rng, data)
    if what < 0.5:
        return data[: 8 + size] + in_place(rng, body)
    if what < 0.75 and b"__metadata__" in header:
        tree = json.loads(header)
        facts = by_json(rng, tree["__metadata__"]["swiftclr"].encode())
        tree["__metadata__"]["swiftclr"] = facts.decode(errors="replace")
        header = json.dumps(tree).encode()
    else:
        header = by_json(rng, header)
    stated = len(header) if rng.random() < 0.9 else rng.choice((0, 1, len(header) - 1, len(header) + 1, 2**63, 10**9))
    return struct.pack("<Q", stated) + header + body
