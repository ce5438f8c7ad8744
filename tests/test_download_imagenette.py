"""Imagenette: the real download code, on an archive that a server on this machine hands out."""

import functools
import hashlib
import http.server
import os
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time

import pytest
from torchvision.datasets import Imagenette

import download_imagenette
from conftest import save_picture
from lab.base import hub
from lab.study.cli import run_cli
from runs import exit_code, running


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A small imagenette2-160.tgz with the real class folders, its address and checksum where
    torchvision looks.
    """
    root = tmp_path / "made" / "imagenette2-160"
    for part in ("train", "val"):
        for label, wnid in enumerate(Imagenette._WNID_TO_CLASS):
            (root / part / wnid).mkdir(parents=True)
            save_picture(root / part / wnid / f"{wnid}_1.JPEG", (20 * label, 90, 200), label)
    path = tmp_path / "imagenette2-160.tgz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(root, root.name)
    checksum = hashlib.md5(path.read_bytes()).hexdigest()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/{path.name}"
        monkeypatch.setitem(Imagenette._ARCHIVES, "160px", (address, checksum))
        yield path
        server.shutdown()


def test_leaves_an_image_folder_and_does_nothing_the_second_time(archive, tmp_path, capsys):
    assert download_imagenette.main(["--size", "160px", "--dest", str(tmp_path / "data")]) == 0
    folder = tmp_path / "data" / "imagenette2-160"
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [
        "imagenette2-160"
    ]  # no archive, no scratch
    assert len(list(folder.glob("train/*/*.JPEG"))) == len(list(folder.glob("val/*/*.JPEG"))) == 10
    archive.unlink()
    assert download_imagenette.main(["--dest", str(tmp_path / "data")]) == 0
    assert "already there" in capsys.readouterr().out


def test_a_damaged_archive_leaves_nothing_behind(archive, tmp_path, capsys):
    archive.write_bytes(archive.read_bytes()[:-100] + bytes(100))
    assert run_cli(lambda: download_imagenette.main(["--dest", str(tmp_path / "data")])) == 2
    said = capsys.readouterr().err.splitlines()[-1]  # after torchvision's progress bar
    assert said.startswith("error: Imagenette 160px: ")
    assert "corrupted" in said
    assert list((tmp_path / "data").iterdir()) == []


def test_no_network_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(Imagenette._ARCHIVES, "160px", ("http://127.0.0.1:9/gone.tgz", "0"))
    assert run_cli(lambda: download_imagenette.main(["--dest", str(tmp_path / "data")])) == 2
    assert "check the network" in capsys.readouterr().err


@pytest.fixture
def silent():
    """A server that accepts and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def address_of(server):
    return f"http://127.0.0.1:{server.getsockname()[1]}/imagenette2-160.tgz"


@pytest.mark.parametrize("begins", [False, True])
def test_a_server_that_says_nothing_is_not_waited_for(
    begins, silent, tmp_path, monkeypatch, capsys
):
    def answer():
        connection, _ = silent.accept()
        held.append(connection)
        if begins:
            connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 1000\r\n\r\nabc")

    held = []
    monkeypatch.setitem(Imagenette._ARCHIVES, "160px", (address_of(silent), "0"))
    threading.Thread(target=answer, daemon=True).start()
    monkeypatch.setattr(hub, "SILENCE_SECONDS", 0.5)
    started = time.monotonic()
    assert run_cli(lambda: download_imagenette.main(["--dest", str(tmp_path / "data")])) == 2
    assert time.monotonic() - started < 30
    assert "timed out" in capsys.readouterr().err.splitlines()[-1]
    assert list((tmp_path / "data").iterdir()) == []
    assert socket.getdefaulttimeout() is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_a_signal_leaves_nothing_for_good(number, archive, silent, tmp_path):
    """It goes at once; what a killed process leaves goes with the next download."""

    def download() -> int:
        Imagenette._ARCHIVES["160px"] = (address_of(silent), "0")
        try:
            return run_cli(lambda: download_imagenette.main(["--dest", str(tmp_path / "d")]))
        except SystemExit as left:
            return left.code

    with running(download, tmp_path / "output") as child:
        silent.settimeout(120)
        connection, _ = silent.accept()
        left = tmp_path / "d" / ".imagenette2-160.part"
        assert left.is_dir()
        (left / "part").mkdir()
        (left / "part" / "of.tgz").write_bytes(b"some")
        os.kill(child, number)
        assert exit_code(child) in (128 + number, -number)
    connection.close()
    assert left.exists() == (number == signal.SIGKILL)
    assert download_imagenette.main(["--dest", str(tmp_path / "d")]) == 0
    assert [path.name for path in (tmp_path / "d").iterdir()] == ["imagenette2-160"]


def test_two_downloads_do_not_meet(archive, tmp_path, capsys):
    left = tmp_path / "data" / ".imagenette2-160.part"
    left.mkdir(parents=True)
    code = "import fcntl, sys\nfile = open(sys.argv[1], 'ab')\nfcntl.flock(file, fcntl.LOCK_EX)\n"
    code += "print('held', flush=True)\nsys.stdin.read()"
    command = [sys.executable, "-c", code, str(left / "lock")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as other:
        assert other.stdout.readline() == b"held\n"
        assert run_cli(lambda: download_imagenette.main(["--dest", str(tmp_path / "data")])) == 2
        assert "another process is downloading it" in capsys.readouterr().err
        assert left.is_dir()
        other.stdin.close()
    assert download_imagenette.main(["--dest", str(tmp_path / "data")]) == 0
