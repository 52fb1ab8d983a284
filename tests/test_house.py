"""The house: who may import whom, how large things may be, what must not be in the tree. Nothing is imported here.

Change an arrow together with the design: what points down stays small, and only the top knows everything.
"""

import ast
import json
import re
import statistics
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

ARROWS = {
    "shapes": set(),
    "tokenizer": set(),
    "processes": set(),
    "metrics": {"processes"},
    "progress": set(),
    "profiling": set(),
    "table": set(),
    "vocab": {"shapes"},
    "head": {"shapes"},
    "hlo": set(),
    "chips": set(),
    "roofline": {"models", "chips"},
    "prune": {"shapes", "models", "tokenizer"},
    "losses": {"shapes", "head"},
    "models": {"shapes", "head"},
    "weights": {"processes", "shapes", "models", "tokenizer", "progress"},
    "optim": {"shapes"},
    "data": {"processes", "shapes", "tokenizer", "weights"},
    "report": {"metrics"},
    "features": {"shapes", "losses", "models", "data"},
    "objective": {"shapes", "losses", "models", "data", "features"},
    "sampling": {"shapes", "models"},
    "step": {"shapes", "losses", "models", "data", "features", "objective", "optim"},
    "parallel": {"processes", "shapes", "models", "data", "step"},
    "evaluate": {"processes", "shapes", "models", "data", "step", "sampling", "metrics"},
    "config": {"processes", "metrics", "models", "data", "features", "objective", "optim", "parallel", "configs"},
    "text_config": {"models", "data", "objective", "optim", "parallel", "config"},
    "report_sentences": {"report"},
    "report_text": {"report"},
    "configs": {"models", "data", "features", "objective", "optim", "parallel", "config", "text_config"},
    "checkpoint": {"processes", "shapes", "config"},
    "speed": {"models", "chips"},
    "preflight": {"shapes", "losses", "models", "data", "objective", "vocab", "config"},
}
"""Part of distill → the parts it may import, besides itself."""

TOP = {
    "train",
    "arms",
    "experiment",
    "sentences",
    "protocol",
    "reproduce",
    "conformance",
    "golden",
    "benchmark",
    "benchmark_attention",
    "benchmark_head",
    "benchmark_pair",
    "benchmark_scaling",
    "benchmark_step",
    "benchmark_tpu",
    "cli",
    "kinds",
    "plan",
    "stages",
    "survival",
    "text_experiment",
    "text_heldout",
}
"""These may import everything, and only they each other."""

HEAVY = {
    "grain": {"data"},
    "tensorflow_datasets": {"data"},
    "orbax": {"checkpoint"},
    "transformers": {"tokenizer", "weights"},
    "gguf": {"weights"},
    "matplotlib": {"report"},
    "tensorboardX": {"metrics"},
    "tyro": {"cli"},
    "torch": set(),
    "tensorflow": set(),
}
"""Slow to import → the parts that may do it, inside a function."""

UNPICKLERS = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "torch"}
LOOP = ("train.py", "_loop")


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def name_of(path: Path) -> str:
    """``distill/models/layers.py`` → ``distill.models.layers``."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in sorted((ROOT / "distill").rglob("*.py"))}
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def part(module: str) -> str:
    """``distill.models.layers`` → ``models``."""
    return module.split(".")[1] if "." in module else ""


def imports(tree: ast.AST) -> set[str]:
    """Full names of what is imported anywhere in a tree, inside functions too; of ours, the module it is in."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import: write the whole name, so that it can be found"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES else node.module for name in inner}
    return names


def at_import(tree: ast.Module) -> set[str]:
    """What is imported when the module is: not inside functions."""
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    outer = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom) and id(n) not in inside]
    return imports(ast.Module(outer, []))


