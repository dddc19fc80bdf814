"""The progress bar of a coreset."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from types import TracebackType

_ROUNDS_NEEDED = 4
_ROUNDS_USED = 8
_SHARE_NEEDED = 1 / 20  # of the picks that are left: fewer past picks tell too little


class CoresetProgress:
    """Progress bar by picks, with the time that is left.

    Args:
        wanted: Number of picks in the end, at most.
        known: Whether there will be as many; only then is a total shown, and the time that is left.
        enabled: Show the bar.
    """

    def __init__(self, wanted: int, *, known: bool, enabled: bool) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, TextColumn("{task.fields[left]}"), disable=not enabled)
        self._wanted = wanted
        self._known = known
        self._task = self._bar.add_task("Coreset", total=wanted if known else None, completed=1, left="")
        self._rounds: list[tuple[int, float]] = []
        self._done, self._time = 1, time.perf_counter()

    def __enter__(self) -> CoresetProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.update(self._task, total=self._done, completed=self._done, left="")
        self._bar.stop()

    def update(self, done: int) -> None:
        """Show that a round has ended with ``done`` picks in all."""
        now = time.perf_counter()
        self._rounds.append((done - self._done, now - self._time))
        self._done, self._time = done, now
        left = seconds_left(self._rounds, self._wanted - done) if self._known else None
        text = "" if left is None else f"about {int(left) // 60}:{int(left) % 60:02d} left"
        self._bar.update(self._task, completed=done, left=text)


def seconds_left(rounds: list[tuple[int, float]], picks: int) -> float | None:
    """Time for ``picks`` more picks.

    Early rounds pick few rows and cost almost as much as later ones: the time of a pick falls steeply at first. So a line is
    fitted to the rounds' costs, a part for the round and a part for each pick. Later rounds are taken to be as large as the
    last.

    Args:
        rounds: Picks and seconds of each past round.
        picks: Picks to come.

    Returns:
        Seconds; None while too little is known.
    """
    sizes, seconds = np.array(rounds, dtype=float).T
    if len(rounds) < _ROUNDS_NEEDED or sizes.sum() < picks * _SHARE_NEEDED:
        return None
    sizes, seconds = sizes[-_ROUNDS_USED:], seconds[-_ROUNDS_USED:]
    each, base = np.polyfit(sizes, seconds, 1) if np.ptp(sizes) else (0.0, seconds.mean())
    if each < 0 or base < 0:  # rounds differ for other reasons: take the plain average
        each, base = seconds.sum() / sizes.sum(), 0.0
    return float(each * picks + base * math.ceil(picks / sizes[-1]))
