"""What counts as an image, what as a label, and what becomes of every entry of a source: one set of rules for all.

An entry is a file of a folder, a line of a list or a member of a tar. It is kept or converted; or left out: it should
have been an image, and its name is listed with the reason; or passed over: it is no image, and is counted by reason.

Names    Case does not matter. A name that starts with a dot, or lies in a folder that does, is hidden and passed over;
         a hidden folder is not entered and counts as one entry. An image has a suffix of an image that Pillow decodes.
         What a list names is tried whatever it is called: it was asked for.
Tars     As in the webdataset library: members that follow each other and have one key are a sample, the key ends at the
         first dot of the file name, and what follows is the member's extension (`pipeline.shards.split_name`).
Images   of a sample: the member that was chosen; else the only one whose extension ends as an image's; of several the
         one without a further dot (k.jpg, not k.seg.png). Where that leaves several, the caller is asked.
Labels   All whole numbers, which are the places of their classes, or all names, which are sorted into classes; with a
         list of classes they are its names or their numbers, from 0.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.images import SUFFIXES
from pipeline.shards import DatasetError
from tools.files import read_bytes

NO_DECODER = {  # images to a person, and nothing to Pillow; they are left out by name
    *(".jxl", ".heic", ".heif", ".hif", ".svg", ".jxr", ".wdp", ".exr", ".hdr", ".dcm", ".svs", ".ndpi", ".czi"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".raw", ".xcf", ".ai"),
}
MAX_CLASSES = 100_000  # a larger label is taken for damage: each class has its name in the manifest
MAX_LABEL = 256  # bytes of a label
MAX_NUMBER = 32  # bytes of one that is a number, as training reads it
MAX_LIST = 2**30  # bytes of a text file
MAX_NAMED = 100  # entries passed over for one reason that are listed by name
NUMBER = re.compile(r"[+-]*([0-9]+[.]?[0-9]*|[.][0-9]+)(e[+-]?[0-9]+)?", re.IGNORECASE)


# ---- names


def is_hidden(path: str) -> bool:
    """Whether a path within a source is hidden; "." and ".." are no names."""
    if not path.startswith(".") and "/." not in path:  # the usual case, a million times
        return False
    return any(part.startswith(".") and part not in (".", "..") for part in path.split("/"))


def suffix(path: str) -> str:
    """The suffix of a file name in lower case, with its dot, or "" for none."""
    found = os.path.splitext(path.rpartition("/")[2])[1].lower()
    return "" if found == "." else found


def is_image(path: str) -> bool:
    return not is_hidden(path) and suffix(path) in SUFFIXES


def no_image(path: str) -> str:
    """The reason for which an entry that is no image is passed over: "hidden", its suffix, or that it has none."""
    found = suffix(path)
    if is_hidden(path):
        return "hidden"
    return found if re.fullmatch(r"[.][a-z0-9_-]{1,10}", found) else "odd suffix" if found else "no suffix"


@dataclass(slots=True)
class Tally:
    """What becomes of the entries of a source of which no image is tried."""

    left_out: list[dict[str, str]] = field(default_factory=list)  # lines of actions.jsonl
    passed_over: Counter[str] = field(default_factory=Counter)  # by reason
    named: dict[str, list[str]] = field(default_factory=dict)  # the first of each reason
    lost: list[dict[str, str]] = field(default_factory=list)  # what damaged tars held: nobody can count it

    def leave_out(self, path: str, reason: str, detail: str = "") -> None:
        self.left_out.append({"action": "left out", "reason": reason, "path": path, "detail": detail or reason})

    def pass_over(self, path: str, reason: str) -> None:
        self.passed_over[reason] += 1
        if len(names := self.named.setdefault(reason, [])) < MAX_NAMED:
            names.append(path)

    def lose(self, path: str, detail: str) -> None:
        self.lost.append({"action": "lost", "reason": "damaged tar", "path": path, "detail": detail})

    def is_image(self, path: str, fault: str = "") -> bool:
        """Whether an entry is an image by its name; if not, or if it has a fault, it is counted here."""
        if is_image(path) and not fault:
            return True
        if not is_hidden(path) and (is_image(path) or suffix(path) in NO_DECODER):
            self.leave_out(path, fault or f"no decoder for {suffix(path)}")
        else:
            self.pass_over(path, "hidden" if is_hidden(path) else fault or no_image(path))
        return False

    def add(self, other: "Tally") -> None:
        self.left_out += other.left_out
        self.passed_over += other.passed_over
        for reason, paths in other.named.items():
            here = self.named.setdefault(reason, [])
            here += paths[: MAX_NAMED - len(here)]
        self.lost += other.lost

    def reasons(self) -> dict[str, int]:
        """How many are left out for each reason."""
        return dict(sorted(Counter(action["reason"] for action in self.left_out).items()))

    def summary(self) -> str:
        """Why nothing of the source can be used, in the words of a message."""
        counts = [f"{reason}: {count}" for reason, count in (self.reasons() | self.passed_over).items()]
        first = [f"first {action['path']!r}: {action['detail']}" for action in (self.left_out + self.lost)[:1]]
        return "; ".join((", ".join(counts[:10]) or "nothing is there", *first))

    def actions(self) -> list[dict[str, Any]]:
        """Lines of actions.jsonl: one for each entry left out, one for each reason of passing over."""
        passed = [
            {"action": "passed over", "reason": reason, "count": count, "paths": self.named[reason]}
            for reason, count in sorted(self.passed_over.items())
        ]
        return [*self.left_out, *self.lost, *passed]


def actions_text(actions: Sequence[Mapping[str, Any]], counts: Mapping[str, Mapping[str, int]], lost: int) -> str:
    """actions.jsonl: its lines, and the sum of all entries at the end.

    counts  kept, reencoded, left_out and passed_over, by reason.
    """
    sums = {what: sum(reasons.values()) for what, reasons in counts.items()}
    total = {"action": "total", "entries": sum(sums.values()), **sums, "damaged_tars": lost}
    return "".join(f"{json.dumps(action)}\n" for action in (*actions, total))


# ---- labels


def is_number(label: str) -> bool:
    """Whether a label looks like a number, and so is no name; "-1" and "1.0" do, and are no labels either."""
    return bool(NUMBER.fullmatch(label))


@lru_cache(maxsize=1024)  # images of a class follow each other
def label_fault(label: str) -> str:
    """What is wrong with a label by itself, or ""."""
    if not label or not label.isprintable() or len(label) > MAX_LABEL:
        return f"is {label[:40]!r}, expected a name or a whole number"
    if is_number(label) and not (re.fullmatch(r"[0-9]{1,9}", label) and int(label) < MAX_CLASSES):
        return f"is {label[:40]!r}, expected a name, or a whole number from 0 to {MAX_CLASSES - 1}"
    return ""


def index_labels(first: Mapping[str, str], names: Sequence[str] | None) -> tuple[list[str], dict[str, int]]:
    """(classes, {label: index}); a label that is no class is not in the latter.

    first  every label of a source, and where it stands first. Labels with a fault are not among them.
    names  of the classes, index = label; None: the labels tell.
    Raises DatasetError if there are numbers and names among the labels and nothing says what is what.
    """
    numbers, words = ([label for label in first if is_number(label) == number] for number in (True, False))
    if names is None and numbers and words:
        raise DatasetError(
            f"labels are names, or whole numbers from 0, but {first[words[0]]} has {words[0]!r} and "
            f"{first[numbers[0]]} has {numbers[0]!r}: mend them, or name all classes with --classes FILE"
        )
    if names is None:
        names = sorted(words) or [str(i) for i in range(max(map(int, numbers), default=-1) + 1)]
    by_name = {name: i for i, name in enumerate(names)}
    if words or first.keys() <= by_name.keys():
        return list(names), {label: by_name[label] for label in first if label in by_name}
    return list(names), {label: int(label) for label in numbers if int(label) < len(names)}


def read_classes(file: Path) -> list[str]:
    """Class names from a text file, one a line."""
    names = read_lines(file)
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise DatasetError(f"{file} names the class {twice[0]!r} twice, expected each class once")
    return names


def class_names(root: Path, class_list: Path | None) -> list[str] | None:
    """Class names, index = label: those of a text file, else of `dataset.json` in `root`, else None.

    Raises DatasetError if a file gives none.
    """
    manifest = root / "dataset.json"
    if class_list:
        return read_classes(class_list)
    if not manifest.is_file():
        return None
    try:
        classes = json.loads(read_bytes(manifest))["classes"]
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise TypeError(f"classes are {str(classes)[:40]}")
        return classes
    except (ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"{manifest} gives no class names ({error}); give a list of them, or remove it") from error


# ---- text files


def read_text(file: Path) -> str:
    """The text of a list; a mark of the byte order is passed, and lines may end as on Windows."""
    must_be_file(file)
    if file.stat().st_size > MAX_LIST:
        raise DatasetError(f"{file} has {file.stat().st_size} bytes, more than {MAX_LIST}: expected a text file")
    content = read_bytes(file)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DatasetError(f"{file} is not text in UTF-8: line {line}, {error}") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DatasetError(f"line {line} of {file} holds a null byte, expected plain text in UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(file: Path) -> list[str]:
    lines = [line.strip() for line in read_text(file).split("\n") if line.strip()]
    if not lines:
        raise DatasetError(f"{file} is empty")
    return lines


def must_be_file(path: Path) -> None:
    if not path.is_file():
        raise DatasetError(f"{path} is {'not a file' if path.exists() else 'missing'}")


def reasons(counts: Mapping[str, int], most: int = 12) -> str:
    """Counts by reason in one line, the largest if there are many."""
    shown = sorted(counts, key=lambda reason: (-counts[reason], reason))[:most]
    rest = f", and {len(counts) - most} more reasons" if len(counts) > most else ""
    return ", ".join(f"{reason}: {counts[reason]}" for reason in sorted(shown)) + rest


def places(labels: Collection[tuple[str, str]]) -> dict[str, str]:
    """{label: where it stands first} of (label, place)."""
    found: dict[str, str] = {}
    for label, place in labels:
        found.setdefault(label, place)
    return found
