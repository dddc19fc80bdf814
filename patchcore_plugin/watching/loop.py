"""The watch: look, answer, write, tell, move; and again."""

from __future__ import annotations

import errno
import json
import logging
import random
import sqlite3
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from patchcore_plugin.bundle import check_outside
from patchcore_plugin.checks import check_number
from patchcore_plugin.errors import UsageError, is_full_disk, reason_of
from patchcore_plugin.http_client import pause_after
from patchcore_plugin.names import as_line, as_text
from patchcore_plugin.watching.looks import FileId, Looks
from patchcore_plugin.watching.moves import free_name, move_file
from patchcore_plugin.watching.results import Format, append, check_file, make_result, to_line
from patchcore_plugin.watching.scorers import Answer, Scorer, ServiceDownError
from patchcore_plugin.watching.state import Answered, Move, State
from patchcore_plugin.webhook import Receiver, Webhook, is_told, make_event

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from patchcore_plugin.images import ImageError

UNREADABLE = "unreadable"
"""The folder of files that cannot be read, beside those that are named by verdicts."""

NO_VERDICT = "none"

_FILES_BETWEEN_LOOKS = 100
_FILES_IN_TRANSACTION, _TRANSACTION_SECONDS = 20, 0.5  # a disk may take 20 ms to say that it has written
_LOOKS_SHARE = 0.2  # of the time, at most
_FORGET_SECONDS = 3600.0
_SERVICE_PAUSES = 1.0, 60.0
_DISK_SECONDS = 2.0
_MOST_MOVES = 100  # in a row: a disk that is away may take seconds to say so for each

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """Options of a watch.

    Attributes:
        output: Folder for results, heatmaps and the state.
        form: Form of the results: ``"csv"`` or ``"jsonl"``.
        heatmaps: Whether a heatmap is written for each image.
        move: Folder to move answered files to, below it by verdict; None leaves them where they are.
        poll: Seconds between two looks at the folder, and for which a file has to stay the same before it is read.
        patience: Seconds for which a file that cannot be read is tried again.
        once: Whether the watch ends when all files are answered that were there at the first look.
        receiver: Receiver of the webhook; None tells nobody.

    Raises:
        UsageError: If an option is out of range.
    """

    output: Path
    form: Format = "csv"
    heatmaps: bool = True
    move: Path | None = None
    poll: float = 1.0
    patience: float = 30.0
    once: bool = False
    receiver: Receiver | None = None

    def __post_init__(self) -> None:
        if self.form not in get_args(Format):
            msg = f"--format must be one of {', '.join(get_args(Format))}, got {self.form!r}."
            raise UsageError(msg)
        check_number("--poll", self.poll, 0.01, 3600)
        check_number("--patience", self.patience, 0, 86_400)


@dataclass
class Summary:
    """What a watch did.

    Attributes:
        verdicts: Number of images by verdict.
        unreadable: Number of files that could not be read.
        undrawn: Number of images without the heatmap that was wanted.
        left: Number of files that ``once`` left: they were still written, or the service was down.
        events: Number of events that wait in the webhook's queue.
    """

    verdicts: Counter[str | None] = field(default_factory=Counter)
    unreadable: int = 0
    undrawn: int = 0
    left: int = 0
    events: int = 0

    def count(self, result: Mapping[str, Any], *, wanted: bool) -> None:
        """Count a result.

        Args:
            result: The result.
            wanted: Whether heatmaps are wanted.
        """
        if result["score"] is None:
            self.unreadable += 1
        else:
            self.verdicts[result["verdict"]] += 1
            self.undrawn += wanted and result["heatmap"] is None

    @property
    def answers(self) -> int:
        """Number of files that were answered."""
        return sum(self.verdicts.values()) + self.unreadable


