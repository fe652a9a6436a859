"""The house keeps its plan: who imports whom, what lies at the top, and that the checks pass."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("pipeline", "model", "tools", "benchmarks")
SHARED = {f"tools.{name}" for name in ("errors", "files")}  # know nothing of the project, so that all may use them
HOMES = {  # library: the files that may import it
    "accelerate": {"train.py", "tools/evaluate.py"},  # what joins data and model, on one process or many
    "nvidia": {"pipeline/graph.py", "pipeline/loader.py"},  # the loader for a type, and for a copy to torch
    "obstore": {"pipeline/store.py"},
    "webdataset": {"pipeline/write.py"},
    "safetensors": {"model/checkpoint.py"},
    "triton": {"model/nt_xent_triton.py"},
}


def sources() -> list[Path]:
    return [ROOT / "train.py", *(path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")))]


def imports(path: Path) -> set[str]:
    """First parts of the names a file imports anywhere; the modules that all share are left out."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "tools":
            found |= {f"tools.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return {name.split(".")[0] for name in found if name not in SHARED}


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_plan(path: Path) -> None:
    """pipeline and model know nothing of each other nor of what joins them, and each library has its home."""
    name, found = str(path.relative_to(ROOT)), imports(path)
    room = path.relative_to(ROOT).parts[0]
    forbidden = {"pipeline": {"model"}, "model": {"pipeline"}, "tools": {"benchmarks"}}.get(room, set())
    if room in ("pipeline", "model"):
        forbidden |= {"train", "tools", "benchmarks"}
    assert not found & forbidden
    for library, homes in HOMES.items():
        assert library not in found or name in homes or room == "benchmarks", f"{name} imports {library}"


PROGRAMS = "make_shards", "evaluate", "export", "show_views", "doctor", "ablate"


@pytest.mark.parametrize("program", ["train.py", *(f"tools/{name}.py" for name in PROGRAMS)])
def test_programs_import_nothing_slow_to_show_their_help(program: str) -> None:
    """torch alone takes three seconds; --help answers at once."""
    code = "import runpy, sys; sys.argv = [sys.argv[1], '--help']; sys.path.insert(0, '.')\n"
    code += "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
    code += "finally: print('slow:', *({'torch', 'accelerate', 'nvidia', 'webdataset'} & sys.modules.keys()))"
    shown = subprocess.run([sys.executable, "-c", code, program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "Usage" in shown.stdout
    assert shown.stdout.splitlines()[-1].split() == ["slow:"]


# Calls on paths that follow a link, wait for a pipe, or leave half a file, and the files that make them on purpose.
RAW = {
    "open",
    "read_text",
    "read_bytes",
    "write_text",
    "write_bytes",
    "touch",
    "unlink",
    "rmtree",
    "makedirs",
    "rename",
}
RAW |= {"remove", "replace", "symlink_to", "savefig", "copyfile", "copytree", "move", "mkstemp", "mkdtemp"}
HARMLESS = {
    "pipeline/cache.py": {"open", "rename", "unlink"},  # its files are told by locks and names of their own
    "pipeline/reader.py": {"open"},  # of a descriptor that the cache gives
    "pipeline/audit.py": {"open"},  # of a folder, for its lock
    "pipeline/write.py": {"rename"},  # in a folder that it made itself, and of that folder
    "model/checkpoint.py": {"rename", "replace"},  # in a folder that it made itself, and out of it
    "tools/doctor.py": {"read_text", "symlink_to"},  # of /proc and /sys; into a temporary folder
    "benchmarks/measure.py": {"write_text"},  # to /proc
    "benchmarks/programs.py": {"write_text"},  # to /proc
    "tools/records.py": {"savefig", "read_text"},  # within `replacing`; of /proc
}
OPENERS = {"Image", "gzip", "lzma", "bz2", "tarfile", "webbrowser", "store"}  # have an `open` of their own


def raw_calls(path: Path) -> set[str]:
    """Names of RAW that a file calls on paths: functions of os and shutil, methods of a Path, and the builtin open."""
    found = set()
    tree = ast.parse(path.read_text())
    importing = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    ours = {alias.asname or alias.name for node in importing for alias in node.names}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        if isinstance(called, ast.Name) and called.id == "open" and "open" not in ours:
            found.add("open")
        if isinstance(called, ast.Attribute) and called.attr in RAW:
            of = called.value.id if isinstance(called.value, ast.Name) else ""
            path = called.attr not in ("replace", "remove") or of == "os"  # of a list, or of a text, which takes two
            path |= called.attr == "replace" and len(node.args) == 1
            if path and not (of in ours and of not in ("os", "shutil", "tempfile") or of in OPENERS):
                found.add(called.attr)
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_opened_written_and_removed_in_one_place(path: Path) -> None:
    """tools/files.py reads regular files alone, follows no link where it writes, and leaves no half."""
    name = str(path.relative_to(ROOT))
    if name != "tools/files.py":
        reading: set[str] = set()
        if name.startswith("benchmarks/"):  # records, and /proc
            reading = {"read_text", "read_bytes"}
        elif name.startswith("pipeline/sources"):  # what they have found to be a regular file
            reading = {"open", "read_text", "read_bytes"}
        assert not raw_calls(path) - HARMLESS.get(name, set()) - reading


def test_nothing_is_unpickled() -> None:
    """A checkpoint or encoder from a stranger must not be able to run code."""
    for path in sources():
        text = path.read_text()
        assert "torch.load(" not in text, path
        assert "pickle" not in imports(path), path


def test_the_top_level_holds_what_was_agreed() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout, so what is tracked cannot be listed")
    top = {line.split("/")[0] for line in tracked.stdout.splitlines()}
    agreed = {"train.py", "pyproject.toml", "README.md", "CONTRIBUTING.md", "LICENSE", "tests", *PACKAGES}
    assert {name for name in top if not name.startswith(".")} <= agreed


@pytest.mark.parametrize("command", ["ruff check .", "ruff format --check .", "mypy"])
def test_the_code_passes(command: str) -> None:
    """Lint, format and types, the same here and before every commit."""
    done = subprocess.run([sys.executable, "-m", *command.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
