"""Archives from a server that may fail, checked and unpacked."""

import hashlib
import http.server
import io
import shutil
import tarfile
import threading
import zipfile

import pytest
from made import RNG, error

import prepare
from recipes import RECIPES
from support.raw import download, recipe

pytestmark = pytest.mark.usefixtures("elsewhere")


class Unreliable(http.server.BaseHTTPRequestHandler):
    """Serves `content` in the way that `manner` says."""

    content, manner, ranges = b"", "", []

    def do_GET(self):
        whole, manner = type(self).content, type(self).manner
        begin = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        self.ranges.append(begin)
        if begin == len(whole) and not manner:  # all of it was there
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{begin}")
            return self.end_headers()
        if manner == "missing" or (manner == "busy" and len(self.ranges) < 3):
            return self.send_error(404 if manner == "missing" else 503)
        partial = begin and manner != "no ranges"
        body = whole[begin:] if partial else whole
        self.send_response(206 if partial else 200)
        self.send_header("Content-Length", str(len(body) + 1000 * (manner == "promises more")))
        self.end_headers()
        if manner == "breaks" or (manner == "no ranges" and len(self.ranges) < 3):
            body = body[: max(len(body) // 2, 20_000)]
        self.wfile.write(body)

    def log_message(self, *words):
        pass


@pytest.fixture
def serve(monkeypatch, tmp_path):
    monkeypatch.setattr(download, "PAUSE", 0.0)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Unreliable)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()

    def start(content, manner="", name="Task04_Hippocampus.tar", md5=""):
        Unreliable.content, Unreliable.manner, Unreliable.ranges = content, manner, []
        url = f"http://127.0.0.1:{server.server_port}/{name}"
        source = recipe.Download({name: (url, md5)}, "a licence", "a paper")
        served = RECIPES["hippocampus_mr"]._replace(download=source)
        monkeypatch.setitem(RECIPES, "hippocampus_mr", served)
        return ["download", "hippocampus_mr", "--raw-dir", str(tmp_path / "raw")]

    yield start
    server.shutdown()
    server.server_close()


def tar(names, link=None):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        if link:
            member = tarfile.TarInfo("link")
            member.type, member.linkname = tarfile.SYMTYPE, link
            archive.addfile(member)
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 60_000
            archive.addfile(member, io.BytesIO(RNG.bytes(member.size)))
    return buffer.getvalue()


def zipped(names):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, RNG.bytes(60_000))
    return buffer.getvalue()


@pytest.mark.parametrize("manner", ["", "breaks", "no ranges", "busy"])
def test_download_survives(serve, tmp_path, capsys, manner):
    content = tar(["Task04/labelsTr/a", "Task04/imagesTr/a"])
    prepare.main(serve(content, manner))
    target = tmp_path / "raw" / "hippocampus_mr"
    assert (target / "Task04_Hippocampus.tar").read_bytes() == content
    assert (target / "Task04_Hippocampus" / "Task04" / "labelsTr" / "a").stat().st_size == 60_000
    said = capsys.readouterr().out
    assert said.index("a licence") < said.index("next: python prepare.py build hippocampus_mr")
    if manner == "breaks":
        assert len(Unreliable.ranges) > 2 and Unreliable.ranges == sorted(Unreliable.ranges)
    assert not list(target.glob("*.partial"))
    before = len(Unreliable.ranges)
    prepare.main(serve(content, manner))  # all is there: nothing is asked for
    assert before and not Unreliable.ranges


@pytest.mark.parametrize("size", [1234, None])
def test_download_goes_on_from_a_piece(serve, tmp_path, size):
    """Or from all of it, of which nothing is sent again."""
    content = zipped(["a.txt"])
    piece = tmp_path / "raw" / "hippocampus_mr" / "x.zip.partial"
    piece.parent.mkdir(parents=True)
    piece.write_bytes(content[:size])
    prepare.main(serve(content, name="x.zip"))
    assert Unreliable.ranges == [size or len(content)]
    assert (piece.parent / "x" / "a.txt").stat().st_size == 60_000


@pytest.mark.parametrize("manner, says", [("promises more", "announced"), ("missing", "404")])
def test_download_gives_up(serve, tmp_path, capsys, manner, says):
    assert says in error(capsys, *serve(zipped(["a.txt", "b.txt"]), manner, name="x.zip"))
    target = tmp_path / "raw" / "hippocampus_mr"
    assert not (target / "x").exists() and not list(target.glob("x.partial"))


def test_download_checks_md5_and_says_where_it_cannot(serve, tmp_path, capsys):
    whole, target = tar(["labelsTr/a", "imagesTr/a"]), tmp_path / "raw" / "hippocampus_mr"
    assert "MD5" in error(capsys, *serve(whole, md5="0" * 32))
    assert not list(target.iterdir())
    prepare.main(serve(whole, md5=hashlib.md5(whole).hexdigest()))
    assert "NB: " not in capsys.readouterr().err
    shutil.rmtree(target)
    prepare.main(serve(whole))
    assert "NB: " in (said := capsys.readouterr().err) and "no checksum is known" in said


@pytest.mark.parametrize(
    "pack, name, refused",
    [
        (lambda root: tar(["../../evil", "good"]), "x.tar", True),
        (lambda root: tar([f"{root}/evil", "good"]), "x.tar", False),  # which becomes a place within
        (lambda root: tar(["link/evil"], link=str(root)), "x.tar", True),
        (lambda root: zipped(["../../evil", "good"]), "x.zip", False),
        (lambda root: zipped([f"{root}/evil", "good"]), "x.zip", False),
    ],
)
def test_nothing_lands_outside(serve, tmp_path, capsys, pack, name, refused):
    command = serve(pack(tmp_path), name=name)
    if refused:
        assert "cannot be unpacked" in error(capsys, *command)
    else:
        prepare.main(command)
    inside = tmp_path / "raw" / "hippocampus_mr"
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and not p.is_relative_to(inside)]


def test_a_python_that_does_not_unpack_safely_is_said(serve, tmp_path, capsys, monkeypatch):
    command, folder = serve(tar(["a"])), tmp_path / "raw" / "hippocampus_mr" / "Task04_Hippocampus"
    monkeypatch.delattr(tarfile, "data_filter")  # as in Python 3.11.2, of Debian 12
    assert f"unpack it by hand into {folder}" in error(capsys, *command)
    folder.mkdir()
    prepare.main(command)
    assert "next: python prepare.py build hippocampus_mr" in capsys.readouterr().out


def test_brats_says_where_it_is(capsys):
    line = error(capsys, "download", "brats_mr")
    assert "Kaggle account" in line and "https://www.kaggle.com/datasets/" in line
