"""The rules of the house: names, layers, sizes, and that README tells the truth."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import vlmkernels.ops
from vlmkernels.ops import _library

ROOT = Path(__file__).resolve().parents[1]
SHARED = {"common", "binding"}
ROOMS = sorted(p.name for p in (ROOT / "csrc").iterdir() if p.is_dir() and p.name not in SHARED)
PYTHON = sorted(
    p for d in ("vlmkernels", "bench", "tests", "tools") for p in (ROOT / d).rglob("*.py")
)
CPP = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"})
# Lower layers first: a file may import from its own layer and from those before it.
LAYERS = ["_core", "ops", "distributed", "nn", "compat", "patch", "models", "recipes"]
LAYERS += ["info", "testing", "cli"]


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).parts[: -node.level] if node.level else ()
            module = ".".join([*package, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def layer(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "vlmkernels" and parts[1] in LAYERS else None


@pytest.mark.parametrize("path", sorted((ROOT / "vlmkernels").rglob("*.py")), ids=relative)
def test_imports_go_down(path: Path) -> None:
    here = layer(".".join(path.relative_to(ROOT).with_suffix("").parts))
    if here is None or here == "cli":
        return
    above = [m for m in imports(path) if (to := layer(m)) and LAYERS.index(to) > LAYERS.index(here)]
    allowed = {"models": {"info", "testing"}, "recipes": {"info", "testing"}}.get(here, set())
    assert [m for m in above if layer(m) not in allowed] == []


@pytest.mark.parametrize("room", ROOMS)
def test_one_name_on_every_floor(room: str) -> None:
    floors = [f"csrc/{room}/{room}.h", f"csrc/{room}/{room}.cpp", f"csrc/{room}/{room}.cu"]
    floors += [f"vlmkernels/ops/{room}.py", f"vlmkernels/nn/{room}.py", f"bench/ops/{room}.py"]
    floors += [f"tests/ops/test_{room}.py"]
    assert [f for f in floors if not (ROOT / f).exists()] == []


@pytest.mark.parametrize("floor", ["vlmkernels/ops", "vlmkernels/nn", "bench/ops"])
def test_every_floor_belongs_to_a_room(floor: str) -> None:
    names = {p.stem for p in (ROOT / floor).glob("*.py") if not p.stem.startswith("_")}
    assert names <= set(ROOMS)


@pytest.mark.parametrize("path", CPP, ids=relative)
def test_csrc_includes(path: Path) -> None:
    """No torch anywhere; a room sees itself and common/, its .cpp also binding/."""
    found = re.findall(r'#include\s+[<"]([^>"]+)[>"]', path.read_text())
    assert [i for i in found if re.match(r"(torch|ATen|c10)/", i)] == []
    room = path.relative_to(ROOT / "csrc").parts[0]
    if room == "binding":
        return
    allowed = {room, "common"} | ({"binding"} if path.suffix == ".cpp" else set())
    ours = [i for i in found if i.split("/")[0] in {*ROOMS, *SHARED}]
    assert [i for i in ours if i.split("/")[0] not in allowed] == []


@pytest.mark.parametrize("path", PYTHON + CPP, ids=relative)
def test_file_length(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 500


@pytest.mark.parametrize("path", PYTHON, ids=relative)
def test_python_function_length(path: Path) -> None:
    long = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            document = ast.get_docstring(node, clean=False)
            lines = (node.end_lineno or 0) - node.lineno + 1
            lines -= len(document.splitlines()) if document else 0
            if lines > 60:
                long.append((node.name, lines))
    assert long == []


def cpp_functions(text: str) -> Iterator[tuple[str, int]]:
    """(head, lines) of each function body; namespaces, structs and enums are looked into."""
    text = re.sub(r"//[^\n]*|^#(\\\n|[^\n])*", "", text, flags=re.M)
    text = re.sub(r'"(\\.|[^"\\\n])*"', '""', text)
    depth, head, begin, line = 0, "", 0, 1
    open_heads: list[str] = []
    for c in text:
        line += c == "\n"
        if c == "{":
            scope = re.search(r"\b(namespace|struct|class|enum|union)\b", head) and ")" not in head
            if depth == 0 and scope:
                open_heads.append(head)
            else:
                if depth == 0:
                    begin, function = line, head
                depth += 1
            head = ""
        elif c == "}":
            if depth:
                depth -= 1
                if depth == 0 and "(" in function:
                    yield " ".join(function.split()), line - begin + 1
            elif open_heads:
                open_heads.pop()
            head = ""
        elif c == ";":
            head = ""
        else:
            head += c


@pytest.mark.parametrize("path", CPP, ids=relative)
def test_cpp_function_length(path: Path) -> None:
    long = []
    for head, lines in cpp_functions(path.read_text()):
        if lines > (150 if "__global__" in head or "_kernel(" in head else 60):
            long.append((head, lines))
    assert long == []


def test_scanner_sees_functions() -> None:
    """The scanner itself: it must find every kernel, or the rule above checks nothing."""
    kernels = [
        head for path in CPP for head, _ in cpp_functions(path.read_text()) if "__global__" in head
    ]
    written = sum(len(re.findall(r"^__global__", p.read_text(), re.M)) for p in CPP)
    assert len(kernels) >= written > 0


def test_public_names_are_documented() -> None:
    for name in vlmkernels.ops.__all__:
        document = getattr(vlmkernels.ops, name).__doc__
        assert document and len(document.split()) > 5, f"ops.{name} has no docstring"


def test_readme_paths_exist() -> None:
    text = (ROOT / "README.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text()
    links = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    paths = re.findall(r"`((?:csrc|vlmkernels|tests|bench|docs|tools)/[\w./]*)`", text)
    missing = [p for p in links + paths if not (ROOT / p).exists()]
    assert links and paths and missing == []


def test_readme_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    text = (ROOT / "README.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text()
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.M)) <= targets


def test_readme_op_table() -> None:
    """The table lists every public function of every room, and nothing else."""
    text = (ROOT / "README.md").read_text()
    table = text[text.index("| op |") :].split("\n\n")[0]
    listed = set(re.findall(r"`ops\.(\w+)`", table))
    assert listed == set(vlmkernels.ops.__all__)


def test_every_op_has_a_room() -> None:
    files = {
        getattr(op.kernel, "__module__", "").rsplit(".", 1)[-1] for op in _library.ops.values()
    }
    private = {f for f in files if any(f.startswith(f"_{room}_") for room in ROOMS)}
    assert files - private == set(ROOMS)
