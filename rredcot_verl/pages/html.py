"""Renders the templates of this folder. What a reader cannot see is replaced, and everything that is put into an HTML
page is escaped; only the charts of `pages.charts` come as markup. Other templates escape by their own filters.
"""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from rredcot_verl.pages import charts, text


def _shown(value: Any) -> Any:
    return text.printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _thousands(value: float) -> str:
    return f"{value:,}"


def _strength(credit: float) -> str:
    """Opacity of the colour of a credit; 1 and above is the strongest."""
    # The square root keeps a credit of 0.05 visible beside one of 1.
    return f"{0.62 * min(1.0, abs(credit)) ** 0.5:.3f}"


_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=select_autoescape(["html"]),
    undefined=StrictUndefined,
    finalize=_shown,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.globals["legend_mark"] = charts.legend_mark
_ENVIRONMENT.filters.update(
    strength=_strength,
    thousands=_thousands,
    **{
        function.__name__: function
        for function in (text.signed, text.number, text.describe, text.percent, text.duration, text.line, text.markdown)
    },
)


def render(template: str, **context: Any) -> str:
    """Fills in a template, e.g. ``run.html``; the result is a complete document."""
    return _ENVIRONMENT.get_template(template).render(**context)
