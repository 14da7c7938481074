"""The READMEs' examples: what needs no hub is run as it stands, all flags meet the real parsers,
the trees name what is there."""

import ast
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import harness.cli

ROOT = Path(__file__).parents[1]
PACKAGES = [ROOT / "harness", *sorted(path.parent for path in ROOT.glob("packages/*/src"))]
DOCS = sorted(ROOT.glob("docs/*.md"))
PAGES = [
    *(ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS),
    *(path / "README.md" for path in PACKAGES),
]
# What stands in for the hub where there is none.
HUB = {"facebook/opt-125m": "tiny-llama-student", '"c4"': '"stdlib", nsamples=8'}
EMBEDDED = ("tiny-llama", "tiny-w4", "tiny-50", "tiny-half", "tiny-trained", "tiny-w2")


def blocks(page: Path, language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S)
    return [text for name, text in found if name == language]


def commands(page: Path) -> list[list[str]]:
    """The words of every line of the page's bash blocks, continued lines joined."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


ALL = [pytest.param(page, words, id=" ".join(words)) for page in PAGES for words in commands(page)]


@pytest.mark.parametrize(("page", "words"), ALL)
def test_every_command_is_one(page, words):
    if words[0] in ("torchrun", "accelerate"):
        words = ["python", *words[words.index("-m") :]]
    if words[:2] == ["python", "-m"] and words[2] != "pip":
        module = "gptq.cli" if words[2] == "gptq" else words[2]
        importlib.import_module(module).parser().parse_args(words[3:])
    elif words[0] == "harness":
        harness.cli.build_parser().parse_args(words[1:])
    elif words[0] == "bash":
        assert (ROOT / words[1]).is_file()
    elif words[0] == "nox" or words[-1] == "nox" or "&&" in words:
        words = words[: words.index("--")] if "--" in words else words
        asked = words[words.index("-s") + 1 :] if "-s" in words else []
        tree = ast.parse((ROOT / "noxfile.py").read_text("utf-8"))
        sessions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert set(asked) <= sessions
    elif words[:4] == ["python", "-m", "pip", "install"]:
        for path in (word for word in words if word.startswith("./")):
            assert (ROOT / path.partition("[")[0] / "pyproject.toml").is_file()
    else:
        assert words[0] in ("vllm", "pytest", "git", "export"), f"{page}: {words[0]} is not known"


@pytest.mark.slow
def test_offline_commands_run_one_after_another(tmp_path, run_python):
    ran = 0
    for words in commands(ROOT / "README.md"):
        if any(word in EMBEDDED for word in words):
            words = words[2:] if words[0] == "python" else words
            run_python("-m", *words, cwd=tmp_path)
            ran += 1
    assert ran >= 3
    assert "## Evaluation" in (tmp_path / "tiny-w4/README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("code", [code for page in DOCS for code in blocks(page, "python")])
def test_python_blocks_run(code, tmp_path, run_python):
    for name, stand_in in HUB.items():
        code = code.replace(name, stand_in)
    run_python("-c", code, cwd=tmp_path)
    assert list(tmp_path.glob("*/model*.safetensors"))


def test_the_tree_names_every_room():
    tree = next(block for block in blocks(ROOT / "README.md", "") if "noxfile.py" in block)
    folders, named = [], set()
    for line in tree.splitlines():
        name, depth = line.split()[0], (len(line) - len(line.lstrip())) // 2
        folders[depth:] = [name]
        named.add("".join(folders))
    for path in named:
        assert (ROOT / path).exists(), f"{path} is in the tree but not there"
    rooms = [ROOT / name for name in ("tests", "docs", "recipes", "benchmarks")]
    rooms += [path.parent for path in (ROOT / "harness/src/harness").glob("*/__init__.py")]
    rooms += [path.parent for path in ROOT.glob("packages/*/src")]
    missing = [room for room in rooms if f"{room.relative_to(ROOT)}/" not in named]
    assert not missing, f"the README's tree does not name {missing}"
    assert len(tree.splitlines()) <= 30


def test_the_first_page_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    """Files are there, and so are the headings of those that a link names one of."""
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page}: {link} leads nowhere"
        if anchor:
            text = re.sub(r"^```.*?^```$", "", target.read_text("utf-8"), flags=re.M | re.S)
            heads = re.findall(r"^#+ (.*)$", text, re.M)
            anchors = [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads]
            assert anchor in anchors, f"{page}: {link} names no heading of {anchors}"


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_a_package_names_its_files(package):
    page = package / "README.md"
    tree = next(block for block in blocks(page, "") if block.startswith(f"src/{package.name}/"))
    named = set(re.findall(r"^ +(\w+\.py) +\S", tree, re.M))
    words = ["git", "ls-files", "src/*.py"]
    listed = subprocess.run(words, cwd=package, capture_output=True, text=True, check=True).stdout
    files = {Path(line).name for line in listed.split()} - {"__init__.py", "__main__.py"}
    missing, gone = sorted(files - named), sorted(named - files)
    assert not missing, f"the tree at the end of {page} lacks {missing}"
    assert not gone, f"the tree at the end of {page} names {gone}, which are not there"


def test_programs_of_the_readme_are_this_python():
    """The commands above call what is installed here, not another copy."""
    for program in ("harness", "gptq"):
        assert Path(sys.executable).with_name(program).is_file()
