"""What is built from this tree: the files inside, and how the wheel behaves where the tree is not."""

from __future__ import annotations

import re
import site
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

pytestmark = [pytest.mark.packaging, pytest.mark.timeout(600)]

REPOSITORY = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES = [REPOSITORY / folder for folder in PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]]
DIST_INFO = f"mplus_agents-{PYPROJECT['project']['version']}.dist-info"
FRAMEWORKS = ("langchain", "langchain_classic", "langchain_core", "langgraph", "llama_index")
HIDE_FRAMEWORKS = f"import sys; sys.modules.update(dict.fromkeys({FRAMEWORKS!r}))\n"


@dataclass(frozen=True, slots=True)
class Built:
    """An sdist, the wheel built from that sdist, and the wheel built from the tree."""

    sdist: Path
    wheel_of_sdist: Path
    wheel: Path


@dataclass(frozen=True, slots=True)
class Installed:
    """An environment that holds the wheel, and an empty folder to run in."""

    packages: Path
    scripts: Path
    cwd: Path

    def run(self, command: Sequence[str | Path]) -> str:
        return _run(command, self.cwd)

    def python(self, code: str) -> str:
        return self.run([self.scripts / "python", "-I", "-c", code]).strip()


def _run(command: Sequence[str | Path], cwd: Path) -> str:
    result = subprocess.run(command, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if result.returncode:
        pytest.fail(f"{command} ended with {result.returncode}:\n{result.stdout}\n{result.stderr}")
    return result.stdout


def _only(folder: Path, pattern: str) -> Path:
    [path] = folder.glob(pattern)
    return path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    release, direct = tmp_path_factory.mktemp("release"), tmp_path_factory.mktemp("direct")
    build = [sys.executable, "-m", "build", "--no-isolation"]
    _run([*build, "--outdir", release], REPOSITORY)  # the sdist, then a wheel from the unpacked sdist
    _run([*build, "--outdir", direct, "--wheel"], REPOSITORY)
    return Built(_only(release, "*.tar.gz"), _only(release, "*.whl"), _only(direct, "*.whl"))


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    environment, cwd = tmp_path_factory.mktemp("environment"), tmp_path_factory.mktemp("cwd")
    _run([sys.executable, "-m", "venv", "--without-pip", environment], cwd)
    pip = [sys.executable, "-m", "pip", "--python", str(environment)]
    _run([*pip, "install", "--quiet", "--no-deps", "--no-index", built.wheel], cwd)
    packages, scripts = (
        Path(sysconfig.get_path(kind, "venv", {"base": str(environment)})) for kind in ("purelib", "scripts")
    )
    # Dependencies come from the environment that runs this test. Python searches a folder named in a .pth file, but
    # does not follow the .pth files inside it, so an editable install of this tree stays out.
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()), encoding="utf-8")
    return Installed(packages, scripts, cwd)


@pytest.fixture(scope="module")
def wheel_files(built: Built) -> set[str]:
    with zipfile.ZipFile(built.wheel) as wheel:
        return set(wheel.namelist())


@pytest.fixture(scope="module")
def metadata(built: Built) -> Message:
    with zipfile.ZipFile(built.wheel) as wheel:
        return Parser().parsestr(wheel.read(f"{DIST_INFO}/METADATA").decode())


def test_wheel_installs_the_two_packages_and_nothing_else(wheel_files: set[str]) -> None:
    assert {name.split("/")[0] for name in wheel_files} == {"mplus_agents", "langchain_mplus", DIST_INFO}


