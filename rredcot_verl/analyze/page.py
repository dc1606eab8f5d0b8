"""The bench as one HTML page: it loads nothing, runs no script, and reads on light and dark screens."""

from typing import Any

from rredcot_verl.analyze import page_context, page_credit, page_sections
from rredcot_verl.analyze.page_style import PAGE_STYLE
from rredcot_verl.report.traces import safe

TITLE = "Which credit is right"


def render(results: dict[str, Any], *, title: str | None = None) -> str:
    """Renders the results.

    Args:
        results: What `evaluate` returned, or `results.json`.
        title: Heading of the page; the default names what was measured.

    Returns:
        A complete HTML document.
    """
    if title is None:
        named = results["run"].get("title")
        title = f"{TITLE}: {named}" if named else TITLE
    body = [
        page_sections.header(results, title),
        page_sections.reading(results),
        page_sections.headline(results),
        page_sections.agreement(results),
        page_sections.positions(results),
        page_sections.calibration(results),
        page_credit.blame(results),
        page_credit.cost(results),
        page_credit.gradients(results),
        page_credit.ablations(results),
        page_context.traces(results),
        page_context.tiny(results),
        page_context.measured(results),
    ]
    # The policy makes the browser refuse anything that a trace might try to load, should its text ever get through.
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{safe(title)}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{PAGE_STYLE}</style></head>
<body><main>{"".join(body)}</main></body></html>
"""
