"""What a terminal shows while base models are loaded: a bar for each worker, of the bytes of its weights' files.

Workers tell in hundredths what they have read; the sizes are those of the files. Elsewhere than on a terminal nothing
is shown here: there the workers' own log says it, see `worker.loading`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import TaskID

from tinsmith.cli.byte_bar import byte_bars


class LoadingBars:
    """A context, after which the bars are gone. Other lines may be printed on the console meanwhile, above them."""

    def __init__(self, console: Console, num_bytes: Mapping[str, int]) -> None:
        """num_bytes: by worker, of all its files."""
        self._bars = byte_bars(console)
        self._num_bytes = num_bytes
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        self._tasks = {name: self._bars.add_task(f"{name}: starting", total=n) for name, n in self._num_bytes.items()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def show(self, name: str, percent_read: int | None, *, is_serving: bool) -> None:
        """percent_read: None where it says nothing of reading: before it began, after a restart, once it serves."""
        share = 100 if is_serving else percent_read or 0
        doing = "ready" if is_serving else "starting"
        if percent_read is not None and not is_serving:
            doing = "reading" if percent_read < 100 else "opening"
        done = self._num_bytes[name] * share // 100
        self._bars.update(self._tasks[name], description=f"{name}: {doing}", completed=done)

    def refresh(self) -> None:
        """Draw at once; otherwise they are drawn ten times a second."""
        self._bars.refresh()
