"""What a table says of a ratio and its goal."""

from __future__ import annotations


def verdict(value: float, goal: float | None) -> str:
    """Returns two cells: the goal and whether it is met."""
    if goal is None:
        return " | "
    return f"≤ {goal:.3f} | {met(value, goal)}"


def met(value: float, goal: float) -> str:
    """Returns whether it is met."""
    return "met" if value <= goal else "**missed**"
