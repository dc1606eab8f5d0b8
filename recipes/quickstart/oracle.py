"""The true values of the quickstart's states, as a source of values: the ceiling of what any credit can reach.

    python -m verl.trainer.main_ppo ... algorithm.adv_estimator=rredcot \
        algorithm.rredcot.source=recipes.quickstart.oracle:Oracle \
        algorithm.rredcot.self_value.probe_uniform_groups=true algorithm.rredcot.credit.form=td

A trace that has stated a wrong result is lost (with the last result alone as the answer, errors can cancel: not quite).
Another one is solved if every line to come is right, so v_k is the product of the chances of the operations that are
left. The chance of an operation is how often the policy got it right in earlier steps, of which each counts 0.95 of the
one after it: a value sees no outcome of its own step. Uniform groups are to be planned for too (as `critic` does), or
the chances would rest on mixed groups alone.
"""

import json
import math
import os
from collections import defaultdict

from recipes.quickstart import task
from rredcot_verl.config.schema import RREDCoTConfig
from rredcot_verl.core.groups import from_unit
from rredcot_verl.sources.base import Source
from rredcot_verl.sources.group import Group
from rredcot_verl.sources.queue import Rows
from rredcot_verl.sources.record import Plan, Record, Status
from rredcot_verl.sources.response import Response

MEMORY = 0.95
PRIOR_LINES = 4.0
"""How many lines the first guess of a chance counts."""
FILE = "quickstart_oracle.json"


def state_of(expression: str, prefix: str, reader: task.Reader | None = None) -> tuple[bool, int]:
    """Whether everything stated so far is right, and how many operations are done."""
    checks = [check for check in task.check_lines(expression, prefix, reader) if check.kind != "answer"]
    if checks and checks[-1].kind == "other" and not prefix.endswith("\n"):
        # A line that has not stated its result yet.
        checks.pop()
    return all(check.ok for check in checks), len(checks)


class Chances:
    """How often each operation (position, operand) is done right.

    Also what `python -m rredcot_verl.analyze --true-values recipes.quickstart.oracle:Chances` reads.
    """

    reader = task.Reader()
    """Another form of the task has another one."""

    def __init__(self) -> None:
        self.right: defaultdict[tuple[int, int], float] = defaultdict(float)
        self.tried: defaultdict[tuple[int, int], float] = defaultdict(float)

    def of(self, position: int, operand: int) -> float:
        """The chance that the next line is right."""
        rule, key = task.rule(position, operand), (position, operand)
        guess = 0.95 if rule.other == rule.as_written else 0.5
        return (self.right[key] + PRIOR_LINES * guess) / (self.tried[key] + PRIOR_LINES)

    def value(self, expression: str, alive: bool, done: int) -> float:
        """The chance that a trace in this state is solved."""
        problem = self.reader.parse_problem(expression)
        if problem is None or not alive or done > len(problem.operands):
            return 0.0
        return math.prod(self.of(place, problem.operands[place]) for place in range(done, len(problem.operands)))

    def state_of(self, expression: str, prefix: str) -> tuple[bool, int]:
        """See the function of this name."""
        return state_of(expression, prefix, self.reader)

    def __call__(self, expression: str, prefix: str) -> float:
        """The value of the state after a prefix of a response."""
        return self.value(expression, *self.state_of(expression, prefix))

    def forget(self) -> None:
        """A step has gone by."""
        for counts in (self.right, self.tried):
            for key in counts:
                counts[key] *= MEMORY

    def learn(self, expression: str, text: str) -> None:
        """Count the lines of a trace."""
        problem = self.reader.parse_problem(expression)
        checks = task.check_lines(expression, text, self.reader)
        for key, check in zip(enumerate(problem.operands if problem else ()), checks, strict=False):
            if check.kind == "calculation":
                self.tried[key] += 1
                self.right[key] += check.ok


class Oracle(Source):
    """v_k as a program knows it; a record's payload is `expression`, `text`, and the `states` at its boundaries."""

    estimates_reward = True
    chances_class = Chances

    def __init__(self, settings: RREDCoTConfig, name: str) -> None:
        super().__init__(settings, name)
        # Of the steps so far, in the trainer.
        self.chances = self.chances_class()

    def expression_of(self, prompt_ids: list[int]) -> str:
        """The text of a problem: the prompt is a role token, the expression, and a role token."""
        return self.tools.elicitation.vocabulary.decode(prompt_ids[1:-1])

    async def plan(self, response: Response, group: Group, boundaries: list[int]) -> Plan:
        """See `Source`."""
        del group
        expression = self.expression_of(response.prompt_ids)
        texts = [self.tools.elicitation.vocabulary.decode(response.response_ids[:end]) for end in boundaries]
        states = [self.chances.state_of(expression, text) for text in texts[:-1]]
        payload = {"expression": expression, "text": texts[-1], "states": states}
        return Plan(Record(Status.SCORED, boundaries, payload))

    def values(self, rows: Rows) -> list[list[float]]:
        """See `Source`."""
        reward_range = self.settings.self_value.reward_range
        values: list[list[float]] = [[] for _ in rows.keys]
        payloads = {row: record.payload for row in rows.scored if (record := rows.records[row]) is not None}
        for row, known in payloads.items():
            own = [self.chances.value(known["expression"], alive, done) for alive, done in known["states"]]
            values[row] = [from_unit(value, reward_range) for value in own]
        self.chances.forget()
        for known in payloads.values():
            self.chances.learn(known["expression"], known["text"])
        return values

    def save(self, folder: str) -> None:
        """See `Source`."""
        os.makedirs(folder, exist_ok=True)
        counts = [(*key, self.chances.right[key], tried) for key, tried in self.chances.tried.items()]
        with open(os.path.join(folder, FILE), "w", encoding="utf-8") as file:
            json.dump(counts, file)

    def load(self, folder: str) -> None:
        """See `Source`."""
        with open(os.path.join(folder, FILE), encoding="utf-8") as file:
            for position, operand, right, tried in json.load(file):
                self.chances.right[position, operand], self.chances.tried[position, operand] = right, tried
