"""The prompts that a run is weak on: two lists, as figures for ``summary.json`` and as a section of the page."""

from collections.abc import Sequence
from typing import Any

from rredcot_verl.report.prompts import Prompt, is_blind, is_guessing, is_learnable
from rredcot_verl.report.shared_blame import SharedBlame
from rredcot_verl.report.thresholds import Thresholds
from rredcot_verl.report.traces import credit_colour, safe, signed

MOST_SUMMARISED, MOST_SHOWN = 100, 20
MOST_CHARACTERS = 200


def guessing_prompts(prompts: Sequence[Prompt], thresholds: Thresholds) -> list[Prompt]:
    """The prompts on which the values say the model is guessing, the flattest first."""
    return sorted((prompt for prompt in prompts if is_guessing(prompt, thresholds)), key=lambda p: (p.spread, p.text))


def blamed_prompts(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts whose failures share a blamed segment: least likely by chance first, then most failures."""

    def order(prompt: Prompt) -> tuple[Any, ...]:
        blame = prompt.shared_blame
        assert blame is not None
        # Blame on the last segment is often the outcome's pinned value only: what the values never saw.
        return 2 * blame.num_last > blame.num_sharing, blame.chance, -blame.num_sharing, prompt.text

    return sorted((prompt for prompt in prompts if prompt.shared_blame is not None), key=order)


def summarise_prompts(prompts: Sequence[Prompt], thresholds: Thresholds) -> dict[str, Any]:
    """The lists as figures.

    Args:
        prompts: The run's prompts.
        thresholds: When a prompt is listed.

    Returns:
        Counts, thresholds, and at most ``MOST_SUMMARISED`` prompts a list, ready for ``json.dumps``.
    """
    guessing, blamed = guessing_prompts(prompts, thresholds), blamed_prompts(prompts)
    return {
        "num_prompts": len(prompts),
        "num_with_values": _num_known(prompts),
        "num_learnable": sum(is_learnable(prompt) for prompt in prompts),
        "thresholds": vars(thresholds),
        "num_guessing": len(guessing),
        "num_blind": sum(is_blind(prompt, thresholds) for prompt in prompts),
        "guessing": [_guess_row(prompt) for prompt in guessing[:MOST_SUMMARISED]],
        "num_with_enough_failures": _num_eligible(prompts, thresholds),
        "num_shared_blame": len(blamed),
        "shared_blame": [_blame_row(prompt) for prompt in blamed[:MOST_SUMMARISED]],
    }


def weak_points_section(prompts: Sequence[Prompt], thresholds: Thresholds) -> str:
    """The lists as HTML.

    Args:
        prompts: The run's prompts.
        thresholds: When a prompt is listed.

    Returns:
        A ``<section>`` element.
    """
    how = (
        f"{len(prompts):,} prompts, {_num_known(prompts):,} of them with self-values along a trace; "
        f"{sum(map(is_learnable, prompts)):,} have solved and failed responses. Figures are over all steps read."
    )
    return (
        f'<section id="prompts"><h2>Prompts to look at</h2><p class="how">{how}</p>'
        f"{_guessing_card(prompts, thresholds)}{_blame_card(prompts, thresholds)}</section>"
    )


def _guessing_card(prompts: Sequence[Prompt], thresholds: Thresholds) -> str:
    listed = guessing_prompts(prompts, thresholds)
    num_blind = sum(is_blind(prompt, thresholds) for prompt in prompts)
    how = (
        "The outcomes differ, nothing the model writes moves the outlook, and the outlook is that of the outcomes. "
        f"Listed: at least {thresholds.min_responses} responses, entropy of solved against failed at least "
        f"{thresholds.min_entropy:g} bit, standard deviation of v<sub>0</sub> … v<sub>K−1</sub> along a trace (mean "
        f"over its traces) at most {thresholds.max_spread:g}, mean self-value within {thresholds.max_gap:g} of the "
        "mean reward."
    )
    if num_blind:
        noun = "prompt is" if num_blind == 1 else "prompts are"
        how += f" {num_blind:,} more {noun} as flat but farther off: there the values see nothing, and say nothing."
    rows = [
        f"<td class='what'>{_excerpt(prompt.text)}</td><td>{prompt.num_responses:,}</td>"
        f"<td>{prompt.mean_reward:.2f}</td><td>{prompt.entropy:.2f}</td>"
        f"<td>{_number(prompt.mean_value)}</td><td>{_number(prompt.spread)}</td>"
        for prompt in listed[:MOST_SHOWN]
    ]
    columns = ("prompt", "responses", "mean reward", "entropy, bit", "mean value", "spread")
    return _card("Where the values say the model is guessing", how, columns, rows, len(listed), _num_known(prompts))


def _blame_card(prompts: Sequence[Prompt], thresholds: Thresholds) -> str:
    listed = blamed_prompts(prompts)
    how = (
        f"Listed: at least {thresholds.min_failures} failed responses whose most negative segment fell by "
        f"{thresholds.min_fall:g} or more, of which at least {100 * thresholds.min_share:g} % have that segment in "
        f"common: it starts with the same {thresholds.num_alike} visible characters, or else in the same line. "
        "By chance: how often as many would agree if each failure's segment were drawn at random, in such places as "
        "the blame of other prompts, at most "
        f"{100 * thresholds.max_chance:g} % (so many of the {_num_eligible(prompts, thresholds):,} prompts with enough "
        "failures may be here by luck). Groups that failed as a whole are not probed by default, so they are missing."
    )
    rows = []
    for prompt in listed[:MOST_SHOWN]:
        blame = prompt.shared_blame
        assert blame is not None
        rows.append(
            f"<td class='what'>{_excerpt(prompt.text)}{_examples(blame)}</td><td>{_what(blame)}</td>"
            f"<td>{blame.num_sharing} of {blame.num_failures}</td><td>{_chance(blame)}</td>"
            f"<td>{blame.num_last}</td><td>{signed(blame.mean_credit)}</td>"
        )
    num_credited = sum(prompt.num_scored > 0 for prompt in prompts)
    columns = ("prompt", "shared segment", "failures", "by chance", "in the last segment", "mean credit")
    return _card("Where failures share a blamed segment", how, columns, rows, len(listed), num_credited)


def _num_known(prompts: Sequence[Prompt]) -> int:
    return sum(prompt.spread is not None for prompt in prompts)


def _num_eligible(prompts: Sequence[Prompt], thresholds: Thresholds) -> int:
    return sum(prompt.num_blamed >= thresholds.min_failures for prompt in prompts)


def _card(heading: str, how: str, columns: Sequence[str], rows: Sequence[str], num_listed: int, num_known: int) -> str:
    if not num_known:
        why = "No trace has values that could tell."
        return f'<div class="card list"><h3>{heading}</h3><p class="soft">{why}</p></div>'
    if not rows:
        return f'<div class="card list"><h3>{heading}</h3><p class="soft">{how}</p><p>No prompt is listed.</p></div>'
    head = "".join(
        f'<th scope="col"{" class=what" if place == 0 else ""}>{column}</th>' for place, column in enumerate(columns)
    )
    more = f" The first {len(rows)} of them." if num_listed > len(rows) else ""
    noun = "prompt is" if num_listed == 1 else "prompts are"
    return (
        f'<div class="card list"><h3>{heading}</h3><p class="soft">{how}</p>'
        f'<p><b>{num_listed:,}</b> {noun} listed.{more}</p><div class="rows" tabindex="0"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>"
        f"{''.join(f'<tr>{row}</tr>' for row in rows)}</tbody></table></div></div>"
    )


def _examples(blame: SharedBlame) -> str:
    items = "".join(
        f"<li>step {trace.step}, reward {trace.reward:.2f}, credit {signed(trace.credits[k])}: "
        f"<span {credit_colour(trace.credits[k])}>{_excerpt(trace.text_of(k).strip() or '(no text)')}</span></li>"
        for trace, k in blame.examples
    )
    return f"<details><summary>examples</summary><ul>{items}</ul></details>"


def _what(blame: SharedBlame) -> str:
    return f"line {safe(blame.what)}" if blame.how == "line" else f'<span class="text">{safe(blame.what)}</span>'


def _chance(blame: SharedBlame) -> str:
    return f"{100 * blame.chance:.0f} %" if blame.chance >= 0.01 else "under 1 %"


def _excerpt(text: str) -> str:
    shown = text if len(text) <= MOST_CHARACTERS else "… " + text[-MOST_CHARACTERS:]
    return f'<span class="text">{safe(shown)}</span>'


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _guess_row(prompt: Prompt) -> dict[str, Any]:
    return {
        **_identity(prompt),
        "entropy": prompt.entropy,
        "spread": prompt.spread,
        "start_value": prompt.start_value,
        "mean_value": prompt.mean_value,
    }


def _blame_row(prompt: Prompt) -> dict[str, Any]:
    blame = prompt.shared_blame
    assert blame is not None
    return {
        **_identity(prompt),
        "how": blame.how,
        "what": blame.what,
        "num_failures": blame.num_failures,
        "num_sharing": blame.num_sharing,
        "num_in_last_segment": blame.num_last,
        "mean_credit": blame.mean_credit,
        "chance": blame.chance,
        "examples": [
            {"step": trace.step, "uid": trace.uid, "segment": k, "text": trace.text_of(k)[:MOST_CHARACTERS]}
            for trace, k in blame.examples
        ],
    }


def _identity(prompt: Prompt) -> dict[str, Any]:
    return {
        # Its end: the question comes last.
        "prompt": prompt.text[-MOST_CHARACTERS:],
        "index": prompt.index,
        "num_responses": prompt.num_responses,
        "mean_reward": prompt.mean_reward,
    }
