"""What is installed: every file, by each way, where there is nothing but the dependencies; and by which compiler."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import tarfile
import venv
from importlib import metadata
from pathlib import Path
from zipfile import Path as ZipPath

import pytest
from helpers import PATIENCE
from packaging.requirements import Requirement
from setuptools import Distribution
from setuptools.command.build_ext import customize_compiler, new_compiler

import sae_fast as sf

ROOT = Path(__file__).parents[2]
NOT_FOR_THE_SDIST = {".ci/run", ".gitignore"}
MADE_FOR_THE_SDIST = r"PKG-INFO|setup\.cfg|sae_fast\.egg-info/.+"
# What needs a package that is no dependency, by module.
EXTRAS = {
    r"sae_fast\.(kernels(\..+)?|train\.device_(step|graphs|after|floors))": "gpu",
    r"sae_fast\.interop\.dictionary_learning(\..+)?": "dictionary-learning",
    r"sae_fast\.interop\.saelens(\..+)?": "saelens",
    r"sae_fast\.interop\.saebench": "saebench",
    r"sae_fast\.interop\.sparsify": "sparsify",
}
NO_COMPILER = r"error: the CPU kernels cannot be built: .+; want a C\+\+17 compiler and Python's headers .+"
ONE_THREAD = "this compiler has no OpenMP: the CPU kernels will run on one thread"

IMPORTS = """
import importlib, json, sys
from sae_fast.extras import MissingExtra
missing = {}
for name in json.loads(sys.argv[1]):
    try:
        importlib.import_module(name)
    except MissingExtra as error:
        missing[name] = str(error)
print(json.dumps(missing))
"""

TRAINS = """
import json, torch
import sae_fast as sf
from importlib.metadata import version
from sae_fast.ops import dispatch

torch.set_num_threads(2)
assert sf.__version__ == version("sae-fast")
x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
sae = sf.GatedSAE(d_in=16, d_sae=48, seed=0)
trainer = sf.Trainer(sae, lr=1e-2, l1_coefficient=0.1, init_l0=8)
losses = [trainer.step(x).loss for _ in range(20)]
print(json.dumps([sf.__file__, dispatch._C.supported_isas(), losses]))
"""


def files(*under: str) -> set[str]:
    """The repository's files in these folders: git's, or in an unpacked sdist all that came with it."""
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *under]
        listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    else:
        listed = (ROOT / "sae_fast.egg-info" / "SOURCES.txt").read_text().splitlines()
    found = {name for name in listed if (ROOT / name).is_file() and not re.fullmatch(MADE_FOR_THE_SDIST, name)}
    return {name for name in found if not under or name.startswith(tuple(f"{folder}/" for folder in under))}


def installed_files() -> set[str]:
    """Where each file of sae_fast/ and kernels/ belongs."""
    return {re.sub("^kernels/", "sae_fast/kernels/", name) for name in files("sae_fast", "kernels")}


def below(folder: Path) -> set[str]:
    found = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix() for path in found}


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """Without this process's PYTHONPATH."""
    environment = {**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, "SAE_FAST_CUDA": "0", **environment}
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=PATIENCE
    )


def output(*command: str | Path, **how) -> str:
    done = run(*command, **how)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def compiler(folder: Path, *refused: str) -> Path:
    """A g++ that knows no such flags."""
    script = folder / "c++"
    cases = "|".join(refused)
    script.write_text(f"""#!/bin/sh
for flag; do case $flag in {cases}) echo "c++: error: unsupported option '$flag'" >&2; exit 1;; esac; done
exec g++ "$@"
""")
    script.chmod(0o755)
    return script


# ---- Quick ----------------------------------------------------------------------------------------------------------


def test_every_file_of_the_packages_is_installed(tmp_path):
    output(sys.executable, "setup.py", "-q", "build_py", "--build-lib", tmp_path, "egg_info", "--egg-base", tmp_path)
    assert {name for name in below(tmp_path) if name.startswith("sae_fast/")} == installed_files()


