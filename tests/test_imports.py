"""Who may import whom: the harness no method, a method the harness and no other method, the
mathematics of a method torch and the harness's grids alone."""

import ast
import functools
import sys
from pathlib import Path

import pytest

from harness.checkpoint import layouts

ROOT = Path(__file__).parents[1]
METHODS = sorted(path.name for path in (ROOT / "packages").iterdir() if (path / "src").is_dir())
MATHEMATICS = [
    ROOT / f"{folder}/{name}.py"
    for folder, names in {
        "packages/gptq/src/gptq": ("solver", "kernel"),
        "packages/sparse/src/sparse": ("solver", "kernel", "masks"),
        "harness/src/harness/quant": ("clip_search", "fake_quant"),
    }.items()
    for name in names
]
# Every module that a command runs: those that are called with `python -m`, and the programs.
MODULES = sorted(
    f"{path.parent.name}.{path.stem}"
    for path in ROOT.glob("packages/*/src/*/*.py")
    if path.stem != "cli" and '__name__ == "__main__"' in path.read_text(encoding="utf-8")
)
COMMANDS = ["harness", "gptq", *MODULES]


def imports(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; name the package"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def reaches(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


# The harness's rooms from top to bottom; those in one row do not see each other. What is in none of
# them is the ground, which every room may import.
ROOMS = (
    {"cli"},
    {"commands", "training"},
    {"metrics"},
    {"blocks", "generation"},
    {"checkpoint"},
    {"losses", "data", "quant"},
    {"ground"},
)


def modules(package: str) -> dict[str, Path]:
    """Dotted name -> file of all modules of a package."""
    source = ROOT / ("harness" if package == "harness" else f"packages/{package}") / "src"
    return {
        ".".join(path.relative_to(source).with_suffix("").parts): path
        for path in source.rglob("*.py")
        if path.stem not in ("__init__", "__main__")
    }


@functools.cache
def arrows(package: str) -> dict[str, set[str]]:
    """Module -> the modules of the same package that it imports, at its top or inside functions."""
    files = modules(package)
    ends = {name: imports(path) for name, path in files.items()}
    return {
        name: {n if n in files else n.rpartition(".")[0] for n in names} & set(files)
        for name, names in ends.items()
    }


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 2 or parts[1] == "cli" else "ground"


def floor_of(module: str) -> int:
    """The row of a module's room, counted from the top."""
    return next(row for row, rooms in enumerate(ROOMS) if room_of(module) in rooms)


def test_rooms_import_downward():
    for name, targets in arrows("harness").items():
        for target in targets:
            same = room_of(name) == room_of(target)
            assert same or floor_of(name) < floor_of(target), f"{name} imports {target}"


@pytest.mark.parametrize("package", ["harness", *METHODS])
def test_no_circle(package):
    graph = arrows(package)
    while leaves := {name for name, targets in graph.items() if not targets & set(graph)}:
        graph = {name: targets for name, targets in graph.items() if name not in leaves}
    assert not graph, f"circles, or modules above one: {sorted(graph)}"


@pytest.mark.parametrize("package", ["harness", *METHODS])
def test_module_names_tell_apart(package):
    names = [name.rpartition(".")[2] for name in modules(package)]
    rooms = {name.split(".")[-2] for name in modules(package)}
    assert len(set(names)) == len(names), sorted(n for n in names if names.count(n) > 1)
    assert not rooms & set(names)


@pytest.mark.parametrize("package", ["harness", *METHODS])
def test_a_namespace_stays_where_the_flags_are(package):
    """Flags are settings or keywords once they leave the module that makes their parser."""
    for path in modules(package).values():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        if names & {"parser", "build_parser", "add_flags"}:
            continue
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        for function in (node for body in (tree, *classes) for node in body.body):
            if isinstance(function, ast.FunctionDef):
                taken = function.args
                for argument in (*taken.posonlyargs, *taken.args, *taken.kwonlyargs):
                    kind = ast.unparse(argument.annotation) if argument.annotation else ""
                    fine = argument.arg != "args" and "Namespace" not in kind
                    assert fine, f"{path}: {function.name} takes a Namespace"


@pytest.mark.parametrize("package", ["harness", *METHODS])
def test_what_a_run_leaves_is_named_in_one_place(package):
    for name, path in modules(package).items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            spelled = isinstance(node, ast.Constant) and ".partial" in str(node.value)
            assert not spelled or name == "harness.checkpoint.runs", f"{path}: .partial"


def test_layouts_are_compared_in_the_checkpoint_room_alone():
    """Elsewhere a layout's module is asked what it holds and needs."""
    for package in ("harness", *METHODS):
        for name, path in modules(package).items():
            if name.startswith("harness.checkpoint."):
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Compare):
                    parts = [x for side in (node.left, *node.comparators) for x in ast.walk(side)]
                    named = {x.value for x in parts if isinstance(x, ast.Constant)}
                    of = {getattr(x, "id", getattr(x, "attr", "")) for x in parts}
                    asked = any(word in name for name in of for word in ("layout", "format"))
                    # A stream of hidden states is dense too.
                    names = set(layouts.LAYOUTS) - (set() if asked else {"dense"})
                    assert not named & names, f"{path}:{node.lineno}"


# What else a method may import of another: the mathematics that it composes.
COMPOSES = {"llmc": ("gptq", "sparse")}


@pytest.mark.parametrize("package", ["harness", *METHODS])
def test_no_package_imports_a_method_of_another(package):
    files = modules(package)
    assert files
    others = [method for method in METHODS if method != package]
    mathematics = [f"{path.parent.name}.{path.stem}" for path in MATHEMATICS]
    for path in files.values():
        for name in imports(path):
            for other in (method for method in others if reaches(name, method)):
                composed = other in COMPOSES.get(package, ()) and any(
                    reaches(name, module) for module in mathematics
                )
                assert composed, f"{path} imports {name}"


@pytest.mark.parametrize("path", MATHEMATICS, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_mathematics_import_torch_and_the_grids_alone(path):
    package = path.parent.name
    for name in imports(path):
        top = name.partition(".")[0]
        allowed = top in sys.stdlib_module_names or top in ("torch", "triton")
        allowed |= reaches(name, "harness.quant.grid") or reaches(
            name, "harness.quant.normal_float"
        )
        allowed |= any(reaches(name, f"{package}.{other.stem}") for other in MATHEMATICS)
        assert allowed, f"{path} imports {name}"


@pytest.mark.parametrize("module", COMMANDS)
def test_importing_a_command_line_imports_nothing_heavy(module, run_python):
    """What keeps --help under a second."""
    heavy = ["torch", "transformers", "numpy", "datasets", "matplotlib", "pandas", "triton"]
    code = (
        "import runpy, sys\nsys.argv = ['x', '--help']\n"
        f"try: runpy.run_module({module!r}, run_name='__main__')\n"
        "except SystemExit as done: assert not done.code\n"
        f"print('heavy:', [name for name in {heavy} if name in sys.modules])"
    )
    shown = run_python("-c", code)
    assert "usage:" in shown and "heavy: []" in shown
