"""The plan of the house: which module may import which, how long each may be, and that a table
needs no torch.
"""

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import REPO

SCRIPTS = REPO / "scripts"
MODULES = {
    ".".join(path.relative_to(SCRIPTS).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(SCRIPTS.rglob("*.py"))
}
ROOMS = "base config machine data method models engine outputs study".split()  # in their order
LIGHT = [f"lab.config.{name}" for name in ("grid", "keys", "loading")]
LIGHT += ["lab.outputs.tables", "lab.study.analysis.report"]
LIGHT += [f"lab.base.{name}" for name in ("console", "errors", "files", "launch", "reading")]
LIGHT += [f"lab.study.{name}" for name in ("cli", "results")]
LIGHT += [
    f"lab.study.sweep.{name}"
    for name in ("halving", "jobs", "plans", "processes", "sharing", "standing", "summary")
]
LIGHT += ["lab.study.benchmark.options", "analyze_results", "download_imagenette", "evaluate"]
LIGHT += ["run_experiment", "run_sweep"]
HEAVY = ["torch", "torchvision", "timm", "datasets", "sklearn"]
SLOW = [*HEAVY, "pandas", "scipy", "matplotlib"]


def imports(name: str) -> set[str]:
    """The project's own modules that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & MODULES.keys()


def functions(name: str) -> list[ast.FunctionDef]:
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    return [
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


BLOCKS = (ast.For, ast.AsyncFor, ast.While, ast.If, ast.With, ast.AsyncWith, ast.Try, ast.Match)


def depth(node: ast.AST, inside: int = 0) -> int:
    """How deep blocks are nested in a function; `elif` is as deep as its `if`, functions inside
    count by themselves.
    """
    deepest = inside
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            continue
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        deepest = max(deepest, depth(child, inside + (isinstance(child, BLOCKS) and not is_elif)))
    return deepest


@pytest.mark.parametrize("name", MODULES)
def test_no_function_is_too_long_or_too_deep(name):
    for function in functions(name):
        assert function.end_lineno - function.lineno < 60, f"{function.name} has more than 60 lines"
        assert depth(function) <= 3, f"{function.name} is nested deeper than 3"


@pytest.mark.parametrize("name", MODULES)
def test_nothing_is_packed(name):
    text = MODULES[name].read_text(encoding="utf-8")
    assert "fmt: skip" not in text
    assert "fmt: off" not in text
    packed = [
        node.lineno
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Tuple)
        and isinstance(node.value, ast.Tuple)
    ]
    assert packed == []


@pytest.mark.parametrize("name", MODULES)
def test_no_parameter_is_a_whole_run_without_a_type(name):
    parameters = (arg for f in functions(name) for arg in (*f.args.args, *f.args.kwonlyargs))
    untyped = [
        arg for arg in parameters if arg.arg == "run" and ast.unparse(arg.annotation) == "Any"
    ]
    assert untyped == []


def room(name: str) -> int:
    """The number of a module's room; what stands above all rooms has the highest."""
    package, _, rest = name.partition(".")
    if package != "lab":
        return len(ROOMS) + (name != "train_ast")
    return ROOMS.index(rest.partition(".")[0]) if rest else -1


def test_every_module_lies_in_a_room():
    assert {path.parent.name for path in (SCRIPTS / "lab").glob("*/__init__.py")} == set(ROOMS)
    assert [path.name for path in (SCRIPTS / "lab").glob("*.py")] == ["__init__.py"]


@pytest.mark.parametrize("name", MODULES)
def test_a_room_imports_from_the_rooms_before_it_alone(name):
    later = {other for other in imports(name) if room(other) > room(name)}
    assert later == set()


def packages(path: Path, optional: bool) -> set[str]:
    """What a module imports from outside the standard library; `optional`: in a `try` alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tried = {
        each for node in ast.walk(tree) if isinstance(node, ast.Try) for each in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if (node in tried) is optional and isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif (node in tried) is optional and isinstance(node, ast.ImportFrom):
            found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names - {name.partition(".")[0] for name in MODULES}


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    """What is imported in a `try` alone may be missing, and need not be declared: Triton has no
    package for some machines.
    """
    providers = importlib.metadata.packages_distributions()
    needed, optional = (
        {
            providers[name][0].lower().replace("_", "-")
            for path in MODULES.values()
            for name in packages(path, optional)
            if name in providers or not optional
        }
        for optional in (False, True)
    )
    lab, _ = (REPO / "requirements.txt").read_text(encoding="utf-8").split("# Its tests")
    declared = set(re.findall(r"^[\w-]+", lab, re.MULTILINE))
    assert needed - declared == set()
    assert declared - needed - optional == set()


def test_no_module_imports_itself_by_a_detour():
    reached = {name: imports(name) - {name} for name in MODULES}
    for _ in MODULES:
        reached = {
            name: found.union(*(reached[other] for other in found))
            for name, found in reached.items()
        }
    assert [name for name, found in reached.items() if name in found] == []


def test_a_table_needs_no_torch():
    code = (
        f"import importlib, sys\nfor name in {sorted(LIGHT)}:\n    importlib.import_module(name)\n"
    )
    code += f"    assert not {set(HEAVY)} & sys.modules.keys(), name"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(SCRIPTS)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


SMOKE = ["--config", "configs/digits_smoke.yaml"]
TORCHLESS = [  # the exit code of a command line that is answered before torch is imported
    *((0, path.stem, "--help") for path in sorted(SCRIPTS.glob("*.py"))),
    *((0, name, "--help-config") for name in ("train_ast", "run_experiment", "evaluate")),
    *((2, name, "--config", "nothing.yaml") for name in ("train_ast", "run_experiment")),
    *((2, name, *SMOKE, "training.lerning_rate=1") for name in ("train_ast", "run_experiment")),
    *((2, name, *SMOKE, "training.epochs=two") for name in ("train_ast", "run_experiment")),
    (2, "run_experiment", *SMOKE, "training.min_lr=9"),
    (
        2,
        "train_ast",
        *SMOKE,
        "ast.rule=x",
        "model.name=x",
        "training.optimizer=x",
        "training.lr=-1",
    ),
    (2, "run_sweep", "--configs", "nothing.yaml"),
    (2, "run_sweep", "--configs", SMOKE[1], "--grid", "training.lerning_rate=1,2"),
    (2, "evaluate", "--weights", "nowhere", "--config", "nothing.yaml"),
    (2, "evaluate", "--weights", "nowhere", *SMOKE, "training.lerning_rate=1"),
    (2, "evaluate", "--weights", "nowhere"),
    (2, "evaluate", "--weights", "scripts", "--images", "nowhere.jpg"),
    (2, "export", "--weights", "nowhere", "--output", "x.onnx"),
    (2, "benchmark", "steps", "--steps", "0"),
    (2, "benchmark", "steps", "--model", "nothing"),
    (2, "analyze_results", "--results-dir", "nowhere"),
    (2, "analyze_results", "--follow", "nowhere/run.jsonl"),
    (2, "analyze_results", "--results-dir"),
    (2, "download_imagenette", "--size", "3px"),
]
ANSWERS = """
import json, runpy, sys
asked, heavy = json.loads(sys.argv[1])
for code, name, *arguments in asked:
    sys.argv = [f"scripts/{name}.py", *arguments]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as left:
        assert (left.code or 0) == code, sys.argv
    else:
        raise AssertionError(sys.argv)
    assert not set(heavy) & sys.modules.keys(), sys.argv
"""


def test_help_and_a_wrong_request_need_no_torch():
    """One process, one command line after the other: torch, once imported, would be seen in all."""
    done = subprocess.run(
        [sys.executable, "-c", ANSWERS, json.dumps([TORCHLESS, SLOW])],
        cwd=REPO,
        env={"PYTHONPATH": str(SCRIPTS)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    wrong = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(wrong) == sum(code == 2 for code, *_ in TORCHLESS)


def test_the_top_level_holds_what_the_user_listed():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=REPO, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    top = {Path(path).parts[0] for path in tracked if path and not path.startswith(".")}
    assert top == set(
        "scripts configs results data tests requirements.txt README.md CLAUDE.md".split()
    )


def test_the_index_of_the_lab_log_leads_to_every_entry():
    log = (REPO / "results/published/README.md").read_text()
    entries = re.findall(r"^### (.+)$", log.partition("\n## Reference")[0], re.MULTILINE)
    anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in entries]
    assert re.findall(r"^\| \[.+\]\(#([^)]+)\) \|", log, re.MULTILINE) == anchors