def test_who_imports_the_folder_kernels_gets_nothing_of_this_package():
    """As transformers does in the repository's folder, in search of a package of that name."""
    script = "import sys, kernels; print([name for name in ('sae_fast', 'torch', 'triton') if name in sys.modules])"
    assert output(sys.executable, "-c", script).strip() == "[]"


def test_every_extra_that_is_named_exists():
    section = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = set(re.findall(r"^([\w-]+) = \[", section, re.M))
    named: dict[str, set[str]] = {}
    for name in files("sae_fast", "kernels", "docs") | {"README.md"}:
        if name.endswith((".py", ".md")):
            text = (ROOT / name).read_text()
            found = re.findall(r"""(?:sae-fast|clone>|'\.)\[([\w,-]+)\]|\brequire\("\w+", (?:extra=)?"([\w-]+)"\)""", text)
            named[name] = {extra for pair in found for extra in "".join(pair).split(",")}
    assert {name: missing for name, of in named.items() if (missing := of - extras)} == {}
    assert {"store", "gpu", "demo", "hub"} <= set().union(*named.values()), (
        "what a call to require() looks like has changed"
    )


@pytest.mark.parametrize("program", ["/nowhere/c++", "a C compiler"])
def test_without_a_compiler_the_build_says_so_in_one_line(tmp_path, program):
    cxx = tmp_path / "gcc"
    cxx.write_text("#!/bin/sh\necho \"gcc: fatal error: cannot execute 'cc1plus'\" >&2\nexit 1\n")
    cxx.chmod(0o755)
    done = run(
        *(sys.executable, "setup.py", "-q", "build", "--build-base", tmp_path, "egg_info", "--egg-base", tmp_path),
        CXX=str(cxx) if program == "a C compiler" else program,
    )
    assert done.returncode == 1 and re.fullmatch(NO_COMPILER, done.stderr.strip()), done.stdout + done.stderr
    assert ("cannot execute 'cc1plus'" if program == "a C compiler" else program) in done.stderr
    assert not below(tmp_path / "lib"), "nothing is copied for a build that fails"


def choose() -> tuple[list[str], list[str]]:
    """setup.py's choice for the compiler that CXX names."""
    build = runpy.run_path("setup.py", run_name="sae_fast_setup")["Build"](Distribution())
    build.finalize_options()
    build.compiler = new_compiler()
    customize_compiler(build.compiler)
    return build.choose()


@pytest.mark.slow(but=2)
@pytest.mark.parametrize(
    ("refused", "openmp", "without"),
    [
        (["-mavx2", "-mfma"], ["-fopenmp"], ["avx2", "avx512"]),  # one for another processor than this machine's
        (["-fopenmp"], ["-fopenmp-simd"], []),
        (["-fopenmp", "-fopenmp-simd"], [], []),
        (["-mavx512*"], ["-fopenmp"], ["avx512"]),
        (["-nothing"], ["-fopenmp"], []),
    ],
)
def test_the_build_takes_what_the_compiler_can(monkeypatch, tmp_path, capsys, refused, openmp, without):
    monkeypatch.chdir(ROOT)
    all_isas = choose()[1]
    monkeypatch.setenv("CXX", str(compiler(tmp_path, *refused)))
    assert choose() == (openmp, [isa for isa in all_isas if isa not in without])
    assert capsys.readouterr().err == ("" if openmp == ["-fopenmp"] else f"{ONE_THREAD}\n")


# ---- Built and installed, each way ----------------------------------------------------------------------------------


def dependencies(wheel: metadata.Distribution) -> dict[str, metadata.Distribution]:
    """The installed distributions that the wheel asks for without an extra, and what those ask for, by name."""
    found: dict[str, metadata.Distribution] = {}
    waiting = [wheel]
    while waiting:
        for text in waiting.pop().requires or []:
            requirement = Requirement(text)
            if requirement.name not in found and (not requirement.marker or requirement.marker.evaluate({"extra": ""})):
                found[requirement.name] = metadata.distribution(requirement.name)
                waiting.append(found[requirement.name])
    return found


