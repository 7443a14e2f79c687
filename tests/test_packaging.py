"""What people install: a wheel, an editable install and an sdist, each built here and run outside of any checkout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import diagnostics
from diagnostics import read_run
from diagnostics.trainers.provenance import git_state

ROOT = Path(__file__).parents[1]
KINDS = ("wheel", "sdist", "editable")

pytestmark = pytest.mark.slow


def run(*words, cwd, code=0):
    """Runs a command as in a new terminal: nothing of this process's Python or W&B settings."""
    prefixes = ("WANDB_", "HYDRA_", "PYTHON", "PIP_", "VIRTUAL_ENV")
    env = {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}
    done = subprocess.run(
        list(map(str, words)), cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def built(hook, folder, source=ROOT):
    """The file that a hook of the build backend makes, by which pip and every other installer builds."""
    code = f"import sys, hatchling.build; print(hatchling.build.{hook}(sys.argv[1]))"
    return folder / run(sys.executable, "-c", code, folder, cwd=source).splitlines()[-1]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Kind of install to what pip installs for it."""
    folder = tmp_path_factory.mktemp("dist")
    sdist = built("build_sdist", folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "sdist", filter="data")
    (source,) = (folder / "sdist").iterdir()
    places = {kind: folder / f"for_{kind}" for kind in KINDS}
    for place in places.values():
        place.mkdir()
    return {
        "archive": sdist,
        "wheel": built("build_wheel", places["wheel"]),
        "sdist": built("build_wheel", places["sdist"], source),
        "editable": built("build_editable", places["editable"]),
    }


class Installed:
    """A new environment that holds this package alone; what it needs is lent by the environment of the tests."""

    def __init__(self, kind, file, folder):
        self.kind, self.folder = kind, folder / "work"
        self.folder.mkdir()
        venv.create(folder / "env", with_pip=False)
        scripts = next(path for path in (folder / "env" / "bin", folder / "env" / "Scripts") if path.is_dir())
        self.python = scripts / Path(sys.executable).name
        options = ("--isolated", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index")
        run(sys.executable, "-m", "pip", "--python", self.python, "install", *options, file, cwd=folder)
        self.packages = Path(
            run(self.python, "-c", "import site; print(site.getsitepackages()[0])", cwd=folder).strip()
        )
        # Python reads no .pth file of a folder that a .pth file names: the tests' own editable install stays unseen.
        lent = [path for path in sys.path if Path(path).name in {"site-packages", "dist-packages"}]
        (self.packages / "lent.pth").write_text("\n".join(lent))
        self.scripts = scripts

    def __call__(self, program, *arguments):
        return run(self.scripts / program, *arguments, cwd=self.folder)

    def ask(self, code):
        return run(self.python, "-c", code, cwd=self.folder).strip()

    def logs(self, pattern):
        return [read_run(path) for path in sorted(self.folder.glob(pattern))]


@pytest.fixture(scope="module", params=KINDS)
def installed(request, files, tmp_path_factory):
    return Installed(request.param, files[request.param], tmp_path_factory.mktemp(request.param))


def tracked(*folders):
    """The files of the checkout below some folders, but for what is made by running it."""
    found = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file())
    return {path.relative_to(ROOT).as_posix() for path in found if "__pycache__" not in path.parts}


def test_the_wheel_holds_the_package_with_its_configuration_and_nothing_else(files):
    names = set(zipfile.ZipFile(files["wheel"]).namelist())
    ours = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert ours == tracked("diagnostics") | {f"diagnostics/{name}" for name in tracked("conf")}
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_the_sdist_holds_all_that_it_takes_to_build_test_and_cite(files):
    with tarfile.open(files["archive"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= tracked("diagnostics", "conf", "scripts", "tests")
    alone = "README.md CHANGELOG.md LICENSE CITATION.cff Makefile constraints.txt pyproject.toml"
    assert names >= set(alone.split())


def test_a_wheel_from_the_sdist_is_the_wheel_from_the_checkout(files):
    first, second = (zipfile.ZipFile(files[kind]) for kind in ("wheel", "sdist"))
    assert {one.filename: one.CRC for one in first.infolist()} == {one.filename: one.CRC for one in second.infolist()}


def test_code_and_configuration_come_from_the_install(installed):
    package, conf = map(
        Path, installed.ask("import diagnostics.configs as c; print(c.__file__, c.CONF, sep='\\n')").splitlines()
    )
    if installed.kind == "editable":
        assert (package.parent, conf) == (ROOT / "diagnostics", ROOT / "conf")
    else:
        assert package.parent == installed.packages / "diagnostics"
        assert conf == installed.packages / "diagnostics" / "conf"


def test_questions_are_answered(installed):
    assert re.search(r"experiment .*depth_sweep", installed("diagnostics-train", "--help"))
    assert "max_norm: 1.0" in installed("diagnostics-train", "--cfg", "job", "clip=norm")
    assert "of a run or of a sweep" in installed("diagnostics-report", "--help")


def test_a_sweep_runs_and_its_report_has_a_row_for_each_job(installed):
    installed("diagnostics-train", "-m", "model.depth=2,3", "trainer.steps=3")
    first, _ = logs = installed.logs("multirun/*/*/run.jsonl")
    assert [log.end.status for log in logs] == ["finished"] * 2
    assert [log.info.config["model"]["depth"] for log in logs] == [2, 3]
    assert first.info.command == "diagnostics-train model.depth=2 trainer.steps=3"
    assert first.info.versions["training-diagnostics"] == diagnostics.__version__
    assert first.info.git == (git_state(ROOT) if installed.kind == "editable" else {})
    (sweep,) = installed.folder.glob("multirun/*")
    assert len(list(sweep.glob("wandb/offline-run-*/*.wandb"))) == 2
    table = installed("diagnostics-report", sweep)
    assert "model.depth=2" in table
    assert "model.depth=3" in table
    assert (sweep / "report.html").stat().st_size > 10_000


def test_an_experiment_runs(installed):
    output = installed("diagnostics-train", "experiment=vanishing", "trainer.steps=6", "sink=[console,runlog]")
    assert "verdict: vanishing" in output
    (log,) = installed.logs("outputs/*/run.jsonl")
    assert log.info.command == "diagnostics-train experiment=vanishing trainer.steps=6 'sink=[console,runlog]'"
