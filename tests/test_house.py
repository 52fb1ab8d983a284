"""The house: who may import whom, how deep, how large things may be, what must not be in the tree.

Nothing of the package is imported here but where a test says so. Every rule is held by ALL files, and the figures are
printed (``pytest -s tests/test_house.py``). Change a floor together with the design.
"""

import ast
import functools
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

FLOORS = (
    # what a reader finds first: data, shapes, files, machines
    {
        "errors",
        "shapes",
        "batch",
        "head",
        "trees",
        "tokenizer",
        "vocab",
        "fetch",
        "progress",
        "devices",
        "config",
        "metrics",
    },
    {"losses", "models", "optim", "checkpoint"},
    {"term", "state", "data", "weights", "generation", "students", "training"},
    {"features", "evaluation", "parallel"},
    {"objective"},
    {"step", "teacher"},
    {"train", "cli"},
    # what a user of the library never opens
    {"experiments", "reports", "planning", "configs"},
    {"benchmarks", "reproduce"},
)
"""The parts of the package, floor by floor: a part imports its own floor and those below."""

SIDEWAYS = {
    "config": {"configs"},  # by their names, never at import
    "devices": {"models"},  # speed.py: the FLOPs of a model
}
"""The arrows that point up: part → parts."""

LIMITS = {"depth": 10, "flat modules": 22, "positional arguments": 6, "getattr per 1000 lines": 2.0}

HEAVY = {
    "grain": {"data"},
    "tensorflow_datasets": {"data"},
    "orbax": {"checkpoint"},
    "transformers": {"tokenizer", "weights"},
    "gguf": {"weights"},
    "matplotlib": {"reports"},
    "tensorboardX": {"metrics"},
    "tyro": {"cli"},
    "torch": set(),
    "tensorflow": set(),
}
"""Slow to import → the parts that may do it, inside a function."""

UNPICKLERS = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "torch"}


@functools.cache
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


def every(check):
    """All complaints of ``check(name, path, tree)`` over all modules, in one list."""
    return [found for name, path in MODULES.items() for found in check(name, path, parsed(path))]


# ---- arrows


def edges() -> dict[str, set[str]]:
    """Module → the modules of ours that it imports anywhere, inside functions too."""
    return {name: imports(parsed(path)) & MODULES.keys() - {name} for name, path in MODULES.items()}


def test_no_arrow_points_up():
    floor = {part: number for number, parts in enumerate(FLOORS) for part in parts}
    assert floor.keys() == {part(name) for name in MODULES} - {""}

    def upward(name, path, tree):
        here = part(name)
        for other in imports(tree):
            there = part(other) if other.split(".")[0] == "distill" else ""
            if here and there and floor[there] > floor[here] and there not in SIDEWAYS.get(here, set()):
                yield f"{name} (floor {floor[here]}) imports {other} (floor {floor[there]})"

    assert not every(upward)


def test_a_package_is_left_by_its_modules_only():
    """Nothing of ours imports the package from within itself: what its ``__init__`` shows is for users."""

    def inside(name, path, tree):
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        if path.name != "__init__.py" and package != "distill":
            yield from [f"{name} imports {package}" for other in imports(tree) if other == package]

    assert not every(inside)


def test_the_house_is_shallow_and_has_no_cycle():
    arrows = edges()

    @functools.cache
    def longest(name: str) -> tuple[str, ...]:
        below = (longest(other) for other in sorted(arrows[name] - {"distill.errors"}))  # as one knows ValueError
        return (name, *max(below, key=len, default=()))

    finished = set()

    def visit(name: str, way: tuple[str, ...]):
        assert name not in way, " → ".join((*way[way.index(name) :], name))
        if name not in finished:
            for other in sorted(arrows[name]):
                visit(other, (*way, name))
            finished.add(name)

    for name in arrows:
        visit(name, ())
    chain = max((longest(name) for name in arrows), key=len)
    flat = [path for path in (ROOT / "distill").glob("*.py") if path.name != "__init__.py"]
    print(f"\nlongest chain {len(chain)}: {' ← '.join(chain)}; {len(flat)} flat modules; {len(MODULES)} in all")
    assert len(chain) <= LIMITS["depth"], chain
    assert len(flat) <= LIMITS["flat modules"]


