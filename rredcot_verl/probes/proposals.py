"""Which answers are forced, and in which spellings."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rredcot_verl.answers.grammar import PROGRAM, canonical_form, reference_answers
from rredcot_verl.config.schema import RREDCoTConfig


@dataclass(frozen=True)
class Proposal:
    """A known answer in one of its spellings. `utility` is its verified reward mapped to [0, 1]."""

    text: str
    utility: float


def build_proposals(
    config: RREDCoTConfig,
    references: object,
    members: Sequence[tuple[str, float]],
    form: str | None = None,
    others: Sequence[tuple[str, float]] = (),
) -> list[Proposal]:
    """The distinct answers to probe, useful ones first, references before the group's own; then further spellings.

    Args:
        config: The `algorithm.rredcot` block.
        references: What the row holds under `self_value.reference_key`.
        members: For every response of the group with an answer, its text and its utility in [0, 1].
        form: How values are made of them, `self_value.form` where not given; `normalized` needs useless ones too.
        others: The same, without the response whose values they make: how they spelled an answer is another branch
            of it. What is the response's own would tell along it how it ends.

    Returns:
        At most `self_value.max_proposals`; empty where no useful answer is known, as every value would be 0.
    """
    settings = config.self_value
    canonical = canonical_form(config.elicitation)
    found: dict[str, tuple[str, list[float]]] = {}
    if settings.proposals in ("reference", "union"):
        found = {text: (text, [1.0]) for text in reference_answers(references, canonical)}
    reference_keys = set(found)
    if settings.proposals in ("group", "union"):
        for text, utility in members:
            key = canonical(text)
            if key and key not in reference_keys:
                # A program's canonical form is its text; an answer is forced as its response spelled it.
                spelled = key if config.elicitation.format == PROGRAM.name else text.strip()
                found.setdefault(key, (spelled, []))[1].append(utility)
    proposals = {key: Proposal(text, sum(utilities) / len(utilities)) for key, (text, utilities) in found.items()}
    # Of equal utility a reference goes first, then the answer that was given most often.
    given = {key: len(members) + 1 if key in reference_keys else len(found[key][1]) for key in proposals}
    order = sorted(proposals, key=lambda key: (-proposals[key].utility, -given[key]))
    useful = [key for key in order if proposals[key].utility > 0]
    compared = (form or settings.form) == "normalized"
    useless = [key for key in order if compared and proposals[key].utility == 0]
    if not useful:
        return []
    # A normalised value needs a wrong answer to compare with.
    keep = max(1, settings.max_proposals - len(useless[:1]))
    chosen = {key: proposals[key] for key in (useful[:keep] + useless)[: settings.max_proposals]}
    if config.elicitation.format != PROGRAM.name:
        right = next((key for key in chosen if key in reference_keys), None)
        further = _further_spellings(chosen, [(canonical(text), text.strip(), worth) for text, worth in others], right)
    else:
        further = []
    return [*chosen.values(), *further][: settings.max_proposals]


def _further_spellings(
    chosen: Mapping[str, Proposal], given: Sequence[tuple[str, str, float]], right: str | None
) -> list[Proposal]:
    """Other texts that count as one of the chosen answers, the most frequent first.

    Args:
        chosen: Answers by their canonical form.
        given: Canonical form, text and utility of answers that responses gave.
        right: The reference, which is what the verifier takes for right, however it is spelled.
    """
    texts, counts = {proposal.text for proposal in chosen.values()}, Counter[Proposal]()
    for key, text, utility in given:
        same = chosen.get(key) or (chosen.get(right or "") if utility > 1 - 1e-6 else None)
        # A line's answer ends with its line.
        if same and (utility > 0) == (same.utility > 0) and text not in texts and "\n" not in text:
            counts[Proposal(text, same.utility)] += 1
    return sorted(counts, key=lambda each: (-counts[each], each.text))
