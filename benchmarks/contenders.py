"""What compare.py asks: which contenders, on which tasks, and what the answer should be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from mamlpp_ext.benchmark.loops import BATCHED, LOOPS
from mamlpp_ext.benchmark.question import Question
from problems import BY_FILTERS, BY_PARAMETERS, PROBLEMS

Contender = tuple[str, str]  # the learner and the loop
TASK_LOOPS = [loop for loop in LOOPS if loop not in BATCHED]
PLAIN = [("MAML", loop) for loop in TASK_LOOPS]
PEERS = [("MAML", "higher"), ("MAML", "torchopt")]
BATCH, REMAT, GRAPH = [("MAML++", loop) for loop in BATCHED]  # the last on a GPU alone
TRAINED_BY = ("bare torch", "task_batch_loss")
STEPS, TASKS = (1, 5, 10, 20, 50), (1, 2, 4, 8, 16, 64)
OVER = ("steps", "tasks", "filters", "parameters")  # what memory and time are drawn over
# Whose iterations take milliseconds, so that more rounds are needed, and more can be had.
QUICK = ("MLP", "Conv3-32 at 8x8")
# In second order batch norm's own derivatives, which the package has written out, pay here.
LARGE = ("Conv4-64 5-way", "Conv4-64 20-way", "ResNet-12")


@dataclass(frozen=True)
class Pair:
    """A ratio of times.

    Attributes:
        name: what the table calls it.
        question: the model and tasks.
        over: whose time is divided.
        under: by whose; of several, by that of the fastest.
        goal: what the ratio should not exceed; None where there is no goal.
    """

    name: str
    question: Question
    over: Contender
    under: list[Contender]
    goal: float | None


@dataclass(frozen=True)
class Cell:
    """MAML++ by MAML, both on one network in one loop.

    Attributes:
        network: one of ``PROBLEMS``.
        loop: of the benchmark's.
        second_order: whether to differentiate through the inner gradients.
    """

    network: str
    loop: str
    second_order: bool

    @property
    def row(self) -> str:
        """What the table calls its network and order."""
        return f"{self.network}, {'second' if self.second_order else 'first'} order"

    @property
    def goal(self) -> float:
        """What the ratio should not exceed on a CPU."""
        return 0.85 if self.second_order and self.network in LARGE else 1.0

    def pair(self) -> Pair:
        """Returns it as a ratio of times."""
        tasks = 1 if self.network == "ResNet-12" else 4 if self.network in QUICK else 2
        question = replace(PROBLEMS[self.network], second_order=self.second_order, tasks=tasks)
        contenders = [("MAML++", self.loop), ("MAML", self.loop)]
        return Pair(self.row, question, contenders[0], contenders[1:], self.goal)

    def rounds(self, asked: int) -> int:
        """Returns in how many rounds to time it."""
        return 5 * asked if self.network in QUICK else 3 if self.network == "ResNet-12" else asked


def cells() -> Iterator[Cell]:
    """Yields every network in every loop and order."""
    for second_order in (True, False):
        for network in PROBLEMS:
            for loop in (*TASK_LOOPS, BATCH[1]):
                yield Cell(network, loop, second_order)


def pairs(device: str) -> Iterator[Pair]:
    """Yields every other ratio of times but that to the authors' code."""
    on_cpu = device == "cpu"
    for ways, second_order in ((5, True), (20, True), (5, False), (20, False)):
        order = "second" if second_order else "first"
        problem = replace(PROBLEMS[f"Conv4-64 {ways}-way"], second_order=second_order)
        about = f"{ways}-way, {order} order"
        goal = 1.0 if ways == 20 else 0.7 if second_order else 0.6
        for contender in (BATCH,) if on_cpu else (BATCH, GRAPH):
            yield Pair(
                f"{named(contender)} / faster of higher's and torchopt's MAML, {about}",
                problem,
                contender,
                PEERS,
                goal if on_cpu else None,
            )
    for ways in (5, 20):
        for steps in (5, 20):
            name = f"rematerialised / plain task_batch_loss, {ways}-way, K = {steps}"
            question = replace(PROBLEMS[f"Conv4-64 {ways}-way"], steps=steps, tasks=4)
            yield Pair(name, question, REMAT, [BATCH], 1.35 if on_cpu else None)
    problem = PROBLEMS["Conv4-64 5-way"]
    for contender in () if on_cpu else (BATCH, GRAPH):
        for tasks, times in ((8, 8), (32, 20)):
            name = f"{named(contender)} / higher's MAML, {tasks} tasks"
            yield Pair(name, replace(problem, tasks=tasks), contender, PEERS[:1], 1 / times)


def named(contender: Contender) -> str:
    """Returns what a table of ratios calls a contender."""
    learner, loop = contender
    return f"{loop} with {learner}" if contender == BATCH else f"{learner} as a {loop}"


def table_of(device: str) -> str:
    """Returns what a device's folder of results and its place in the README are called."""
    return "speed" if device == "cpu" else "speed-gpu"


def memory_questions(
    device: str, ways: int, tasks: int
) -> Iterator[tuple[str, Question, Contender, dict[str, int]]]:
    """Yields what memory and time are drawn over: K, T, and two sizes of the network."""
    problem = PROBLEMS[f"Conv4-64 {ways}-way"]
    ours = (BATCH, REMAT) if device == "cpu" else (BATCH, REMAT, GRAPH)
    for steps in STEPS:
        for contender in (*PLAIN, *ours):
            question = replace(problem, steps=steps, tasks=tasks)
            yield " in ".join(contender), question, contender, {"steps": steps}
    for count in TASKS:
        question = replace(problem, tasks=count)
        for contender in (PEERS[0], *ours):
            yield " in ".join(contender), question, contender, {"tasks": count}
        name = " in ".join(BATCH) + ", chunk_size=2"
        yield name, replace(question, chunk_size=2), BATCH, {"tasks": count}
    for over, networks in (("filters", BY_FILTERS), ("parameters", BY_PARAMETERS)):
        for size, network in networks.items():
            question = replace(network, tasks=tasks)
            for contender in (PEERS[0], *ours):
                yield " in ".join(contender), question, contender, {over: size}
