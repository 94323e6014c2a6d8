"""`make data`: from a server's archive to a folder that the reader reads, whatever happens on the way."""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from rich.console import Console

from datamodules import __main__ as program
from datamodules.download import fetch as fetching
from datamodules.download.sources import SOURCES, Source, source_of
from datamodules.download.transfer import _CHUNK as PIECE
from datamodules.download.transfer import Transfer
from datamodules.download.unpacking import unpack
from datamodules.errors import DataError
from datamodules.readers import get_reader, list_dataset


class Server(ThreadingHTTPServer):
    """Serves `body` at any address, with ranges; the first connections end after the numbers of bytes in `cuts`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.body, self.cuts, self.ranges, self.status = b"", [], True, 200
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/archive"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server: Server = self.server
        asked = self.headers.get("Range", "")
        server.asked.append(asked)
        found = re.fullmatch(r"bytes=(\d+)-", asked) if server.ranges else None
        start, size = int(found[1]) if found else 0, len(server.body)
        if server.status != 200:
            self.send_error(server.status)
            return
        if start >= size > 0 and found:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{size}")
            self.end_headers()
            return
        self.send_response(206 if found else 200)
        if found:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        self.send_header("Content-Length", str(size - start))
        self.end_headers()
        sent = server.body[start:]
        self.wfile.write(sent[: server.cuts.pop(0)] if server.cuts else sent)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def offer(server, monkeypatch):
    """Makes the server's body the archive of a dataset."""

    def offered(name: str, body: bytes, archive: str = "data.tar") -> Source:
        server.body = body
        address = server.address.replace("archive", archive)
        source = Source(name, address, hashlib.sha256(body).hexdigest())
        monkeypatch.setitem(SOURCES, name, source)
        return source

    monkeypatch.setattr(Transfer.__init__, "__defaults__", (4, 0.0))  # no pause between attempts
    return offered


def packed(folder, mode="w", prefix="") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as file:
        for path in sorted(folder.iterdir()):
            file.add(path, f"{prefix}{path.name}")
    return buffer.getvalue()


def zipped(folder) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(folder.rglob("*")):
            file.write(path, path.relative_to(folder))
    return buffer.getvalue()


def large(make, folder) -> bytes:
    """An archive of more than six pieces."""
    make.mvtec(folder)
    make.image(folder / "bottle/train/good/large.png", size=(400, 500), seed=1)
    return packed(folder)


QUIET = Console(quiet=True)


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("mvtec_ad", lambda folder: packed(folder, "w:xz")),
        ("mvtec_loco", lambda folder: packed(folder, "w:xz")),
        ("mvtec_ad_2", lambda folder: packed(folder, "w:gz", "mvtec_ad_2/")),
        ("visa", packed),
        ("btad", zipped),
        ("mvtec_ad", lambda folder: packed(folder, "w", "mvtec_anomaly_detection/")),
    ],
)
def test_each_archive_becomes_what_its_reader_reads(make, tmp_path, offer, capsys, name, pack):
    makers = {"mvtec_ad": make.mvtec, "mvtec_loco": make.loco, "visa": make.visa_raw}
    original = {**makers, "mvtec_ad_2": make.mvtec_ad_2, "btad": make.btad}[name](tmp_path / "original")
    offer(name, pack(original))
    root = tmp_path / "new" / "place"
    assert program.main(["fetch", "--dataset", name, "--data-root", str(root), "--accept"]) == 0
    there, here = list_dataset(name, original), list_dataset(name, root)
    assert len(there.table) == len(here.table) > 0
    assert not [path.name for path in root.iterdir() if path.name.startswith((".", "data"))]
    assert "Licence" in capsys.readouterr().out
    assert program.main(["fetch", "--dataset", name, "--data-root", str(root)]) == 0
    assert "already" in capsys.readouterr().out


def test_a_cut_connection_goes_on_where_it_was(make, tmp_path, offer, server):
    source = offer("mvtec_ad", large(make, tmp_path / "a"))
    server.cuts = [2 * PIECE + 1000, 3 * PIECE]
    fetching.fetch(source, tmp_path / "b", True, QUIET)
    assert server.asked == ["", f"bytes={2 * PIECE}-", f"bytes={5 * PIECE}-"]


def test_a_later_command_goes_on_without_asking_again(make, tmp_path, offer, server, capsys):
    source = offer("mvtec_ad", large(make, tmp_path / "a"))
    server.cuts = [PIECE, 0, 0, 0, 0]
    with pytest.raises(DataError, match="the same command goes on"):
        fetching.fetch(source, tmp_path / "b", True, QUIET)
    server.asked.clear()
    server.cuts.clear()
    call = ["fetch", "--dataset", "mvtec_ad", "--data-root", str(tmp_path / "b")]
    assert program.main(call) == 0
    assert server.asked == [f"bytes={PIECE}-"]
    assert "Licence" not in capsys.readouterr().out


def test_a_server_without_ranges_is_read_from_the_start(make, tmp_path, offer, server):
    source = offer("mvtec_ad", large(make, tmp_path / "a"))
    server.ranges, server.cuts = False, [PIECE]
    fetching.fetch(source, tmp_path / "b", True, QUIET)
    assert server.asked == ["", f"bytes={PIECE}-"]


def test_a_part_that_is_whole_already_is_not_fetched_again(tmp_path, server):
    server.body = b"x" * 100
    (tmp_path / "part").write_bytes(server.body)
    Transfer(tmp_path / "part", QUIET)(server.address, str(tmp_path / "whole"))
    assert (tmp_path / "whole").read_bytes() == server.body
    assert server.asked == ["bytes=100-"]


