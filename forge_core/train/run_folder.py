"""The folder of a run: claimed by one process at a time, cleared as a whole."""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from forge_core.atomic import remove_leftovers

from .identity import ResumeError

_OURS = ("checkpoints", "adapter", "model", "predictions", "metrics.jsonl", "recipe.yaml")


@contextmanager
def claim_output_dir(folder: Path) -> Iterator[None]:
    """Make the folder ours for the block: created, locked against a second trainer, cleaned of what a kill left.

    Raises:
        ResumeError: another process trains in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go of it however the process ends
        except BlockingIOError as error:
            raise ResumeError(
                f"output_dir: another process trains in {folder}; wait for it, or choose another"
            ) from error
        for place in (folder, folder / "checkpoints", folder / "adapter", folder / "model"):
            remove_leftovers(place)
        yield


def clear_run(folder: Path) -> None:
    """Remove what a run wrote into its folder; other files stay."""
    for name in _OURS:
        entry = folder / name
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)