def functions(tree: ast.AST):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def body_lines(function: ast.FunctionDef) -> int:
    """Lines of a function's body, its docstring aside."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return function.end_lineno - body[0].lineno + 1 if body else 0


# ---- arrows


@pytest.mark.parametrize("module", MODULES)
def test_imports_follow_the_arrows(module):
    here = part(module)
    ours = {part(name) for name in imports(parsed(MODULES[module])) if name.split(".")[0] == "distill"} - {here}
    if here in TOP:
        return
    assert here == "" or here in ARROWS, f"{here} has no line in ARROWS: write down what it may import"
    assert ours <= ARROWS.get(here, set()), f"{module} imports {sorted(ours - ARROWS.get(here, set()))}"


def test_no_arrow_points_up():
    assert not TOP & set.union(*ARROWS.values())
    assert set(ARROWS) | TOP == {part(name) for name in MODULES} - {""}  # and none for what is not there


def test_no_import_cycles():
    edges = {name: imports(parsed(path)) & set(MODULES) - {name} for name, path in MODULES.items()}
    finished = set()

    def visit(name: str, way: tuple[str, ...]):
        assert name not in way, " → ".join((*way[way.index(name) :], name))
        if name not in finished:
            for other in sorted(edges[name]):
                visit(other, (*way, name))
            finished.add(name)

    for name in edges:
        visit(name, ())
    assert any(edges.values())


@pytest.mark.parametrize("module", MODULES)
def test_slow_imports_stay_in_functions_of_their_owners(module):
    tree = parsed(MODULES[module])
    everywhere, outside = ({name.split(".")[0] for name in names} for names in (imports(tree), at_import(tree)))
    assert not outside & HEAVY.keys()
    assert all(part(module) in HEAVY[name] for name in everywhere & HEAVY.keys())


@pytest.mark.parametrize(
    ("modules", "unwanted"),
    [
        ("distill, distill.step, distill.parallel, distill.experiment, distill.cli", set(HEAVY)),
        ("distill, distill.report, distill.cli", {"jax", "flax", "optax"} | set(HEAVY)),
    ],
)
def test_slow_libraries_are_not_loaded_with_the_package(modules, unwanted):
    code = f"import sys, {modules}; print(*sorted({unwanted!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stdout + done.stderr


# ---- docstrings and sizes


@pytest.mark.parametrize("module", MODULES)
def test_everything_public_says_what_it_is(module):
    tree = parsed(MODULES[module])
    public = {"": tree}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            public[node.name] = node
            if isinstance(node, ast.ClassDef):
                public |= {f"{node.name}.{n.name}": n for n in node.body if isinstance(n, ast.FunctionDef)}
    linen = {"setup", "__call__"}  # named by Flax, described by their class
    methods = {name: name.split(".")[-1] for name in public}
    silent = [n for n, node in public.items() if not (ast.get_docstring(node) or methods[n] in linen)]
    assert not [name for name in silent if not methods[name].startswith("_")]


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_too_large(module):
    path = MODULES[module]
    assert len(path.read_text().splitlines()) <= 500
    for function in functions(parsed(path)):
        limit = 150 if (path.name, function.name) == LOOP else 100
        assert body_lines(function) <= limit, function.name


def test_most_functions_are_small():
    sizes = sorted(body_lines(function) for path in MODULES.values() for function in functions(parsed(path)))
    assert len(sizes) > 100
    assert statistics.median(sizes) <= 11
    assert sizes[int(0.95 * len(sizes))] <= 50


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_thin(path):
    tree = parsed(path)
    assert len(path.read_text().splitlines()) <= 60
    assert f"python scripts/{path.name} " in (ast.get_docstring(tree) or "")  # an example to copy
    main = next(function for function in functions(tree) if function.name == "main")
    assert [argument.arg for argument in main.args.args] == ["argv"]
    assert not at_import(tree) & {"jax"}  # --help answers at once


# ---- what must not be in the tree


def written_files():
    folders = ("distill", "scripts", "tests", "notebooks", "docs", ".github")
    inside = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    files = [*inside, *ROOT.glob("*.md"), *ROOT.glob("*.toml"), ROOT / "Makefile"]
    return [path for path in files if path.is_file() and "__pycache__" not in path.parts]


def test_no_path_of_somebodys_machine():
    machine = re.compile(r"(?<![\w.}~-])/(?:home|root|work|mnt|Users)/\w")
    assert machine.search("open('/ho" + "me/ada/data')")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in written_files()
        for number, line in enumerate(path.read_text(errors="ignore").splitlines(), start=1)
        if machine.search(line)
    ]
    assert not found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_stored_without_outputs(path):
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert cells
    assert not [cell for cell in cells if cell["outputs"] or cell["execution_count"] is not None]


@pytest.mark.parametrize("path", [*MODULES.values(), *SCRIPTS], ids=lambda path: path.name)
def test_nothing_unpickles(path):
    tree = parsed(path)
    assert not {name.split(".")[0] for name in imports(tree)} & UNPICKLERS
    words = [node for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "allow_pickle"]
    assert not [word for word in words if not (isinstance(word.value, ast.Constant) and word.value.value is False)]