def test_another_file_than_published_is_refused_and_deleted(make, tmp_path, offer, server):
    source = offer("mvtec_ad", packed(make.mvtec(tmp_path / "a")))
    server.body = server.body[:-1] + b"!"
    with pytest.raises(DataError, match=r"not the published archive.*ADDRESS="):
        fetching.fetch(source, tmp_path / "b", True, QUIET)
    left = {path.name for path in (tmp_path / "b" / fetching.WORKING).iterdir()}
    assert left == {"accepted", "lock"}


def test_without_a_network_the_page_is_named_and_an_archive_by_hand_is_taken(make, tmp_path, offer, server):
    body = packed(make.mvtec(tmp_path / "a"))
    source = offer("mvtec_ad", body)
    nowhere = "http://127.0.0.1:9/data.tar"  # nothing listens on the port called discard
    page = re.escape(get_reader("mvtec_ad").homepage)
    with pytest.raises(DataError, match=rf"connection refused.*data\.tar by hand from {page}"):
        fetching.fetch(source, tmp_path / "b", True, QUIET, nowhere)
    (tmp_path / "b" / "data.tar").write_bytes(body[:-5])
    with pytest.raises(DataError, match="is not the published archive"):
        fetching.fetch(source, tmp_path / "b", True, QUIET, nowhere)
    (tmp_path / "b" / "data.tar").write_bytes(body)
    fetching.fetch(source, tmp_path / "b", True, QUIET, nowhere)
    assert list_dataset("mvtec_ad", tmp_path / "b").available == ("bottle",)
    assert server.asked == []


def test_what_a_server_refuses_is_not_asked_again(tmp_path, offer, server):
    source = offer("visa", b"x")
    server.status = 404
    with pytest.raises(DataError, match="HTTP status 404"):
        fetching.fetch(source, tmp_path / "b", True, QUIET)
    assert len(server.asked) == 1


def test_nothing_is_fetched_without_the_licence(tmp_path, offer, server, monkeypatch, capsys):
    offer("visa", b"x")
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert program.main(["fetch", "--dataset", "visa", "--data-root", str(tmp_path / "b")]) == 2
    assert "ACCEPT=1" in capsys.readouterr().err
    assert server.asked == []
    assert not (tmp_path / "b").exists()


def test_a_folder_of_other_things_is_left_alone(make, tmp_path, offer):
    source = offer("visa", b"x")
    make.image(tmp_path / "holidays" / "beach.png")
    with pytest.raises(DataError, match=r"holds other things \(holidays\)"):
        fetching.fetch(source, tmp_path, True, QUIET)


def test_an_archive_of_something_else_is_told(make, tmp_path, offer):
    source = offer("visa", packed(make.image(tmp_path / "a" / "pictures" / "x.png").parent.parent))
    with pytest.raises(DataError, match="holds pictures, but it should be laid out as"):
        fetching.fetch(source, tmp_path / "b", True, QUIET)


def test_datasets_without_an_address_say_where_they_are():
    for name, words in (("real_iad", "to be had from"), ("photos", "comes with"), ("synthetic", "make synthetic")):
        with pytest.raises(DataError, match=words):
            source_of(name)
    assert all(get_reader(name).homepage for name in SOURCES)


def _member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, size
    return info


@pytest.mark.parametrize(
    ("member", "words"),
    [
        (_member("../out"), "leads out"),
        (_member("a/../../out"), "leads out"),
        (_member("/tmp/out"), "leads out"),
        (_member("C:/out"), "leads out"),
        (_member("..\\out"), "leads out"),
        (_member("link", tarfile.SYMTYPE, "/etc/passwd"), "is a link"),
        (_member("link", tarfile.LNKTYPE, "x"), "is a link"),
        (_member("pipe", tarfile.FIFOTYPE), "is a link"),
        (_member("x"), "twice"),
    ],
)
def test_an_archive_reaches_nothing_outside_its_folder(tmp_path, member, words):
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        file.addfile(_member("x"))
        file.addfile(member)
    with pytest.raises(DataError, match=words):
        unpack(tmp_path / "a.tar", tmp_path / "in" / "here")
    assert {path.name for path in tmp_path.rglob("*")} == {"a.tar", "in", "here", "x"}


def test_a_link_in_a_zip_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        info = zipfile.ZipInfo("link")
        info.external_attr = 0o120777 << 16
        file.writestr(info, "/etc/passwd")
    with pytest.raises(DataError, match="is a link"):
        unpack(tmp_path / "a.zip", tmp_path / "here")


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_a_bomb_is_stopped_before_it_fills_the_disk(tmp_path, kind):
    path, zeros = tmp_path / f"a.{kind}", bytes(2**24)
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("zeros", zeros)
    else:
        with tarfile.open(path, "w:gz") as file:
            file.addfile(_member("zeros", size=len(zeros)), io.BytesIO(zeros))
    with pytest.raises(DataError, match="not unpacked"):
        unpack(path, tmp_path / "here", limit=2**22)
    assert sum(found.stat().st_size for found in (tmp_path / "here").iterdir()) <= 2**22


def test_a_damaged_archive_is_told(make, tmp_path):
    for name, mode in (("a.tar.xz", "w:xz"), ("a.tar", "w")):
        whole = packed(make.mvtec(tmp_path / "data"), mode)
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DataError, match="damaged"):
            unpack(tmp_path / name, tmp_path / f"{name}-out")


def test_published_archives_have_names_and_checksums():
    for source in SOURCES.values():
        assert re.fullmatch(r"[0-9a-f]{64}", source.sha256)
        assert source.archive.endswith((".tar", ".tar.xz", ".tar.gz", ".zip"))
        assert source.address.startswith("https://")
