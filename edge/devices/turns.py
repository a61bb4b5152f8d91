"""Measurements in turns, A B C B A C ...: the one turn-taker, of every device.

A machine that slows down for a second slows all of them down, and a ratio between two of them stays true; see
`records.ratio`. The order changes in each round: what ran before leaves the processor in a state that is
worth some percent of time.

    contestants = [...]     each a subclass of `Contestant`, or of `Timed` if it gives the time of every run
    for one in contestants: attempt(one, one.warm_up, 0.5)
    take_turns(contestants, Goal(runs=50, seconds=2.0), random=np.random.default_rng(0))
    [one.times for one in contestants if not one.failure]
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from keras_vits._util.progress import progress

from ..records import DeviceWarning

ROUND_SECONDS = 0.1  # of a turn, at least one run
WARMUP_RUNS = 3  # at least
PATIENCE = 10  # what is so slow that `Goal.runs` take this many times `Goal.seconds` is not run `Goal.runs` times

Turn = TypeVar("Turn")


class FailedError(Exception):
    """One contestant cannot be run; the text says why. The others go on without it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Goal:
    """How much is measured of each contestant.

    Attributes:
        runs: at least so many ...
        seconds: ... and at least so long, but see `PATIENCE`.
        rounds: so many turns, whatever they hold; `None` where `runs` and `seconds` decide.
    """

    runs: float = 0
    seconds: float = 0.0
    rounds: int | None = None

    def part(self, share: float) -> Goal:
        """This share of the runs and seconds."""
        return dataclasses.replace(self, runs=self.runs * share, seconds=self.seconds * share)


class Contestant(Generic[Turn]):
    """One that takes turns with others.

    Attributes:
        rounds: what each of its turns gave.
        failure: why it takes no more turns, or `None`.
    """

    def __init__(self) -> None:
        self.rounds: list[Turn] = []
        self.failure: str | None = None

    def turn(self) -> None:
        """Takes a turn and adds what it gave to `rounds`.

        Raises:
            FailedError: it cannot be run.
        """
        raise NotImplementedError

    def has_enough(self, goal: Goal) -> bool:
        """Whether nothing more of it is needed."""
        return len(self.rounds) >= (goal.rounds or 0)

    def rounds_left(self, goal: Goal) -> int:
        """About so many turns are left to it, for a progress bar."""
        return max(0, (goal.rounds or 0) - len(self.rounds))

    def fail(self, reason: str) -> None:
        """Takes it out, with a `DeviceWarning`."""
        self.failure = f"{self} was left out: {reason}"
        warnings.warn(self.failure, DeviceWarning, stacklevel=3)


class Timed(Contestant[np.ndarray]):
    """A contestant of which the time of every run is known; `rounds` holds an array of milliseconds of each turn.

    Attributes:
        runs: that make a turn of `ROUND_SECONDS`; `warm_up` finds it.
    """

    runs: int = 1

    def run(self, runs: int, seconds: float = 0.0) -> Sequence[float]:
        """Milliseconds of each run, of which there are at least so many and for at least so many seconds."""
        raise NotImplementedError

    def warm_up(self, seconds: float) -> None:
        """Runs it unmeasured."""
        ms = self.run(WARMUP_RUNS, seconds)
        typical = max(float(np.mean(ms[1:] or ms)), 0.01)  # the first run may compile, for seconds
        self.runs = max(1, round(ROUND_SECONDS * 1e3 / typical))

    def turn(self) -> None:
        self.rounds.append(np.array(self.run(self.runs), float))

    def has_enough(self, goal: Goal) -> bool:
        if goal.rounds is not None:
            return super().has_enough(goal)
        runs, seconds = sum(map(len, self.rounds)), sum(float(ms.sum()) for ms in self.rounds) / 1e3
        return (runs >= goal.runs and seconds >= goal.seconds) or (runs > 0 and seconds > PATIENCE * goal.seconds)

    def rounds_left(self, goal: Goal) -> int:
        if goal.rounds is not None:
            return super().rounds_left(goal)
        runs, seconds = sum(map(len, self.rounds)), sum(float(ms.sum()) for ms in self.rounds) / 1e3
        left = max((goal.runs - runs) / self.runs, (goal.seconds - seconds) / ROUND_SECONDS)
        return max(0, math.ceil(left))

    @property
    def times(self) -> dict[str, Any]:
        """The fields of a `Latency` that its turns tell."""
        ms = np.concatenate(self.rounds)
        p10, median, p90, p99 = (float(p) for p in np.percentile(ms, [10, 50, 90, 99]))
        rounds = tuple(float(r.mean()) for r in self.rounds)
        return dict(runs=len(ms), median_ms=median, p10_ms=p10, p90_ms=p90, p99_ms=p99, round_ms=rounds)


def attempt(contestant: Contestant[Any], step: Callable[..., object], *arguments: Any) -> None:
    """Lets a contestant do a step; one whose step fails with a `FailedError` fails, and does no more."""
    if contestant.failure is None:
        try:
            step(*arguments)
        except FailedError as e:
            contestant.fail(str(e))


def orders(
    left: Callable[[], Sequence[Any]], done: Callable[[Any], bool], random: np.random.Generator | None = None
) -> Iterator[list[Any]]:
    """Yields those who are left in the order of the next round, until every one is done.

    Args:
        left: () -> who takes part now; one that fails may be missing from the next call's answer.
        done: (one) -> whether nothing more of it is needed.
        random: draws another order for each round: what ran before leaves the processor in its state, which is worth
            some percent. By default, the order of `left`.
    """
    while (now := left()) and not all(map(done, now)):
        yield [now[i] for i in random.permutation(len(now))] if random is not None else list(now)


def take_turns(
    contestants: Sequence[Contestant[Any]],
    goal: Goal,
    *,
    random: np.random.Generator | None = None,
    keeps: Callable[[], bool] | None = None,
    description: str = "Measuring",
) -> None:
    """Lets all take a turn each, round after round, until every one that has not failed has enough.

    Args:
        contestants: in the order of each round, unless `random` is given.
        goal: how much is enough.
        random: draws the order of each round.
        keeps: () -> whether the round counts; one that does not is taken again.
        description: stands before the progress bar.
    """

    total = max((one.rounds_left(goal) for one in _left(contestants)), default=0)
    rounds = orders(lambda: _left(contestants), lambda one: one.has_enough(goal), random)
    for order in progress(rounds, description, total):
        for one in order:
            attempt(one, one.turn)
        if keeps is not None and (left := _left(contestants)) and not keeps():
            for one in left:
                one.rounds.pop()


def _left(contestants: Sequence[Contestant[Any]]) -> list[Contestant[Any]]:
    return [one for one in contestants if one.failure is None]
