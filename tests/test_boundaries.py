"""The laws of the architecture, read from the source. Every check is shown to find what it looks for."""

from __future__ import annotations

import ast
import doctest
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import diagnostics

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "diagnostics"
LONGEST = 400

ORDER = (
    "markup",
    "layers",
    "columns",
    "records",
    "statistics",
    "depth",
    "distributed",
    "clipping",
    "meanfield",
    "contract",
    "diagnosis",
    "explain",
    "hooks",
    "runlog",
    "sinks",
    "monitor",
    "watching",
    "first_pass",
    "second_opinion",
    "reports",
    "trainers",
    "clip_schemas",
    "schemas",
    "configs",
    "jobs",
    "cli",
    "outcomes",
)
"""A module imports only from its left."""

TO_THE_RIGHT = {
    ("runlog", "reports.figures"): "Run.plot(): people ask a run for its picture; figures know run logs",
    ("sinks.wandb.closing", "reports.figures"): "W&B gets a run's heatmap when the run ends",
    ("sinks.wandb.closing", "reports.drawing"): "which needs an extra, that is named where it is missing",
    ("sinks.wandb.closing", "reports.history"): "and is drawn from columns",
    ("sinks.wandb.closing", "reports.page"): "and its page",
}
"""Imports against the order: inside a function, each with its reason."""

STEP_PATH = {*ORDER} - {
    "markup",
    "layers",
    "columns",
    "records",
    "runlog",
    "sinks",
    "reports",
    "trainers",
    "clip_schemas",
    "schemas",
    "configs",
    "jobs",
    "cli",
    "outcomes",
}
WITHOUT_TORCH = (
    "markup",
    "layers",
    "columns",
    "records",
    "contract.acts",
    "contract.rules",
    "contract.rules.clips",
    "contract.rules.gradients",
    "contract.rules.parameters",
    "contract.rules.replicas",
    "contract.rules.windows",
    "contract",
    "diagnosis.thresholds",
    "diagnosis.recovery",
    "diagnosis.conditions",
    "diagnosis.remedies",
    "diagnosis",
    "explain",
    "runlog",
    "runlog.names",
    "runlog.plain",
    "runlog.packing",
    "runlog.shapes",
    "runlog.reading",
    "runlog.writing",
    "sinks.fanout",
    "sinks.memory",
    "sinks.runlog",
    "sinks.wandb",
    "reports.page",
    "reports.view",
    "reports.drawing",
    "reports.gather",
    "clip_schemas",
    "schemas",
    "second_opinion",
)

WANDB_PARTS = ("closing", "history", "opening", "place", "values")
HOMES = {
    "wandb": {"reports.wandb", "sinks.wandb", *(f"sinks.wandb.{part}" for part in WANDB_PARTS)},
    "wandb_workspaces": {"reports.wandb.building"},
    "hydra": {"configs", "jobs", "cli"},  # jobs asks which job runs now, for our trainers and for other people's apps
    "omegaconf": {"configs", "jobs", "cli"},
    "vl_convert": {"reports.drawing", "reports.page"},
    "polars": {"runlog.frame"},
    "pandas": {"runlog.frame"},
    "sklearn": {"trainers.tasks"},
    "tqdm": {"trainers.progress"},
}
"""Where a third-party library may be imported."""

WRITES = {
    "clip_grad_norm_": "ours, which writes in clipping/writing.py",
    "unscale_": "the GradScaler's own, which clip_and_step promises to call",
}
"""Calls that end in an underscore and write to gradients only through clipping/writing.py or torch."""

TEACHING = {"trainers.seed_chain"}
"""Puts the article's numbers into ``.grad`` to clip them."""

PUTS_BACK = {"first_pass"}
"""Sets ``.grad`` aside for one pass and gives the same tensors back; likewise what a forward pass did to buffers."""


@dataclass(frozen=True)
class Import:
    module: str
    lazy: bool


