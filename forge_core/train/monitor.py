"""What the user sees of a run: progress bar with tokens/s, loss per source and the time left."""

import types
from collections.abc import Mapping
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

_PLAIN_LINES = 20  # lines of a whole run where the console is no terminal


class Monitor:
    """Shows progress on `console`: a live bar on a terminal, about twenty plain lines otherwise.

    Args:
        console: where to write.
        total: steps of the run.
        done: steps already taken.
    """

    def __init__(self, console: Console, *, total: int, done: int = 0) -> None:
        self._console = console
        self._total = total
        self._next_plain = done
        self._progress = Progress(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._text = ""
        self._task: TaskID = self._progress.add_task("train", total=total, completed=done, text="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self._progress.stop()

    def step(self, line: Mapping[str, Any], seconds_left: float) -> None:
        """Show a line of metrics."""
        per_source = "  ".join(
            f"{name} {values['loss']:.3f}" for name, values in line["sources"].items() if values["loss"] is not None
        )
        self._text = text = f"loss {line['loss']:.3f}  {line['tokens_per_second']:,.0f} tokens/s  {per_source}"
        self._progress.update(self._task, completed=line["step"], text=escape(text))
        if not self._console.is_terminal and (line["step"] >= self._next_plain or line["step"] == self._total):
            self._next_plain = line["step"] + max(1, self._total // _PLAIN_LINES)
            self.say(f"step {line['step']}/{self._total}  {text}  ETA {format_seconds(seconds_left)}")

    def say(self, text: str, style: str | None = None) -> None:
        """Print a line above the bar."""
        self._console.print(escape(text), style=style, soft_wrap=True, highlight=False)

    def working_on(self, what: str | None) -> None:
        """Say in the bar what the run does between steps; None: it trains again."""
        self._progress.update(self._task, text=escape(self._text if what is None else what))


def format_seconds(seconds: float) -> str:
    """Write a duration as 12 s, 3 min 20 s or 2 h 05 min."""
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
