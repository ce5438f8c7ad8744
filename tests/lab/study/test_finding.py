"""What `--weights` means."""

import json

import pytest

from helpers import write_run
from lab.base.errors import RequestError
from lab.study.finding import config_of, find_run


def left_run(folder, name, run, **extra):
    """A results file whose weights folder is there."""
    (folder / "checkpoints" / run / "weights").mkdir(parents=True, exist_ok=True)
    return write_run(folder, name, extra={"weights": f"checkpoints/{run}/weights", **extra})


@pytest.fixture
def out(tmp_path):
    """Two runs, the first of them resumed; the names are not in the order of the times."""
    folder = tmp_path / "results"
    left_run(folder, "20250101_000000", "aaa", environment={"finished_utc": "2025-03-01T00:00:00"})
    left_run(folder, "20250103_000000", "aaa", environment={"finished_utc": "2025-03-03T00:00:00"})
    left_run(folder, "20250102_000000", "bbb", environment={"finished_utc": "2025-03-02T00:00:00"})
    write_run(folder, "20250201_000000", extra={"weights": None})
    (folder / "final_results_20250301_000000.json").write_text("no JSON")
    return folder


def test_every_way_to_name_a_run(out, monkeypatch):
    weights = out / "checkpoints" / "aaa" / "weights"
    newest = out / "final_results_20250103_000000.json"
    for text in (weights, weights.parent, out / "latest", newest):
        found = find_run(str(text))
        assert found.weights == str(weights)
        assert found.path == newest
        assert json.loads(config_of(found)) == json.loads(newest.read_text())["config"]
    older = find_run(str(out / "final_results_20250102_000000.json"))
    assert older.weights == str(out / "checkpoints" / "bbb" / "weights")
    monkeypatch.chdir(out.parent)
    assert (
        find_run("latest").path == find_run("results/latest").path == newest.relative_to(out.parent)
    )
    monkeypatch.chdir(weights.parent)
    assert find_run("weights").path == newest


def test_a_folder_of_somebody_else_has_no_run(tmp_path):
    (tmp_path / "weights").mkdir()
    found = find_run(str(tmp_path))
    assert (found.weights, found.result) == (str(tmp_path / "weights"), None)
    with pytest.raises(RequestError, match="--config: needed for the validation set, because no"):
        config_of(found)


def test_what_is_no_run_is_named(out, tmp_path):
    cases = {
        "/nowhere": "no such file or folder; expected a weights folder, the folder of a run",
        str(out): f"a results folder; its newest run: {out}/latest",
        str(tmp_path / "latest"): f"no results file in {tmp_path} of a run with weights",
        str(out / "final_results_20250201_000000.json"): "no results file of a run that left",
        str(out / "final_results_20250301_000000.json"): "no results file of a run that left",
    }
    for text, complaint in cases.items():
        with pytest.raises(RequestError) as caught:
            find_run(text)
        assert str(caught.value).startswith(f"--weights: {text}: ")
        assert complaint in str(caught.value)
