"""A file of one's own, the one that the README shows: in every command and every process that one
starts, and what is refused of another one.
"""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys

import pytest
import timm

import analyze_results
import lab.outputs.evaluation  # what forked processes need not import
import lab.outputs.trained  # noqa: F401
import run_experiment
import train_ast
from conftest import REPO, make_config
from lab.base.errors import RequestError
from lab.config.imports import identities, use
from lab.config.loading import load_config, run_id
from lab.study.cli import run_cli
from lab.study.results import load_runs
from lab.study.sweep.plans import arguments_for, plan_run
from runs import command, own_code, ranks

CONFIG = """
imports: [mine.py]
model: {name: tiny}
dataset: {type: stripes, image_size: 16}
ast: {measure: el2n, rule: trimmed}
training:
  {loss: brier, optimizer: adamw, lr: 0.003, epochs: 2, batch_size: 32, num_workers: 0, device: cpu}
metrics: {base_flop_per_sample: 1.0e+6}
"""


def run(folder, script, *arguments, code=0):
    """What a command printed, in a process of its own; the config is `own.yaml` there."""
    done = command([REPO / f"scripts/{script}.py", *arguments], cwd=folder)
    assert done.returncode == code, done.stderr[-2000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder with the file, its config, and a run of both."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "mine.py").write_text(own_code())
    (folder / "own.yaml").write_text(CONFIG)
    (folder / "said").write_text(run(folder, "run_experiment", "--config", "own.yaml"))
    return folder


@pytest.fixture
def own(shared, tmp_path):
    """A copy of that folder."""
    return shutil.copytree(shared, tmp_path / "copy")


@pytest.fixture
def tables():
    """Afterwards the tables are the lab's own again."""
    yield
    use([])


def result_of(folder):
    (path,) = folder.glob("results/final_results_*.json")
    return json.loads(path.read_text())


def test_results_and_weights_keep_the_text_and_its_hash(shared):
    result = result_of(shared)
    assert f"imports          {result['config']['imports'][0]}\n" in (shared / "said").read_text()
    assert result["imports"] == {"mine.py": own_code()}
    (written,) = result["config"]["imports"]
    done = subprocess.run(["sha256sum", shared / "mine.py"], capture_output=True, text=True)
    assert written == f"mine.py@{done.stdout[:16]}"
    identity = written.replace(".py", "")
    keys = ("model.name", "dataset.type", "training.loss", "ast.measure", "ast.rule")
    assert result["own_parts"] == dict.fromkeys(keys, identity)
    weights = shared / "results" / result["weights"]
    assert (weights / "imports" / "mine.py").read_text() == own_code()
    assert json.loads((weights / "config.json").read_text())["imports"] == [identity]
    assert "imports/" in (weights / "README.md").read_text()
    history = result["training_history"]
    assert history["activation_rate"] == [1.0, 0.25]
    assert 0 < history["threshold"][1] < 2**0.5  # what this measure gives


def test_evaluate_runs_what_is_named_and_nothing_else(own):
    refused = run(own, "evaluate", "--weights", "results/latest", code=2)
    beside = f"results/{result_of(own)['weights']}/imports/mine.py"
    assert f"not run by itself; if you trust it, add --import {beside}" in refused
    said = run(own, "evaluate", "--weights", "results/latest", "--import", beside)
    assert f"{result_of(own)['best_accuracy']:.2f} %" in said
    assert "has changed" not in said
    asked = ["--weights", "results/latest", "--images", "mine.py"]  # the network comes first
    refused = run(own, "evaluate", *asked, code=2)
    assert "no model 'tiny'" in refused
    assert f"is not run by itself: if you trust it, --import {beside}" in refused
    (own / "mine.py").write_text(own_code() + "# another text\n")
    said = run(own, "evaluate", "--weights", "results/latest", "--import", "mine.py")
    assert "note: mine has changed since: its hash was" in said


def test_resume_tells_of_another_text(own):
    (before,) = (own / "results/checkpoints").iterdir()
    asked = ["--config", "own.yaml", "--resume"]
    said = run(own, "run_experiment", *asked, "auto")
    assert said.startswith("this run is finished: ")
    (own / "mine.py").write_text(own_code() + "# another text\n")
    said = run(own, "run_experiment", *asked, "auto")
    assert "there is no checkpoint of this config, the run starts afresh" in said
    other = f"{before.relative_to(own)} has one of this config with another text of its imports"
    assert f"note: {other}" in said
    for path in own.glob("results/*.json"):
        path.unlink()
    said = run(own, "run_experiment", *asked, before, "training.epochs=3")
    assert "note: resumed with other code than it began with: mine has changed since" in said
    result = result_of(own)
    assert result["epochs_completed"] == 3
    old = json.loads((before / "weights/config.json").read_text())["imports"]
    assert result["earlier_imports"] == old
    assert result["imports"]["mine.py"].endswith("# another text\n")


def test_a_twin_and_loader_workers_know_it(own):
    shutil.rmtree(own / "results")
    workers = "training.num_workers=1"
    said = run(own, "run_experiment", "--config", "own.yaml", "--dense-twin", workers)
    assert "verdict: " in said
    results = [json.loads(path.read_text()) for path in own.glob("results/*.json")]
    assert sorted(each["config"]["ast"]["mode"] for each in results) == ["ast", "dense"]
    assert all(each["own_parts"]["training.loss"] for each in results)


def test_two_processes_know_it(own):
    shutil.rmtree(own / "results")

    def work(rank):
        os.chdir(own)
        return run_experiment.main(["--config", "own.yaml"])

    assert ranks(2, work, own / "ranks").results() == [0, 0]
    assert result_of(own)["environment"]["processes"] == 2


@pytest.mark.long
def test_torchrun_hands_it_on(own):
    shutil.rmtree(own / "results")
    text = CONFIG.replace("imports: [mine.py]", "")
    (own / "own.yaml").write_text(text)
    script = REPO / "scripts/run_experiment.py"
    asked = [sys.executable, script, "--config", "own.yaml", "--import", "mine.py", "--nproc", "2"]
    done = subprocess.run(asked, cwd=own, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert result_of(own)["environment"]["processes"] == 2
    assert result_of(own)["own_parts"]["ast.rule"]


@pytest.mark.parametrize("seeds", ["0", pytest.param("0 1", marks=pytest.mark.long)])
def test_a_sweep_hands_it_on_and_a_table_tells_texts_apart(seeds, own):
    (own / "own.yaml").write_text(CONFIG.replace("imports: [mine.py]", ""))
    (own / "mine.py").write_text(own_code() + "# another text\n")
    count = len(seeds.split())
    asked = ["--configs", "own.yaml", "--import", "mine.py", "--jobs", "2", "--seeds"]
    said = run(own, "run_sweep", *asked, *seeds.split())  # each run is a process of its own
    assert f"{count} of {count} runs done" in said
    runs, skipped = load_runs([own / "results"])
    assert len(runs) == 1 + count
    assert not skipped
    rules = {each.settings["ast.rule"] for each in runs}
    assert rules == {
        f"trimmed of {identities(result['config']['imports'])[0]}"
        for result in (json.loads(path.read_text()) for path in own.glob("results/*.json"))
    }
    assert len(rules) == 2
    assert run_cli(lambda: analyze_results.main(["--results-dir", str(own / "results")])) == 0


def test_a_sweep_pins_the_text(own, tables, monkeypatch):
    monkeypatch.chdir(own)
    text = CONFIG.replace("imports: [mine.py]", "")
    check = train_ast.check_config
    plan = plan_run("own.yaml", text, (), "own.yaml", False, False, check, ["mine.py"])
    assert plan.error is None
    place = arguments_for(plan).index("--import")
    pinned = arguments_for(plan)[place + 1]
    (own / "mine.py").write_text(own_code() + "# another text\n")
    with pytest.raises(RequestError, match=r"--import: mine.py has changed: \w{16} is not \w{16}"):
        load_config("own.yaml", (), text, imports=[pinned])


def test_a_process_that_is_spawned_finds_it(tmp_path, tables):
    """So do loader workers, where they are not forked: what they get is pickled by name."""
    text = f"def work():\n    open({str(tmp_path / 'done')!r}, 'w').close()\n"
    loaded(written(tmp_path, text, "spawned_there.py"))
    work = sys.modules["spawned_there"].work
    process = multiprocessing.get_context("spawn").Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == 0
    assert (tmp_path / "done").exists()


@pytest.mark.long
def test_loader_workers_that_are_spawned_know_it(own):
    code = f"""
import multiprocessing, os, sys
sys.path.insert(0, {str(REPO / "scripts")!r})
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn", force=True)
    import run_experiment
    sys.exit(run_experiment.main(["--config", "own.yaml", "training.num_workers=1",
        "training.epochs=2", "training.seed=1", "logging.output_dir=spawned"]))
"""
    (own / "spawning.py").write_text(code)
    done = command([own / "spawning.py"], cwd=own)
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = own.glob("spawned/final_results_*.json")
    assert json.loads(path.read_text())["own_parts"]["dataset.type"]


def written(tmp_path, text, name="mine.py"):
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def loaded(*imports, overrides=()):
    check = train_ast.check_config
    return load_config(None, list(overrides), check=check, imports=list(imports))


WRONG = {  # by what is wrong: the line of the file, and what is said; two lines come before
    "syntax": ("def broken(:", "2: SyntaxError: invalid syntax"),
    "error": ("undefined", "2: NameError: name 'undefined' is not defined"),
    "exit": ("raise SystemExit('leaving')", "2: SystemExit: leaving"),
    "missing package": ("import nowhere", "2: ModuleNotFoundError: No module named 'nowhere'"),
    "taken": ("RULES['pi'] = Rule", "2: ast.rule 'pi': the name is taken"),
    "taken twice": (
        "RULES['a'] = Rule; RULES['a'] = Rule",
        "2: ast.rule 'a': the name is taken",
    ),
    "taken by timm": (
        "MODELS['resnet10t'] = MODELS['small_conv']",
        "2: model.name 'resnet10t': the name is taken",
    ),
    "taken in timm": (
        "import timm; exec('def resnet10t(): 0'); resnet10t.__module__ = __name__; "
        "timm.models.register_model(resnet10t)",
        "2: UserWarning: Overwriting resnet10t in registry",
    ),
    "an optimizer of timm": (
        "OPTIMIZERS['lion'] = OPTIMIZERS['sgd']",
        "2: training.optimizer 'lion': the name is taken",
    ),
    "no name": ("RULES['a b'] = Rule", "2: ast.rule 'a b': a name is of letters"),
    "a value": ("RULES['none'] = Rule", "2: ast.rule 'none': no name: a config reads it as"),
    "no class": ("RULES['a'] = 3", "2: ast.rule 'a': expected a subclass of Rule"),
    "another class": ("RULES['a'] = Target", "2: ast.rule 'a': expected a subclass of Rule"),
    "a method": (
        "RULES['a'] = type('A', (Rule,), {'choose': lambda self, pool: pool})",
        "2: ast.rule 'a': choose takes (self, pool), expected (self, pool, target)",
    ),
    "building": (
        "LOSSES['a'] = type('A', (Loss,), {'__init__': lambda self: None})",
        "2: training.loss 'a': __init__ takes (self), expected (self, training, samples, ",
    ),
    "no method": (
        "DATASETS['a'] = type('A', (ImageDataset,), {})",
        "2: dataset.type 'a': it has no method splits of its own",
    ),
    "a function": (
        "MEASURES['a'] = lambda logits, labels: logits",
        "2: ast.measure 'a': it takes (logits, labels), expected (logits, labels, entropy_weight)",
    ),
    "a number of scores": (
        "MEASURES['a'] = lambda logits, labels, weight: logits.mean()",
        "2: ast.measure 'a': the scores of 2 samples have the shape [], not [2]",
    ),
    "a number of losses": (
        "LOSSES['a'] = type('A', (Loss,), {'__call__': lambda s, a, b, c=None: (a.mean(), c)})",
        "2: training.loss 'a': the losses of 2 samples have the shape [], not [2]",
    ),
    "an error in it": (
        "MEASURES['a'] = lambda logits, labels, weight: undefined",
        "2: NameError: name 'undefined' is not defined",
    ),
    "a rate": (
        "SCHEDULES['a'] = lambda done, lr, least: least - lr",
        "2: training.lr_schedule 'a': at lr=0.1 it gives [-0.1, -0.1, -0.1]",
    ),
    "a picture": (
        "AUGMENTATIONS['a'] = lambda: lambda image: image / 255",
        "2: dataset.augment_policy 'a': it does not make a uint8 [3, 8, 8]",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_one_line_with_its_place(wrong, tmp_path, tables):
    line, said = WRONG[wrong]
    names = "AUGMENTATIONS, DATASETS, LOSSES, MEASURES, MODELS, OPTIMIZERS, RULES, SCHEDULES"
    path = written(
        tmp_path, f"from train_ast import {names}, ImageDataset, Loss, Rule, Target\n{line}"
    )
    before = dict(train_ast.RULES)
    with pytest.raises(RequestError) as error:
        loaded(path)
    assert str(error.value).startswith(f"{path}:{said}")
    assert "\n" not in str(error.value)
    assert before == train_ast.RULES
    assert "mine" not in sys.modules


def test_an_error_ends_a_command_before_anything_is_trained(own):
    shutil.rmtree(own / "results")
    (own / "mine.py").write_text("import helper\n")
    (own / "helper.py").write_text("\n\n1 / 0\n")
    said = run(own, "run_experiment", "--config", "own.yaml", code=2)
    assert said == "error: helper.py:3: ZeroDivisionError: division by zero\n"
    (own / "mine.py").unlink()
    said = run(own, "train_ast", "--config", "own.yaml", code=2)
    assert said == "error: own.yaml: imports: mine.py: no such file\n"
    assert not (own / "results").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere.py", "nowhere.py: no such file"),
        ("nowhere.at.all", "nowhere.at.all: no such package; a file is written mine.py"),
        ("json.nowhere", "json.nowhere: no such module"),
        ("..", "..: no such package"),
    ],
)
def test_what_is_not_there_is_refused(name, said):
    with pytest.raises(RequestError, match=f"^--import: {said}"):
        loaded(name)


def test_a_file_has_a_name_of_its_own(tmp_path, tables):
    (tmp_path / "other").mkdir()
    first = written(tmp_path, "a = 1\n")
    second = written(tmp_path / "other", "a = 2\n")
    with pytest.raises(RequestError, match="have one name; rename a file"):
        loaded(first, second)
    for name in ("train_ast.py", "random.py", "evaluate.py"):
        path = written(tmp_path, "a = 1\n", name)
        with pytest.raises(RequestError, match=f"another module is called {name[:-3]}; rename it"):
            loaded(path)
    with pytest.raises(RequestError, match="override 'imports=a.py': write --import a.py"):
        loaded(overrides=["imports=a.py"])
    with pytest.raises(RequestError, match="imports: expected a valid list, got 'a.py'"):
        load_config(None, text="imports: a.py")


RULE = "from train_ast import RULES, Rule\nRULES['all'] = type('All', (Rule,), {})\n"


def test_a_config_without_it_is_as_strict_as_before(tmp_path, tables):
    path = written(tmp_path, RULE)
    assert loaded(path, overrides=["ast.rule=all"]).ast.rule == "all"
    with pytest.raises(RequestError, match="ast.rule: expected 'pi', 'topk' or 'infobatch', got"):
        loaded(overrides=["ast.rule=all"])
    assert loaded(path, overrides=["ast.rule=all"]).ast.rule == "all"
    with pytest.raises(RequestError, match="training.loss: expected 'cross_entropy', "):
        load_config(None, ["training.loss=mine"])
    assert load_config(None, ["training.loss=mine"], imports=[path]).training.loss == "mine"
    with pytest.raises(RequestError, match="training.loss: expected 'cross_entropy', .*, got"):
        loaded(path, overrides=["training.loss=mine"])


def test_two_files_that_have_one_name_are_told_apart(tmp_path, tables):
    (tmp_path / "other").mkdir()
    first = written(tmp_path, RULE, "first.py")
    second = written(tmp_path / "other", RULE, "second.py")
    loaded(first)
    loaded(second)  # in a process that has seen both, each config has its own
    with pytest.raises(RequestError, match=r"(first|second).py: ast.rule 'all': the name is ta"):
        loaded(first, second)


def test_a_run_is_known_by_the_text_wherever_it_lies(tmp_path, tables):
    (tmp_path / "other").mkdir()
    here = loaded(written(tmp_path, RULE))
    there = loaded(written(tmp_path / "other", RULE))
    changed = loaded(written(tmp_path, RULE + "# more\n"))
    renamed = loaded(written(tmp_path, RULE, "my.py"))
    assert here.imports != there.imports
    assert run_id(here) == run_id(there)
    plain = make_config()
    assert "imports" not in plain.model_dump()
    assert len({run_id(each) for each in (here, changed, renamed, plain)}) == 4
    assert run_id(type(here).model_validate(here.model_dump())) == run_id(here)


def test_a_package_and_a_network_of_timms_registry(tmp_path, tables, monkeypatch):
    package = tmp_path / "parts" / "nets"
    package.mkdir(parents=True)
    (tmp_path / "parts" / "__init__.py").write_text("")
    (package / "__init__.py").write_text("from .small import my_small_net\n")
    (package / "small.py").write_text(
        "from timm.models import register_model\nfrom torch import nn\n\n\n@register_model\n"
        "def my_small_net(pretrained=False, num_classes=9, **kwargs):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(192, num_classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    overrides = ["model.name=my_small_net", "dataset.image_size=8", "training.epochs=1"]
    overrides += ["ast.mode=dense", "dataset.max_train_samples=64", "training.device=cpu"]
    config = loaded("parts.nets", overrides=[*overrides, f"logging.output_dir={tmp_path}/out"])
    result, _ = train_ast.train(config)
    assert result["status"] == "completed"
    assert list(result["own_parts"]) == ["model.name"]
    assert sorted(result["imports"]) == ["nets/__init__.py", "nets/small.py"]
    (package / "small.py").write_text((package / "small.py").read_text() + "# more\n")
    assert loaded("parts.nets").imports != config.imports
    assert timm.is_model("my_small_net")
    use([])
    assert not timm.is_model("my_small_net")


OTHERS = """
from torchvision.transforms import v2
import torch
from train_ast import AUGMENTATIONS, DOUBTS, OPTIMIZERS, SCHEDULES, SCORINGS, TARGETS
from train_ast import LabelDoubt, Scores, Target

AUGMENTATIONS["solarise"] = lambda: v2.RandomSolarize(128)


@OPTIMIZERS.register("plain")
def plain(groups, training, device):
    return torch.optim.SGD(groups, training.lr)


@SCHEDULES.register("root")
def root(done, lr, min_lr):
    return lr * (1 - done) ** 0.5


@SCORINGS.register("by_index")
class ByIndex(Scores):
    def of_epoch(self, order):
        return torch.from_numpy(order.astype("float32"))


@TARGETS.register("most")
class Most(Target):
    def __init__(self, value):
        super().__init__(0.75)


DOUBTS["nobody"] = type("Nobody", (LabelDoubt,), {})
"""


def test_the_other_tables(tmp_path, tables):
    keys = ["dataset.augment_policy=solarise", "training.optimizer=plain"]
    keys += ["training.lr_schedule=root", "ast.scoring=by_index", "ast.target_activation=most"]
    keys += ["ast.forget_rate=nobody", "dataset.image_size=8", "model.name=small_conv"]
    keys += ["training.epochs=2", "dataset.max_train_samples=128", "training.device=cpu"]
    keys += ["training.momentum=0.5", "training.num_workers=0"]  # somebody's own may read it
    path = written(tmp_path, OTHERS)
    config = loaded(path, overrides=[*keys, f"logging.output_dir={tmp_path}/out"])
    result, _ = train_ast.train(config)
    assert result["training_history"]["activation_rate"] == pytest.approx([1.0, 0.75], abs=0.07)
    assert len(result["own_parts"]) == 6
    assert 0 < result["training_history"]["lr"][1] < 0.1


def test_own_networks_are_not_pretrained(tmp_path, tables):
    text = "from train_ast import MODELS\nMODELS['mine'] = lambda config, classes, size: None\n"
    config = loaded(written(tmp_path, text), overrides=["model.name=mine", "model.pretrained=true"])
    with pytest.raises(RequestError, match="model.pretrained: there are no published weights of"):
        train_ast.get_model(config.model, 10, 8)