def test_the_small_model_has_at_most_16_megabytes(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as wheel:
        sizes = [file.file_size for file in wheel.infolist() if "/assets/mplus-tiny/" in file.filename]
    assert 10e6 < sum(sizes) <= 16e6


def test_wheel_leaves_the_llama_index_namespace_open(wheel_files: set[str]) -> None:
    namespaces = ("", "/llms", "/memory", "/indices", "/indices/managed")
    assert wheel_files.isdisjoint(f"llama_index{folder}/__init__.py" for folder in namespaces)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_wheel_holds_every_file_of_a_package(package: Path, wheel_files: set[str]) -> None:
    paths = [path for path in package.rglob("*") if path.is_file() and not path.name.startswith(".")]
    files = {path.relative_to(package.parent).as_posix() for path in paths if path.suffix != ".pyc"}
    assert f"{package.name}/py.typed" in files
    assert {name for name in wheel_files if name.startswith(f"{package.name}/")} == files


@pytest.mark.parametrize(
    "pattern",
    [
        r"mplus_agents/assets/.+\.safetensors",
        r"mplus_agents/assets/.+\.json",
        r"mplus_agents/store/migrations/env\.py",
        r"mplus_agents/store/migrations/versions/\w+\.py",
        rf"{re.escape(DIST_INFO)}/licenses/LICENSE",
    ],
)
def test_wheel_holds_data(pattern: str, wheel_files: set[str]) -> None:
    assert any(re.fullmatch(pattern, name) for name in wheel_files)


def test_metadata_says_what_pyproject_says(metadata: Message) -> None:
    assert metadata["Name"] == "mplus-agents"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert set(metadata.get_all("Provides-Extra", ())) == set(PYPROJECT["project"]["optional-dependencies"])


def test_no_agent_framework_is_required(metadata: Message) -> None:
    required = [line for line in metadata.get_all("Requires-Dist", ()) if "extra ==" not in line]
    assert len(required) == len(PYPROJECT["project"]["dependencies"])
    assert not [line for line in required if line.startswith(("lang", "llama"))]


def test_sdist_holds_what_building_and_testing_need(built: Built) -> None:
    with tarfile.open(built.sdist) as sdist:
        files = {name.partition("/")[2] for name in sdist.getnames()}
    needed = {"pyproject.toml", "constraints.txt", "Makefile", "README.md", "LICENSE", "CHANGELOG.md", ".ci/run"}
    tests = {path.relative_to(REPOSITORY).as_posix() for path in REPOSITORY.glob("tests/**/test_*.py")}
    assert needed | tests <= files
    assert not [name for name in files if name.startswith(".venv") or "__pycache__" in name]


def test_sdist_builds_the_same_wheel(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as wheel, zipfile.ZipFile(built.wheel_of_sdist) as wheel_of_sdist:
        contents, contents_of_sdist = (
            {entry.filename: entry.CRC for entry in archive.infolist()} for archive in (wheel, wheel_of_sdist)
        )
    assert contents == contents_of_sdist


def test_import_is_light(installed: Installed) -> None:
    code = "import mplus_agents; print(mplus_agents.__file__, *{'torch', 'transformers'}.intersection(sys.modules))"
    assert installed.python(HIDE_FRAMEWORKS + code) == str(installed.packages / "mplus_agents" / "__init__.py")


def test_public_names_need_no_agent_framework(installed: Installed) -> None:
    code = "import mplus_agents\nfor name in mplus_agents.__all__: getattr(mplus_agents, name); print(name)"
    assert {"MPlus", "Agent", "MPlusError"} <= set(installed.python(HIDE_FRAMEWORKS + code).split())


def test_langchain_classes_import_with_langchain(installed: Installed) -> None:
    path = installed.python("import langchain_mplus; print(langchain_mplus.__file__)")
    assert path == str(installed.packages / "langchain_mplus" / "__init__.py")


def test_langchain_classes_name_the_extra_without_langchain(installed: Installed) -> None:
    code = "try:\n    import langchain_mplus\nexcept ImportError as error:\n    print(error)"
    assert "mplus-agents[langchain]" in installed.python(HIDE_FRAMEWORKS + code)


def test_command_line_runs(installed: Installed) -> None:
    assert "Usage: mplus" in installed.run([installed.scripts / "mplus", "--help"])