def sources() -> dict[str, str]:
    """Dotted name below the package to source; the package's front door is ``__init__``."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        found[name] = path.read_text(encoding="utf-8")
    return found


SOURCES = sources()


def imports(source: str) -> list[Import]:
    """All imports of a module, those inside functions, under TYPE_CHECKING and by import_module included."""
    return list(_imports(ast.parse(source), lazy=False))


def _imports(node: ast.AST, *, lazy: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        yield from (Import(alias.name, lazy) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        for alias in node.names:
            whole = f"{node.module}.{alias.name}"
            is_module = whole.removeprefix("diagnostics.") in SOURCES or node.module == "diagnostics"
            yield Import(whole if is_module else str(node.module), lazy)
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
        yield from (Import(arg.value, lazy) for arg in node.args if isinstance(arg, ast.Constant))
    inside = lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
    for child in ast.iter_child_nodes(node):
        yield from _imports(child, lazy=inside)


def ours(source: str) -> list[Import]:
    """Imports from the package, by dotted name below it."""
    prefix = "diagnostics."
    return [Import(one.module[len(prefix) :], one.lazy) for one in imports(source) if one.module.startswith(prefix)]


def rank(module: str) -> int:
    return ORDER.index(module.split(".", maxsplit=1)[0])


def against_the_order(module: str, source: str) -> list[str]:
    """Imports from the right that no exception allows."""
    return [
        one.module
        for one in ours(source)
        if rank(one.module) > rank(module) and not (one.lazy and (module, one.module) in TO_THE_RIGHT)
    ]


def away_from_home(module: str, source: str) -> list[str]:
    tops = [one.module.split(".")[0] for one in imports(source)]
    return [top for top in tops if module not in HOMES.get(top, {module})]


def calls(source: str) -> list[str]:
    """The dotted text of everything that a module calls."""
    return [ast.unparse(node.func) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]


def hook_registrations(source: str) -> list[str]:
    return [call for call in calls(source) if re.search(r"register_\w*hook\w*$", call)]


def waits(source: str) -> list[str]:
    """Calls by which the host waits for the device."""
    return [call for call in calls(source) if re.search(r"\.(item|tolist|cpu|numpy|nonzero|synchronize)$", call)]


def gradient_writes(source: str) -> list[str]:
    """Calls that write in place, and assignments to gradients. Initialising weights is none."""
    found = []
    for call in calls(source):
        name = call.rsplit(".", maxsplit=1)[-1]
        in_place = name.endswith("_") and not name.endswith("__") and name not in WRITES
        if in_place and not call.startswith("nn.init."):
            found.append(call)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Delete)):
            targets = node.targets if isinstance(node, (ast.Assign, ast.Delete)) else [node.target]
            found += [text for text in map(ast.unparse, targets) if re.search(r"\.grad\b", text)]
        if isinstance(node, ast.AugAssign) and "grad" in ast.unparse(node.target):
            found.append(ast.unparse(node.target))
    return found


def machine_paths(text: str) -> list[str]:
    """Absolute paths that exist on one machine only."""
    homes = re.findall(r"(?<![\w.:/])/(?:home|Users|root|work|workspace|tmp/dev)/\w+|\b[A-Z]:\\\\?Users\b", text)
    return [*homes, *([str(ROOT)] if str(ROOT) in text else [])]


def loaded_after(statement: str) -> set[str]:
    """Top-level modules in a fresh interpreter after a statement."""
    code = f"import sys\n{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def examples(name: str, value: object) -> int:
    """Number of lines that doctest would run for an object."""
    home = sys.modules[value.__module__]  # type: ignore[attr-defined]
    found = doctest.DocTestFinder(recurse=False).find(value, name, module=home)
    return sum(len(one.examples) for one in found)


# Law 4


def test_the_host_waits_in_one_place_of_the_step() -> None:
    of_the_step = [module for module in SOURCES if module.split(".")[0] in STEP_PATH]
    found = [(module, call.rsplit(".", maxsplit=1)[-1]) for module in of_the_step for call in waits(SOURCES[module])]
    assert found == [("statistics.reading", "synchronize"), ("statistics.reading", "tolist")]


@pytest.mark.parametrize("bad", ["norm.item()", "torch.stack(norms).tolist()", "x.grad.cpu().numpy()", "f(x).item()"])
def test_a_wait_is_found(bad: str) -> None:
    assert waits(f"def step(norm):\n    return [{bad}]")
    assert not waits("item(x); cpu = x.to('cpu'); dictionary.items()")


# Law 5


@pytest.mark.parametrize("module", SOURCES)
def test_hooks_are_registered_in_hooks_only(module: str) -> None:
    assert bool(hook_registrations(SOURCES[module])) == (module in {"hooks", "hooks.compiled", "hooks.optimizers"})


@pytest.mark.parametrize(
    "bad",
    [
        "m.register_forward_hook(f)",
        "p.register_hook(f)",
        "o.register_step_post_hook(f)",
        "register_module_full_backward_hook(f)",
    ],
)
def test_a_hook_registration_is_found(bad: str) -> None:
    assert hook_registrations(bad)


@pytest.mark.parametrize("module", SOURCES)
def test_gradients_are_written_in_clipping_only(module: str) -> None:
    assert bool(gradient_writes(SOURCES[module])) == (module in {"clipping.writing", *TEACHING, *PUTS_BACK})


@pytest.mark.parametrize(
    "bad",
    [
        "p.grad = None",
        "p.grad *= 0.5",
        "p.grad[0] = 1",
        "del p.grad",
        "p.grad.mul_(2)",
        "torch._foreach_mul_(gradients, 2)",
        "gradient /= scale",
        "p.grad.data.zero_()",
    ],
)
def test_a_write_to_a_gradient_is_found(bad: str) -> None:
    assert gradient_writes(bad)
    assert not gradient_writes("self._grads = p.grad; super().__init__(); nn.init.zeros_(p); x = p.grad.mul(2)")


@pytest.mark.parametrize("module", SOURCES)
def test_libraries_are_imported_at_home_only(module: str) -> None:
    assert away_from_home(module, SOURCES[module]) == []


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.py")), ids=lambda path: path.name)
def test_scripts_leave_libraries_to_the_package(script: Path) -> None:
    assert away_from_home("scripts", script.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "bad", ["import wandb", "from wandb.sdk import x", "def f():\n  import hydra", "from omegaconf import OmegaConf"]
)
def test_a_library_away_from_home_is_found(bad: str) -> None:
    assert away_from_home("monitor", bad)
    assert not away_from_home("monitor", "from diagnostics.sinks import wandb")


# Law 6

HEAVY = {"torch", "wandb", "hydra", "omegaconf", "vl_convert", "pandas", "numpy", "sklearn", "tqdm"}


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert not HEAVY & loaded_after("import diagnostics; dir(diagnostics); diagnostics.__version__")


def test_modules_that_promise_it_load_no_torch_and_sinks_no_wandb() -> None:
    statement = "; ".join(f"import diagnostics.{module}" for module in WITHOUT_TORCH)
    assert not HEAVY & loaded_after(statement)


def test_a_loop_of_ones_own_loads_neither_wandb_nor_hydra_nor_plotting() -> None:
    loaded = loaded_after("from diagnostics import Monitor, watch, ClipByNorm, ConsoleSink, RunLogSink")
    assert "torch" in loaded  # the check can see what is loaded
    assert not {"wandb", "hydra", "omegaconf", "vl_convert", "pandas"} & loaded


def test_help_waits_for_nothing_but_hydra() -> None:
    assert HEAVY & loaded_after("import diagnostics.cli") <= {"hydra", "omegaconf"}


# Law 7


def test_every_module_has_its_place_in_the_order() -> None:
    assert {name.split(".")[0] for name in SOURCES} - {"__init__"} == set(ORDER)


@pytest.mark.parametrize("module", [name for name in SOURCES if name != "__init__"])
def test_imports_run_one_way(module: str) -> None:
    assert against_the_order(module, SOURCES[module]) == []


def test_every_exception_to_the_order_is_in_use() -> None:
    used = {(module, one.module) for module, source in SOURCES.items() for one in ours(source) if one.lazy}
    assert set(TO_THE_RIGHT) <= used


def test_modules_within_a_folder_do_not_import_each_other_in_a_circle() -> None:
    list(TopologicalSorter(graph(SOURCES)).static_order())


def graph(modules: dict[str, str]) -> dict[str, set[str]]:
    return {name: {one.module for one in ours(source) if not one.lazy} for name, source in modules.items()}


@pytest.mark.parametrize(
    "bad",
    [
        "from diagnostics.monitor import Monitor",
        "from diagnostics import monitor",
        "import diagnostics.cli",
        "def f():\n    from diagnostics.sinks.wandb import WandbSink",
        "if TYPE_CHECKING:\n    from diagnostics.monitor.ledger import Ledger",
        "x = importlib.import_module('diagnostics.reports.figures')",
    ],
)
def test_an_import_against_the_order_is_found(bad: str) -> None:
    assert against_the_order("hooks", bad)
    assert not against_the_order("cli", bad)


def test_an_exception_holds_inside_functions_only() -> None:
    wanted = "from diagnostics.reports import figures"
    assert against_the_order("sinks.wandb.closing", wanted)
    assert not against_the_order("sinks.wandb.closing", f"def plot():\n    {wanted}")


def test_a_circle_is_found() -> None:
    circle = {"sinks.a": "import diagnostics.sinks.b", "sinks.b": "from diagnostics.sinks.a import A"}
    with pytest.raises(CycleError):
        list(TopologicalSorter(graph(circle)).static_order())


# Law 11


@pytest.mark.parametrize("name", diagnostics.__all__)
def test_every_public_name_has_an_example_that_doctest_collects(name: str) -> None:
    value = getattr(diagnostics, name)
    assert value.__doc__, "a docstring"
    if isinstance(value, type) and issubclass(value, BaseException):
        return  # raised by us and caught by name; what raises it has the example
    assert "Example:" in value.__doc__
    assert examples(name, value) > 0


def test_a_missing_example_is_found() -> None:
    def without() -> None:
        """Does nothing."""

    def within() -> None:
        """Does nothing.

        >>> 1 + 1
        2
        """

    assert (examples("without", without), examples("within", within)) == (0, 1)


def test_doctests_are_collected_from_the_package(pytestconfig: pytest.Config) -> None:
    assert "--doctest-modules" in pytestconfig.getini("addopts")
    assert "diagnostics" in pytestconfig.getini("testpaths")


def test_type_checkers_see_the_names_that_are_resolved_on_first_use() -> None:
    assert checked_names(SOURCES["__init__"]) == {
        (f"diagnostics.{home}", name) for home, names in diagnostics._HOMES.items() for name in names
    }
    assert len(diagnostics.__all__) == len(set(diagnostics.__all__))


def checked_names(source: str) -> set[tuple[str, str]]:
    """Module and name of everything that is imported under TYPE_CHECKING as itself, which is what a checker exports."""
    blocks = [node for node in ast.parse(source).body if isinstance(node, ast.If)]
    return {
        (str(node.module), alias.name)
        for block in blocks
        if ast.unparse(block.test) == "TYPE_CHECKING"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    }


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'diagnostics' has no attribute 'Moniter'"):
        diagnostics.Moniter  # noqa: B018


# Law 13


def test_warnings_are_errors(pytestconfig: pytest.Config) -> None:
    first, ours_not = pytestconfig.getini("filterwarnings")
    assert first == "error"
    assert ours_not.startswith("ignore:Implicitly cleaning up")  # W&B's own folders
    with pytest.raises(UserWarning, match="as an error"):
        warnings.warn("as an error", UserWarning, stacklevel=1)


# Sizes and paths


@pytest.mark.parametrize("module", SOURCES)
def test_no_module_is_long(module: str) -> None:
    assert SOURCES[module].count("\n") <= LONGEST


def test_no_file_names_a_path_of_one_machine() -> None:
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listing.returncode:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]
    assert len(files) > 20
    found = {path.name: machine_paths(path.read_text(encoding="utf-8", errors="ignore")) for path in files}
    assert {name: paths for name, paths in found.items() if paths} == {}


@pytest.mark.parametrize("parts", [("", "home", "me", "x"), ("", "Users", "me"), ("", "work", "main"), ROOT.parts])
def test_a_path_of_one_machine_is_found(parts: tuple[str, ...]) -> None:
    path = "/".join(parts).replace("//", "/")
    assert machine_paths(f"the run is in {path}, they say")
    assert not machine_paths("outputs/work/x, https://x.org/home/me, loop/violations, /tmp/anything")