def watch(
    folder: Path,
    scorer: Scorer,
    options: Options,
    end: threading.Event,
    report: Callable[[dict[str, Any]], object] = lambda result: None,
) -> Summary:
    """Answer each new image of a folder once.

    Args:
        folder: The folder; its subfolders count.
        scorer: Who answers.
        options: Options.
        end: Ends the watch after the image in work, when it is set.
        report: Called with each result.

    Returns:
        What was done.

    Raises:
        PatchcoreError: If the folders do not fit together, another watch is at work, or the scorer cannot answer at all.
        OSError: If the folder cannot be read at the beginning.
    """
    return _Watch(folder, scorer, options, end, report).run()


class _Watch:
    def __init__(
        self,
        folder: Path,
        scorer: Scorer,
        options: Options,
        end: threading.Event,
        report: Callable[[dict[str, Any]], object],
    ) -> None:
        if not folder.is_dir():
            msg = (
                f"{folder} is a file: give the folder that it is in."
                if folder.is_file()
                else f"There is no folder {folder}."
            )
            raise UsageError(msg)
        for other in (options.output, options.move):
            if other is not None:
                check_outside(other, folder)
        if options.move is not None and folder.resolve().is_relative_to(options.move.resolve()):
            msg = (
                f"{folder} lies in {options.move}, and files that are moved there would be new ones. Choose another --move."
            )
            raise UsageError(msg)
        self._folder, self._scorer, self._options, self._end, self._report = folder, scorer, options, end, report
        self._results = f"results.{options.form}"
        self._summary = Summary()
        self._looks = Looks(folder, settle=options.poll, patience=options.patience)
        self._said: dict[str, str] = {}
        self._failures = 0
        self._answers: list[tuple[Answered, dict[str, Any]]] = []  # not noted yet, each with its result
        self._put_until = 0.0
        self._failing_since: float | None = None  # since when the service or the disk fails, by the monotonic clock
        self._state: State
        self._webhook: Webhook | None = None

    def run(self) -> Summary:
        self._scorer.check()
        self._state = State(self._options.output / "state.sqlite", self._folder)
        try:
            check_file(self._options.output / self._results, self._options.form)
            if self._options.receiver is not None:
                self._webhook = Webhook(self._options.receiver, self._options.output / "webhook.sqlite")
            self._finish()
            self._watch()
            self._finish()
        finally:
            if self._webhook is not None:
                self._summary.events = self._webhook.close()
            self._state.close()
        return self._summary

    def _watch(self) -> None:
        wanted: set[str] | None = None
        forget_at = 0.0
        first = True
        while not self._end.is_set():
            started = time.monotonic()
            try:
                listed, ready = self._looks.look(self._state.answered)
            except OSError as error:
                if first or self._options.once:
                    raise
                self._say("folder", f"{self._folder} cannot be read, and is tried again: {error.strerror or error}")
                self._wait(max(self._options.poll, 1.0))
                continue
            first = False
            self._say("folder", "")
            looked = time.monotonic() - started
            pause = max(self._options.poll, looked * (1 / _LOOKS_SHARE - 1))
            if ready:
                pause = self._answer_all(ready[:_FILES_BETWEEN_LOOKS], listed)
            if listed and started >= forget_at:  # an empty list may be that of a share that is away
                forget_at = started + _FORGET_SECONDS
                self._try("state", lambda listed=listed: self._state.forget_missing(listed))
            if self._options.once:
                wanted = set(listed) if wanted is None else wanted
                left = self._left(wanted, listed)
                failed = 0 if self._failing_since is None else time.monotonic() - self._failing_since
                if all(map(self._looks.is_restless, left)) or failed > self._options.patience:
                    self._summary.left = len(left)
                    return
            self._finish()
            self._wait(pause)

    def _left(self, wanted: set[str], listed: dict[str, FileId]) -> list[str]:
        """Files that ``once`` still has to answer."""
        answered, drawings = self._state.answered, self._looks.drawings
        return [
            name
            for name, found in listed.items()
            if name in wanted and answered.get(name) != found and drawings.get(name) != found
        ]

    def _wait(self, seconds: float) -> None:
        """Wait, in pieces: on Windows no signal is seen meanwhile."""
        until = time.monotonic() + seconds
        while not self._end.is_set() and (left := until - time.monotonic()) > 0:
            self._end.wait(min(left, 0.5))

    def _answer_all(self, names: Sequence[str], listed: dict[str, FileId]) -> float:
        """Answer for finished files; returns the seconds to wait afterwards."""
        names = [name for name in names if self._may_be_read(name, listed[name])]
        outcomes = self._scorer.answers([self._folder / name for name in names], heatmaps=self._options.heatmaps)
        pause = 0.0
        try:
            for name in names:
                self._take(name, listed[name], next(outcomes))
                if len(self._answers) >= _FILES_IN_TRANSACTION or time.monotonic() >= self._put_until:
                    self._put()
                if self._end.is_set():
                    break
        except ServiceDownError as error:
            self._say("service", str(error))
            if error.one:
                self._looks.put_off(name)
            self._failures = 1 if error.one else self._failures + 1
            pause = pause_after(self._failures, *_SERVICE_PAUSES, error.wait, random.random())  # noqa: S311
        except (OSError, sqlite3.OperationalError) as error:
            pause = self._note_full_disk(error)
        try:
            self._put()
        except sqlite3.OperationalError as error:
            pause = self._note_full_disk(error)
        if pause:
            self._failing_since = self._failing_since or time.monotonic()
        elif names:
            self._failing_since, self._failures = None, 0
            self._say("service", "")
            self._say("disk", "")
        return pause

    def _note_full_disk(self, error: Exception) -> float:
        """Say that nothing can be written; returns the seconds to wait. Answers that are not noted are given anew."""
        reason = getattr(error, "strerror", None) or error
        self._say("disk", f"{self._options.output} cannot be written, and images wait: {reason}")
        self._answers.clear()
        return _DISK_SECONDS

    def _may_be_read(self, name: str, found: FileId) -> bool:
        """Whether a finished file is still what was looked at. Reports one that cannot be opened."""
        try:
            return self._looks.is_unchanged(name, found)
        except OSError as error:
            self._take_failure(name, found, error)
            return False

    def _take(self, name: str, found: FileId, outcome: Answer | ImageError | OSError) -> None:
        """Take the outcome for a file, unless the file has changed since the look."""
        if not self._may_be_read(name, found):
            return
        if not isinstance(outcome, Answer):
            self._take_failure(name, found, outcome)
            return
        target = self._target(name, found, outcome.fields["verdict"] or NO_VERDICT)
        drawn = heatmap = None
        error = ""
        if outcome.draw is not None:
            try:
                heatmap, drawn = self._draw(target or name, found, outcome.draw)
            except (OSError, ValueError, MemoryError) as problem:
                if is_full_disk(problem):
                    raise
                error = f"Its heatmap cannot be written: {reason_of(problem)}."
        self._note(name, found, outcome.fields, target=target, drawn=drawn, heatmap=heatmap, error=error)

    def _take_failure(self, name: str, found: FileId, error: ImageError | OSError) -> None:
        """Take a file that cannot be read: try again for a while, and then say so, once."""
        if self._looks.note_failure(name, gone=isinstance(error, FileNotFoundError)):
            reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
            self._note(name, found, {}, target=self._target(name, found, UNREADABLE), error=reason)

    def _target(self, name: str, found: FileId, verdict: str) -> str | None:
        """Where a file is to be moved to, below the folder of moved files."""
        if self._options.move is None:
            return None
        meant = {answered.target for answered, _ in self._answers}
        is_taken = lambda target: target in meant or self._state.is_target(target)  # noqa: E731
        return free_name(self._options.move, f"{verdict}/{name}", found.changed, is_taken)

    def _draw(self, name: str, found: FileId, draw: Callable[[Path], None]) -> tuple[str, str]:
        """Draw a heatmap under a name that it has until the answer is noted; returns both names, below the output."""
        heatmap = f"heatmaps/{free_name(self._options.output / 'heatmaps', f'{name}.png', found.changed)}"
        path = self._options.output / heatmap
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn = path.with_name(f".{path.name}.part")
        draw(drawn)
        return heatmap, drawn.relative_to(self._options.output).as_posix()

    def _note(
        self, name: str, found: FileId, fields: dict[str, Any], *, target: str | None, error: str,
        drawn: str | None = None, heatmap: str | None = None,
    ) -> None:  # fmt: skip
        """Make the line of an answer, and the event that tells of it."""
        result = make_result(name, fields, heatmap=heatmap, moved_to=target, error=error)
        event = None
        if self._webhook is not None and (not fields or is_told(fields["verdict"])):
            source = {"folder": as_text(str(self._folder)), "file": as_text(name), "moved_to": result["moved_to"]}
            event = json.dumps(make_event({**fields, "error": None if fields else result["error"]}, source)).encode()
        line = to_line(result, self._options.form)
        if not self._answers:
            self._put_until = time.monotonic() + _TRANSACTION_SECONDS
        self._answers.append((Answered(name, found, line, drawn, heatmap, event, target), result))

    def _put(self) -> None:
        """Note the answers for good, and do what follows."""
        if not self._answers:
            return
        self._state.answer([answered for answered, _ in self._answers], self._results)
        for _, result in self._answers:
            self._summary.count(result, wanted=self._options.heatmaps)
            self._report(result)
        self._answers.clear()
        self._finish(retry=False)

    def _finish(self, *, retry: bool = True) -> None:
        """Do what is still to be done for the answers; what cannot be done now is tried again later.

        Args:
            retry: Also try what failed the last time.
        """
        for what, work in {"results": self._write, "webhook": self._tell, "move": self._move}.items():
            if retry or not self._said.get(what):
                self._try(what, work)

    def _write(self) -> None:
        for results in self._state.unfinished_results():
            file, form = self._options.output / results, "csv" if results.endswith("csv") else "jsonl"
            while lines := self._state.lines(results):
                for line in lines:
                    if line.drawn is not None and (self._options.output / line.drawn).exists():
                        (self._options.output / line.drawn).replace(self._options.output / line.heatmap)
                size = append(file, self._state.size_of(results), b"".join(line.line for line in lines), form)
                self._state.note_written(results, size, len(lines))

    def _tell(self) -> None:
        told = []
        for number, event in self._state.events() if self._webhook is not None else ():
            if not self._webhook.tell(json.loads(event)):
                break
            told.append(number)
        else:
            if told:
                self._state.note_told(told)
            return
        self._state.note_told(told)
        raise OSError(errno.EIO, "it cannot be written", str(self._webhook.queue.file))

    def _move(self) -> None:
        moved, problem = [], None
        for move in self._state.moves(_MOST_MOVES) if self._options.move is not None else ():
            try:
                moved.append(self._move_one(move))
            except OSError as error:
                problem = error  # the others are moved
        if moved:
            self._state.note_moved(moved)
        if problem is not None:
            raise problem

    def _move_one(self, move: Move) -> Move:
        """Move a file; returns the move that was done."""
        while not move_file(self._folder / move.name, move.id, self._options.move / move.target):
            target = free_name(self._options.move, move.target, move.id.changed)
            logger.warning("%s is moved to %s: a file has appeared at its place.", as_line(move.name), as_line(target))
            self._state.change_target(move, target)
            move = move._replace(target=target)
        return move

    def _try(self, what: str, work: Callable[[], object]) -> None:
        """Do what can be done again later, and say once what fails."""
        try:
            work()
        except (OSError, sqlite3.OperationalError) as error:
            file = as_line(str(getattr(error, "filename", None) or self._options.output))
            self._say(what, f"{file} fails, and is tried again: {getattr(error, 'strerror', None) or error}")
        else:
            self._say(what, "")

    def _say(self, what: str, text: str) -> None:
        """Warn of something once; an empty text says that it is well again."""
        before = self._said.get(what, "")
        if text and text != before:
            logger.warning("%s", text)
        elif before and not text:
            logger.warning("It goes on, after: %s", before)
        self._said[what] = text
