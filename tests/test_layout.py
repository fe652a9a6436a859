"""The house keeps its plan: who imports whom, how long a file may be, what lies at the top, and that the checks pass.

    benchmarks -> tools -> train.py -> pipeline, model

A file imports what stands in its own folder or to the right of it, never in a circle; pipeline and model do not know
each other. Two sets of modules in tools lie lower: SHARED, which know nothing of the project, and FOR_TRAIN.
What does not hold yet is listed under "to be mended": whoever mends it removes its line, and nothing is added.
"""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("pipeline", "model", "tools", "benchmarks")
SHARED = {f"tools.{name}" for name in ("errors", "files")}  # know nothing of the project, so that all may use them
FOR_TRAIN = {f"tools.{name}" for name in ("command", "options", "ranks", "signals")}  # of programs that train, too
RIGHT_OF = {  # folder: those that it may import besides itself
    "benchmarks": {"tools", "train", "pipeline", "model"},
    "tools": {"train", "pipeline", "model"},
    "train": {"pipeline", "model"},
    "pipeline": set(),
    "model": set(),
}
MOST_LINES_OF_A_FILE, MOST_LINES_OF_A_FUNCTION = 700, 120

# ---- to be mended --------------------------------------------------------------------------------------------------
LONG = {"train.py"}  # files of more lines than they should have
CIRCLES = {("pipeline.images", "pipeline.graph")}  # an import of each circle that would open it if it were taken away
# --------------------------------------------------------------------------------------------------------------------

HOMES = {  # library: the files that may import it
    "accelerate": {"train.py", "tools/session.py", "tools/ranks.py"},  # what joins processes
    "nvidia": {"pipeline/graph.py", "pipeline/loader.py"},  # the loader for a type, and for a copy to torch
    "obstore": {"pipeline/store.py"},
    "webdataset": {"pipeline/write.py"},
    "safetensors": {"model/tensor_files.py"},
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


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def import_graph() -> dict[str, set[str]]:
    """The modules of the project that each one imports, at its top or inside a function."""
    files = {name_of(path): path for path in sources() if path.name != "__init__.py"}
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        named: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                named |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        graph[name] = (named & files.keys()) - {name}
    return graph


def listing(graph: dict[str, set[str]]) -> str:
    return "\n".join(f"{name} -> {', '.join(sorted(graph[name])) or '-'}" for name in sorted(graph))


def wrong_imports(graph: dict[str, set[str]]) -> set[tuple[str, str]]:
    """(module, what it must not import)."""
    wrong = set()
    for name, imported in [(importer, one) for importer, imports_of_it in graph.items() for one in imports_of_it]:
        folder, other = name.split(".")[0], imported.split(".")[0]
        if name in SHARED:
            allowed = imported in SHARED
        elif name in FOR_TRAIN:
            allowed = imported in SHARED | FOR_TRAIN or other in ("pipeline", "model")
        else:
            allowed = folder == other or other in RIGHT_OF[folder] or imported in SHARED
            allowed |= folder == "train" and imported in FOR_TRAIN
        if not allowed:
            wrong.add((name, imported))
    return wrong


def test_folders_import_only_what_lies_below_them() -> None:
    graph = import_graph()
    assert not wrong_imports(graph), listing(graph)


def test_no_files_import_each_other_in_a_circle() -> None:
    graph = import_graph()
    for name, imported in CIRCLES:
        assert imported in graph[name], f"{name} no longer imports {imported}: remove it from CIRCLES"
        graph[name] = graph[name] - {imported}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"{' <- '.join(error.args[1])}; all imports:\n{listing(graph)}")


def private_names(path: Path) -> tuple[set[str], set[str]]:
    """Names with a leading underscore that a file defines, and those that it imports or reads as an attribute."""
    defined, used = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                defined.add(node.name)
            case ast.Name(ctx=ast.Store()):
                defined.add(node.id)
            case ast.Attribute(ctx=ast.Store()):
                defined.add(node.attr)
            case ast.Attribute():
                used.add(node.attr)
            case ast.ImportFrom():
                used |= {alias.name for alias in node.names}
    return set(filter(is_private, defined)), set(filter(is_private, used))


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def test_no_private_name_crosses_a_folder() -> None:
    """Not imported, nor read from a module or an object: a name that another folder defines, and this one does not."""
    names = {name_of(path): private_names(path) for path in sources()}
    defined_in: dict[str, set[str]] = {}
    for name, (defined, _) in names.items():
        defined_in.setdefault(name.split(".")[0], set()).update(defined)
    crossing = set()
    for name, (_, used) in names.items():
        own = name.split(".")[0]
        others = set().union(*(defined for folder, defined in defined_in.items() if folder != own))
        crossing |= {(name, private) for private in used & others - defined_in[own]}
    assert not crossing


def test_files_and_functions_are_short() -> None:
    files, functions = set(), []
    for path in sources():
        name, text = str(path.relative_to(ROOT)), path.read_text()
        if len(text.splitlines()) > MOST_LINES_OF_A_FILE:
            files.add(name)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= MOST_LINES_OF_A_FUNCTION:
                functions.append(f"{name}: {node.name}")
    assert files == LONG
    assert not functions


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_each_library_has_its_home(path: Path) -> None:
    name, imported = str(path.relative_to(ROOT)), imports(path)
    for library, homes in HOMES.items():
        assert library not in imported or name in homes or name.startswith("benchmarks/"), f"{name} imports {library}"


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
    "model/checkpoint.py": {"rename"},  # in a folder that it made itself, and out of it
    "model/encoder_file.py": {"replace"},  # out of a folder that it made itself
    "tools/doctor.py": {"symlink_to"},  # into a temporary folder
    "tools/machine.py": {"read_text"},  # of /sys
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