def test_slow_imports_stay_in_functions_of_their_owners():
    def outside(name, path, tree):
        everywhere, at_once = ({one.split(".")[0] for one in names} for names in (imports(tree), at_import(tree)))
        yield from [f"{name} imports {one} when it is imported" for one in at_once & HEAVY.keys()]
        yield from [f"{name} imports {one}" for one in everywhere & HEAVY.keys() if part(name) not in HEAVY[one]]

    assert not every(outside)


def test_every_submodule_is_reached_from_the_package():
    code = "import sys, distill; assert 'jax' not in sys.modules; distill.losses.forward_kl; distill.students"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("modules", "unwanted"),
    [
        ("distill, distill.step, distill.parallel, distill.experiments.runner, distill.cli", set(HEAVY)),
        ("distill, distill.reports.addition, distill.cli", {"jax", "flax", "optax"} | set(HEAVY)),
    ],
)
def test_slow_libraries_are_not_loaded_with_the_package(modules, unwanted):
    code = f"import sys, {modules}; print(*sorted({unwanted!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stdout + done.stderr


# ---- docstrings and sizes


def test_everything_public_says_what_it_is():
    linen = {"setup", "__call__"}  # named by Flax, described by their class

    def silent(module, path, tree):
        public = {"": tree}
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                public[node.name] = node
                if isinstance(node, ast.ClassDef):
                    public |= {f"{node.name}.{n.name}": n for n in node.body if isinstance(n, ast.FunctionDef)}
        for name, node in public.items():
            last = name.split(".")[-1]
            if not (ast.get_docstring(node) or last in linen or last.startswith("_")):
                yield f"{module}.{name}"

    assert not every(silent)


def test_nothing_is_too_large():
    def large(name, path, tree):
        if len(path.read_text().splitlines()) > 500:
            yield f"{name} has more than 500 lines"
        yield from [f"{name}.{one.name}: {body_lines(one)} lines" for one in functions(tree) if body_lines(one) > 100]

    assert not every(large)
    sizes = sorted(body_lines(function) for path in MODULES.values() for function in functions(parsed(path)))
    print(f"\n{len(sizes)} functions: median {statistics.median(sizes)}, p95 {sizes[int(0.95 * len(sizes))]} lines")
    assert statistics.median(sizes) <= 11 and sizes[int(0.95 * len(sizes))] <= 50


def positional(function: ast.FunctionDef) -> int:
    """Positional parameters, ``self`` and ``cls`` aside."""
    names = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def test_calls_are_flat():
    def long(name, path, tree):
        many = [one for one in functions(tree) if positional(one) > LIMITS["positional arguments"]]
        yield from [f"{name}.{one.name}: {positional(one)} positional parameters" for one in many]

    assert not every(long)


def test_attributes_are_known_by_name():
    calls = [
        f"{name}:{node.lineno}"
        for name, path in MODULES.items()
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr")
    ]
    lines = sum(len(path.read_text().splitlines()) for path in MODULES.values())
    print(f"\ngetattr and hasattr: {len(calls)} in {lines} lines, {1000 * len(calls) / lines:.2f} per 1 000")
    assert 1000 * len(calls) / lines <= LIMITS["getattr per 1000 lines"], calls


ASKS = ("default_backend", "platform", "platform_dependent")


def test_one_file_decides_by_platform():
    """``devices/backend.py``; what only reports a platform, or refuses one, is named here."""
    reports = {"devices.backend", "devices.chips", "devices.speed", "reproduce.page", "benchmarks.head"}
    reports |= {"benchmarks.attention", "experiments.cost", "parallel"}

    def asks(name, path, tree):
        for node in ast.walk(tree):
            asked = isinstance(node, ast.Attribute) and node.attr in (
                "default_backend",
                "platform",
                "platform_dependent",
            )
            known = asked and isinstance(node.value, ast.Name) and node.value.id in ("backend", "self", "how")
            if asked and not known and name.removeprefix("distill.") not in reports:
                yield f"{name}:{node.lineno} {node.attr}"

    assert not every(asks)


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


def test_nothing_unpickles():
    for path in (*MODULES.values(), *SCRIPTS):
        tree = parsed(path)
        assert not {name.split(".")[0] for name in imports(tree)} & UNPICKLERS, path
        keywords = [node for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "allow_pickle"]
        unsafe = [one for one in keywords if not (isinstance(one.value, ast.Constant) and one.value.value is False)]
        assert not unsafe, path
