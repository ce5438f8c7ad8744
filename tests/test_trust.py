"""What comes from outside is data: no code trusts it, and a run reaches for nothing that it was not
given.
"""

import ast
import importlib
import socket

from conftest import REPO, make_config
from train_ast import train


def test_no_script_trusts_what_it_reads():
    """No pickle, no code from text, no loader but a safe one, no archive unpacked by hand."""
    for path in sorted((REPO / "scripts").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                unsafe = {"pickle", "dill", "joblib", "marshal", "shelve"}
                # there an unpickler that builds tensors alone, which has tests of its own
                own = {"pickle"} if path.name == "state_dict.py" else set()
                assert not names & (unsafe - own), path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                given = {each.arg: ast.unparse(each.value) for each in node.keywords}
                assert called not in (
                    "eval",
                    "exec",
                    "compile",
                    "os.system",
                    "yaml.unsafe_load",
                    "pd.read_pickle",
                ), path
                if path.name != "imports.py":  # where somebody names a file, see test_own_code.py
                    assert not called.endswith((".import_module", ".exec_module")), path
                assert not called.endswith(("extractall", "unpack_archive")), path
                safe = {"weights_only": "True"}.items(), {"pickle_module": "TENSORS_ALONE"}.items()
                is_safe = any(each <= given.items() for each in safe)
                assert called != "torch.load" or is_safe, path
                assert called != "yaml.load" or given.get("Loader") == "_Loader", path
                assert given.get("shell") is None, path
                assert given.get("allow_pickle") is None, path
    loader = importlib.import_module("lab.config.loading")._Loader
    assert issubclass(loader, importlib.import_module("yaml").SafeLoader)


def test_a_run_touches_no_network_and_nothing_outside_its_folder(tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(tmp_path)
    names = [
        "model.name=test_resnet",
        "training.epochs=1",
        "ast.mode=dense",
        "dataset.max_train_samples=64",
    ]
    train(make_config(*names, "logging.output_dir=out"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
