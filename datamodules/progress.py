"""A bar on the terminal while many bytes are read."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# of more bytes to read, the progress is shown
LARGE = 30 << 20


@contextmanager
def reading(name: str, size: int) -> Iterator[Callable[[int], None]]:
    """Something to tell how many of `size` bytes have been read; it is shown on a terminal when they are many."""
    if size < LARGE or not sys.stderr.isatty():
        yield lambda read: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("reading {task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(name, total=size)
        yield lambda read: bar.update(task, completed=read)