def empty_environment(folder: Path, wheel: metadata.Distribution) -> Path:
    """The Python of an environment that holds the wheel's dependencies, as links to this one's, and nothing else."""
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for found in dependencies(wheel).values():
        for name in {file.parts[0] for file in found.files or []} - {"..", "__pycache__"}:
            if not (packages / name).is_symlink():
                (packages / name).symlink_to(found.locate_file(name))
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A clean export."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def sdist(checkout, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    script = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    output(sys.executable, "-c", script, cwd=checkout)
    (archive,) = folder.glob("*.tar.gz")
    return archive


@pytest.mark.slow
def test_the_sdist_is_the_repository(sdist):
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert {name for name in names if not re.fullmatch(MADE_FOR_THE_SDIST, name)} == files() - NOT_FOR_THE_SDIST


PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
OFFLINE = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation"]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["checkout", "sdist, by a compiler without OpenMP and for no AVX"])
def test_it_is_whole_and_trains_where_only_its_dependencies_are(way, checkout, sdist, tmp_path):
    poor = way != "checkout"
    source = sdist if poor else checkout
    cxx = {"CXX": str(compiler(tmp_path, "-fopenmp", "-mavx*"))} if poor else {}
    output(*PIP, "wheel", *OFFLINE, "--wheel-dir", tmp_path, source, cwd=tmp_path, **cxx)
    (wheel,) = tmp_path.glob("*.whl")
    about = metadata.PathDistribution(next(p for p in ZipPath(wheel).iterdir() if p.name.endswith(".dist-info")))
    python = empty_environment(tmp_path / "env", about)
    (packages,) = (tmp_path / "env").glob("lib/python*/site-packages")
    before = set(packages.iterdir())
    output(*PIP, "--python", python, "install", *OFFLINE, wheel, cwd=tmp_path)

    # The files.
    new = {path.name: below(path) for path in set(packages.iterdir()) - before}
    info = f"sae_fast-{sf.__version__}.dist-info"
    assert new.keys() == {"sae_fast", info} and "licenses/LICENSE" in new[info]
    extension = {name for name in new["sae_fast"] if re.fullmatch(r"_C\.[\w-]+\.so", name)}
    assert len(extension) == 1 and {f"sae_fast/{name}" for name in new["sae_fast"] - extension} == installed_files()
    assert (b"libgomp" in (packages / "sae_fast" / extension.pop()).read_bytes()) is not poor

    # Every module, or the extra that it needs.
    names = [re.sub(r"(/__init__)?\.py$", "", name).replace("/", ".") for name in installed_files() if name.endswith(".py")]
    missing = json.loads(output(python, "-c", IMPORTS, json.dumps(names), cwd=tmp_path))
    here = dependencies(about)
    for name in names:
        extra = next((extra for modules, extra in EXTRAS.items() if re.fullmatch(modules, name)), None)
        if extra is None or (extra == "gpu" and "triton" in here):
            assert name not in missing, missing[name]
        else:
            assert f"pip install 'sae-fast[{extra}]'" in missing[name]
            assert extra in about.metadata.get_all("Provides-Extra")

    # It works.
    where, isas, losses = json.loads(output(python, "-c", TRAINS, cwd=tmp_path))
    assert Path(where).is_relative_to(packages) and losses[-1] < 0.9 * losses[0]
    assert isas == ["plain"] if poor else isas == sf.ops.dispatch._C.supported_isas()
    helps = [
        output(*command, "--help", cwd=tmp_path) for command in ([python.parent / "sae-fast"], [python, "-m", "sae_fast"])
    ]
    assert "convert" in helps[0] and helps[0] == helps[1]


@pytest.mark.slow
def test_pip_without_a_compiler_prints_no_traceback(checkout, tmp_path):
    done = run(*PIP, "wheel", *OFFLINE, "--wheel-dir", tmp_path, checkout, CXX="/nowhere/c++")
    assert done.returncode == 1 and re.search(NO_COMPILER, done.stderr)
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) < 20, done.stderr
