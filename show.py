"""What programs print. A closed terminal, a pipe without a reader or a full disk never ends a run.

Only if the line is the result that was asked for is it an error.

    show("step 10")                                  a line, or nothing if nobody can read it
    show(answer, result=True)                        OSError if it cannot be written
    show_table(title, columns, rows)                 Markdown
    with only_shows("curve.png"): draw(...)          if it fails, one line says why
"""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


def show(text: str, stream: str = "stdout", result: bool = False) -> None:
    """Print a line to sys.stdout or sys.stderr. A line that cannot be printed never ends a run.

    Letters that the stream cannot write are escaped. A stream that is closed or full is silent
    from then on. But OSError if the line is the `result` of a command, unless its reader has left.
    Lines of stderr have no numbers of errors, and the middle of a very long one is left out.
    """
    out = getattr(sys, stream)
    if out is None and result:
        raise OSError("standard output: it is closed")
    if out is None:  # it was closed before Python began
        return
    if stream == "stderr":
        text = re.sub(r"\[Errno \d+\] ", "", text)
        text = text if len(text) <= 600 else f"{text[:300]} ... {text[-200:]}"
    try:
        encoding = getattr(out, "encoding", None) or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=out, flush=True)
    except (OSError, ValueError) as error:
        silent = open(os.devnull, "w")
        with suppress(OSError, ValueError):  # what is still in the buffer would fail at exit
            os.dup2(silent.fileno(), out.fileno())
        setattr(sys, stream, silent)
        if result and not isinstance(error, BrokenPipeError):
            raise OSError(f"standard output: {error}") from None
        if stream == "stdout" and not result:
            show(f"standard output: {error}; the run goes on without it", "stderr")


@contextmanager
def only_shows(what: str) -> Iterator[None]:
    """A context for code that only shows something. If it fails, one line says why."""
    try:
        yield
    except Exception as error:  # from any library, and no result may be lost by it
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        show(f"no {what}: {reason}")


def show_table(title: str, columns: list[str], rows: list[list]) -> None:
    """Print a Markdown table."""
    show(f"\n{title}\n")
    for row in [columns, ["---"] * len(columns), *rows]:
        show(f"| {' | '.join(map(str, row))} |")
