"""Imagenette: the real download code, on an archive that a server on this machine hands out."""

import functools
import hashlib
import http.server
import tarfile
import threading

import pytest
from torchvision.datasets import Imagenette

import download_imagenette
from conftest import save_picture
from lab.study.cli import run_cli


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
