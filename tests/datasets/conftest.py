"""Tiny made-up files in the formats of the published sets; the catalogue is told that these are the published ones."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dpkit.datasets import catalogue
from dpkit.datasets.catalogue import File

Publish = Callable[..., Path]


def changed(file: File, content: bytes) -> File:
    """``file``, had it been published with ``content``."""
    return replace(file, sha256=hashlib.sha256(content).hexdigest(), size=len(content))


@pytest.fixture
def publish(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Publish:
    """``publish("adult", train, test)``: a data folder with these contents, which the catalogue then expects."""

    def make(name: str, *contents: bytes) -> Path:
        description = catalogue.describe(name)
        files = tuple(changed(file, content) for file, content in zip(description.files, contents, strict=True))
        monkeypatch.setitem(catalogue.CATALOGUE, name, replace(description, files=files))
        for file, content in zip(files, contents, strict=True):
            path = tmp_path / "data" / f"{file.path}.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(gzip.compress(content, mtime=0))
        return tmp_path / "data"

    return make
