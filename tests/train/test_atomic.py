"""Files and folders are complete or absent."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from forge_core import atomic


def test_a_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "new" / "a.txt"
    with atomic.atomic_file(target) as temporary:
        temporary.write_text("half")
        assert not target.exists()
        temporary.write_text("whole")
    assert target.read_text() == "whole"
    assert [entry.name for entry in target.parent.iterdir()] == ["a.txt"]
    assert target.stat().st_mode & 0o777 == 0o666 & ~_umask()


def test_an_error_leaves_the_old_content(tmp_path: Path) -> None:
    atomic.write_text(tmp_path / "a.txt", "old")
    with pytest.raises(RuntimeError, match="stop"), atomic.atomic_file(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
        raise RuntimeError("stop")
    assert [(e.name, e.read_text()) for e in tmp_path.iterdir()] == [("a.txt", "old")]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    for content, names in (("one", ["a", "b"]), ("two", ["c"])):
        with atomic.atomic_directory(tmp_path / "d") as folder:
            for name in names:
                (folder / name).write_text(content)
                (folder / name).chmod(0o600)
    assert [(e.name, e.read_text()) for e in (tmp_path / "d").iterdir()] == [("c", "two")]
    assert [entry.name for entry in tmp_path.iterdir()] == ["d"]
    assert (tmp_path / "d").stat().st_mode & 0o777 == 0o777 & ~_umask()
    assert (tmp_path / "d/c").stat().st_mode & 0o777 == 0o666 & ~_umask()


def test_an_error_leaves_the_old_folder(tmp_path: Path) -> None:
    with atomic.atomic_directory(tmp_path / "d") as folder:
        (folder / "a").write_text("old")
    with pytest.raises(RuntimeError, match="stop"), atomic.atomic_directory(tmp_path / "d") as folder:
        (folder / "b").write_text("new")
        raise RuntimeError("stop")
    assert [entry.name for entry in tmp_path.rglob("*")] == ["d", "a"]


def test_what_a_kill_leaves_is_removed(tmp_path: Path) -> None:
    program = (
        "import os, signal\nfrom forge_core import atomic\n"
        f"with atomic.atomic_directory({str(tmp_path / 'd')!r}) as folder, "
        f"atomic.atomic_file({str(tmp_path / 'f')!r}) as file:\n"
        "    (folder / 'a').write_text('x'); file.write_text('x')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": root}, check=False)
    assert done.returncode == -9
    (tmp_path / "mine.txt").write_text("stays")
    assert not (tmp_path / "d").exists()
    assert not (tmp_path / "f").exists()
    assert len(atomic.remove_leftovers(tmp_path)) == 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.txt"]


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value
