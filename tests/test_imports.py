"""Who may import whom: the harness no method, a method the harness and no other method, the
mathematics of a method torch and the harness's grids alone."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
METHODS = sorted(path.name for path in (ROOT / "packages").iterdir() if (path / "src").is_dir())
MATHEMATICS = [
    ROOT / f"packages/{package}/src/{package}/{name}.py"
    for package, names in {
        "gptq": ("solver", "kernel"),
        "sparse": ("solver", "kernel", "masks"),
        "bitdistiller": ("clip_search", "quantizer"),
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


@pytest.mark.parametrize("room", ["harness", *METHODS])
def test_no_package_imports_a_method_of_another(room):
    source = ROOT / ("harness" if room == "harness" else f"packages/{room}") / "src"
    files = list(source.rglob("*.py"))
    assert files
    others = [method for method in METHODS if method != room]
    for path in files:
        for name in imports(path):
            assert not any(reaches(name, other) for other in others), f"{path} imports {name}"


@pytest.mark.parametrize("path", MATHEMATICS, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_mathematics_import_torch_and_the_grids_alone(path):
    package = path.parent.name
    for name in imports(path):
        top = name.partition(".")[0]
        allowed = top in sys.stdlib_module_names or top in ("torch", "triton")
        allowed |= reaches(name, "harness.grid") or reaches(name, "harness.normal_float")
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
