"""Downloads, from a server on this machine: what is kept, what is refused, and that nothing happens unasked."""

from __future__ import annotations

import gzip
import json
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dpkit.datasets import catalogue
from dpkit.datasets.catalogue import File
from dpkit.datasets.files import download, read
from dpkit.errors import DataError
from experiments.data import main

from .conftest import changed

CONTENT = b"one\ntwo\n" * 100
TABLE = changed(File("tabular/small/table.csv", "", 0), CONTENT)


class Server:
    """Answers with ``pages`` and counts the requests; a page that is cut short promises more than it sends."""

    def __init__(self) -> None:
        self.pages: dict[str, bytes] = {}
        self.missing_bytes = 0
        self.requests: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.requests.append(self.path)
                page = server.pages.get(self.path)
                if page is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(page) + server.missing_bytes))
                self.end_headers()
                self.wfile.write(page)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    pytest.importorskip("pooch", reason="downloads take the package pooch (extra `data`)")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    running = Server()
    yield running
    running.close()


def everything_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_what_was_fetched_is_kept_as_it_came_and_can_be_read(server: Server, tmp_path: Path, ending: str):
    server.pages = {f"/table.csv{ending}": gzip.compress(CONTENT, mtime=0) if ending else CONTENT}
    data = tmp_path / "new" / "data"
    file = replace(TABLE, url=f"{server.url}/table.csv{ending}")
    assert download(file, data) == data / f"tabular/small/table.csv{ending}"
    assert read(file, data) == CONTENT
    assert download(file, data) == data / f"tabular/small/table.csv{ending}"
    assert len(server.requests) == 1  # the second time it is there


def test_a_file_with_another_content_is_not_kept(server: Server, tmp_path: Path):
    server.pages = {"/table.csv": CONTENT[:-4] + b"TWO\n"}
    with pytest.raises(DataError, match=r"what http.*/table.csv sent is not the published file: SHA-256"):
        download(replace(TABLE, url=f"{server.url}/table.csv"), tmp_path)
    assert everything_in(tmp_path) == []


def test_a_server_that_sends_without_end_is_cut_off(server: Server, tmp_path: Path):
    server.pages = {"/table.csv": bytes(8_000_000)}
    with pytest.raises(DataError, match="sends more than the file has"):
        download(replace(TABLE, url=f"{server.url}/table.csv"), tmp_path)
    assert everything_in(tmp_path) == []


def test_a_transfer_that_breaks_off_leaves_nothing(server: Server, tmp_path: Path):
    server.pages = {"/table.csv": CONTENT[:100]}
    server.missing_bytes = len(CONTENT) - 100
    with pytest.raises(DataError, match="cannot be fetched"):
        download(replace(TABLE, url=f"{server.url}/table.csv"), tmp_path)
    assert everything_in(tmp_path) == []


def test_an_address_that_does_not_answer_is_named(server: Server, tmp_path: Path):
    with pytest.raises(DataError, match=r"/table.csv cannot be fetched \(404"):
        download(replace(TABLE, url=f"{server.url}/table.csv"), tmp_path)
    server.close()
    with pytest.raises(DataError, match=r"/table.csv cannot be fetched .*get it yourself"):
        download(replace(TABLE, url=f"{server.url}/table.csv"), tmp_path)
    assert everything_in(tmp_path) == []


def test_a_wrong_file_that_is_there_is_never_replaced(server: Server, tmp_path: Path):
    server.pages = {"/table.csv": CONTENT}
    (tmp_path / "table.csv").write_bytes(b"mine")
    with pytest.raises(DataError, match="never replaced: move it away"):
        download(replace(TABLE, url=f"{server.url}/table.csv"), tmp_path)
    assert (tmp_path / "table.csv").read_bytes() == b"mine"
    assert server.requests == []


def test_a_file_that_is_published_nowhere_says_why(tmp_path: Path):
    with pytest.raises(DataError, match=r"table.csv cannot be fetched: it was rebuilt\. Put it into"):
        download(replace(TABLE, why_no_url="it was rebuilt"), tmp_path)


def test_the_published_file_is_fetched_where_the_preferred_one_is_not_published(server: Server, tmp_path: Path):
    server.pages = {"/original.csv": CONTENT}
    original = changed(File("tabular/small/original.csv", "", 0, f"{server.url}/original.csv"), CONTENT)
    preferred = replace(TABLE, why_no_url="not published", instead=original)
    assert download(preferred, tmp_path) == tmp_path / "tabular/small/original.csv"
    assert read(preferred, tmp_path) == CONTENT


def test_without_pooch_a_download_is_refused_with_the_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(DataError, match=r"pip install 'dpkit\[data\]'; or get https://host/table.csv yourself"):
        download(replace(TABLE, url="https://host/table.csv"), tmp_path)


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def served(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The set "sst2" has one file that the server has, and one that it has not."""
    server.pages = {"/train.tsv": CONTENT}
    files = (
        replace(TABLE, url=f"{server.url}/train.tsv"),
        replace(TABLE, path="tabular/small/other.csv", why_no_url="it is mine"),
    )
    monkeypatch.setitem(catalogue.CATALOGUE, "sst2", replace(catalogue.describe("sst2"), files=files))
    return server


def test_a_list_downloads_nothing(served: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["sst2", "--data-dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "missing  tabular/small/table.csv" in out
    assert f"{served.url}/train.tsv" in out
    assert "cannot be fetched: it is mine" in out
    assert served.requests == []
    assert everything_in(tmp_path) == []


def test_the_command_fetches_what_can_be_fetched_and_says_what_cannot(
    served: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["sst2", "--download", "--data-dir", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "right    tabular/small/table.csv" in said.out
    assert "missing  tabular/small/other.csv" in said.out
    assert "other.csv cannot be fetched: it is mine" in said.err
    assert everything_in(tmp_path) == [tmp_path / "tabular/small/table.csv"]


def test_a_wrong_file_is_listed_as_wrong_with_the_reason(
    served: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "table.csv").write_bytes(CONTENT)
    (tmp_path / "other.csv").write_bytes(b"something else")
    assert main(["sst2", "--json", "--data-dir", str(tmp_path)]) == 0
    [found] = json.loads(capsys.readouterr().out)
    assert (found["name"], found["num_train"]) == ("sst2", 67_349)
    assert [file["state"] for file in found["files"]] == ["right", "wrong"]
    assert "SHA-256" in found["files"][1]["reason"]


def test_without_a_folder_every_set_is_listed_with_licence_and_citation(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("DPKIT_DATA", raising=False)
    assert main([]) == 0
    out = capsys.readouterr().out
    for description in catalogue.CATALOGUE.values():
        for said in (f"{description.name}: ", description.licence, description.citation, f"{description.num_train:,}"):
            assert said in out
    assert "  right " not in out


def test_a_download_takes_a_name_and_a_folder(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("DPKIT_DATA", raising=False)
    assert main(["--download"]) == 1
    assert "the name of one data set" in capsys.readouterr().err
    assert main(["adult", "--download"]) == 1
    assert "--data-dir" in capsys.readouterr().err
    assert main(["celeba"]) == 1
    assert "no data set 'celeba'" in capsys.readouterr().err
