"""What the published models answer here, and what they answer through a server: side by side, in words.

onclock models verify [NAME...] --repository build/zoo
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
from rich.console import Console
from rich.table import Table

from models.clients.inference import InferenceClient
from models.serve import running_server
from models.zoo.questions import QUESTIONS, Local, Question, Remote

# A question may take several requests; a machine that is busy may need long for one.
TIMEOUT_S = 60.0
# A request that was refused because the machine was busy just then is asked again.
TRIES = 5
_BUSY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


@dataclass(frozen=True, slots=True)
class Answered:
    """A question and its two answers; `seconds` is what the served one took."""

    question: Question
    here: str
    served: str
    seconds: float

    @property
    def same(self) -> bool:
        """Whether both say the same."""
        return self.here == self.served


def published(repository: Path, names: Collection[str] = ()) -> list[Question]:
    """The questions of the recipes `names` (none: all) whose models are in the repository."""
    return [
        question
        for question in QUESTIONS
        if (not names or question.recipe in names)
        and all((repository / entry / "1").is_dir() for entry in question.entries)
    ]


def answers(repository: Path, questions: list[Question], log: Path) -> Iterator[Answered]:
    """Ask here, then ask a server. Raises `ServeError`, `grpc.RpcError`, and what reading the inputs raises."""
    here = [question.ask(Local(repository), repository) for question in questions]
    entries = [entry for question in questions for entry in question.entries]
    with running_server(repository, log, entries) as url, InferenceClient(url) as client:
        for question, answer in zip(questions, here, strict=True):
            began = time.monotonic()
            served = _asked(question, Remote(client, TIMEOUT_S), repository)
            yield Answered(question, answer, served, time.monotonic() - began)


def _asked(question: Question, place: Remote, repository: Path) -> str:
    for attempt in range(TRIES):
        try:
            return question.ask(place, repository)
        except grpc.RpcError as error:
            if error.code() not in _BUSY or attempt == TRIES - 1:
                raise
    raise AssertionError


def table(found: list[Answered]) -> Table:
    """The answers for people."""
    shown = Table("model", "asked", "answer of ONNX Runtime", "answer of the server", "s", show_lines=True)
    for one in found:
        served = "the same" if one.same else f"[red]{one.served}[/red]"
        shown.add_row(one.question.recipe, one.question.asked, one.here, served, f"{one.seconds:.2f}")
    return shown


def verify(repository: Path, names: Collection[str], log: Path, console: Console) -> int:
    """Print the table. Exit status 0: all answers agree; 1: some do not, or nothing is published."""
    questions = published(repository, names)
    if not questions:
        console.print(
            f"nothing to ask in {repository}: publish models first (onclock models fetch --all)", soft_wrap=True
        )
        return 1
    found = list(answers(repository, questions, log))
    console.print(table(found))
    different = [one.question.recipe for one in found if not one.same]
    if different:
        console.print(f"answered differently: {', '.join(different)}", style="red")
    return 1 if different else 0
