"""What is kept as a function of the new task's score: the best that can be had, and never a guess beyond it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Point(NamedTuple):
    """Two scores of one model, each in [0, 1] and better when higher."""

    new: float
    kept: float


def frontier(points: Iterable[Point]) -> tuple[Point, ...]:
    """Return the points that no other one beats in both scores, by rising ``new`` and so by falling ``kept``."""
    best: list[Point] = []
    for point in sorted(set(points), key=lambda one: (-one.new, -one.kept)):
        if not best or point.kept > best[-1].kept:
            best.append(point)
    return tuple(reversed(best))


def envelope(points: Iterable[Point]) -> tuple[Point, ...]:
    """Return the points of the frontier that no line between two others passes above: a concave curve.

    The most that can be said for what is to be beaten. A further point never lowers it, whereas one that is on the
    frontier, but below the line between its neighbours, lowers what is interpolated there.
    """
    hull: list[Point] = []
    for point in frontier(points):
        while len(hull) >= 2 and _is_below(hull[-1], hull[-2], point):
            hull.pop()
        hull.append(point)
    return tuple(hull)


def _is_below(middle: Point, left: Point, right: Point) -> bool:
    """Whether a point is on or below the line between two others."""
    return (middle.kept - left.kept) * (right.new - left.new) <= (right.kept - left.kept) * (middle.new - left.new)


def kept_at(curve: Sequence[Point], new: float) -> float | None:
    """Return the most that a frontier keeps with at least a new-task score; None where it does not learn so much.

    Linear between neighbours. Below its first point it is what that one keeps: a run that learns more than is asked for
    has it, and what a weaker one would keep is not guessed.
    """
    if not curve or new > curve[-1].new:
        return None
    if new < curve[0].new:
        return curve[0].kept
    position = bisect_left(curve, new, key=lambda point: point.new)
    right = curve[position]
    if right.new == new:
        return right.kept
    left = curve[position - 1]
    share = (new - left.new) / (right.new - left.new)
    return left.kept + share * (right.kept - left.kept)


def new_at(base: float, best: float, *, level: float) -> float:
    """Return the new-task score at a share of what is gained from ``base`` to ``best``."""
    return base + level * (best - base)
