"""The true values of the task's states, see `recipes.quickstart.oracle`.

For `algorithm.rredcot.source=recipes.smollm.oracle:Oracle`, and `--true-values recipes.smollm.oracle:Chances` of the
bench. A line in a form of its own counts as wrong: not quite the truth.
"""

from recipes.quickstart import oracle
from recipes.smollm import task


class Chances(oracle.Chances):
    """See the quickstart's."""

    reader = task.READER


class Oracle(oracle.Oracle):
    """See the quickstart's."""

    chances_class = Chances

    def expression_of(self, prompt_ids: list[int]) -> str:
        """The prompt, in which `task.parse_problem` finds the problem."""
        return self.tools.elicitation.vocabulary.decode(prompt_ids)
