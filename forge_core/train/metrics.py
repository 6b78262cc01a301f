"""metrics.jsonl: one JSON object a line, append-only; a resume drops what lies behind its checkpoint."""

import json
import math
import os
from pathlib import Path
from typing import Any, TextIO

from forge_core.atomic import write_text

FILE = "metrics.jsonl"


class MetricsLog:
    """Appends to `metrics.jsonl`; every line is on its way to the disk when `write` returns.

    Args:
        folder: of the run.
        after_step: lines of later steps, and a line that a kill cut short, are dropped. 0 keeps nothing: lines of
            step 0 (the baseline) belong to a run that trained at least one step.
    """

    def __init__(self, folder: Path, *, after_step: int) -> None:
        self.path = folder / FILE
        kept = [line for line in read_lines(self.path) if line["step"] <= after_step] if after_step > 0 else []
        write_text(self.path, "".join(_encode(line) for line in kept))
        self._file: TextIO = self.path.open("a", encoding="utf-8")

    def write(self, line: dict[str, Any]) -> None:
        """Append one line; `step` is required."""
        self._file.write(_encode(line))
        self._file.flush()

    def sync(self) -> None:
        """Wait until all lines are on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a metrics file; a last line without its newline, cut short by a kill, is left out. No file: no lines.

    Raises:
        ValueError: a complete line is not JSON (file:line).
    """
    if not path.is_file():
        return []
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], start=1):
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not valid JSON ({error}); correct or remove the line") from error
    return lines


def _encode(line: dict[str, Any]) -> str:
    return json.dumps(_plain(line), ensure_ascii=False) + "\n"


def _plain(value: Any) -> Any:
    """JSON has no NaN: not-finite numbers become null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
