"""What the bench's page adds to the style sheet of `rredcot_verl.report`: one colour and shape for each family."""

from rredcot_verl.report.style import STYLE

_LIGHT = "--probe: #0b62b0; --peer: #7b3fb5; --attribution: #b3541e; --monte_carlo: #1c7a45; --readout: #b01f63;"
_DARK = "--probe: #6cb2f5; --peer: #c69bf5; --attribution: #f0a060; --monte_carlo: #62cf8e; --readout: #ff8cc0;"
_FAMILIES = {
    "probe": "--probe",
    "peer": "--peer",
    "attribution": "--attribution",
    "monte_carlo": "--monte_carlo",
    "readout": "--readout",
    "baseline": "--soft",
    "smoothed": "--first",
}
_MARKS = "".join(
    f".mark-{name} {{ fill: var({colour}); }} svg .whisker.{name} {{ stroke: var({colour}); }} "
    f"svg .fill.{name} {{ fill: var({colour}); }} svg .name.{name} {{ fill: var({colour}); }}\n"
    for name, colour in _FAMILIES.items()
)

PAGE_STYLE = (
    STYLE
    + f"""
:root {{ {_LIGHT} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}
svg .mark {{ stroke: var(--card); stroke-width: 1; }} svg .whisker {{ stroke-width: 1.8; }}
svg .whisker.thin {{ opacity: .45; }} svg .whisker.over {{ stroke: var(--ink); stroke-width: 1.3; }}
svg .fill {{ opacity: .6; }} svg .join {{ stroke: var(--soft); stroke-width: 1.5; }}
svg .third {{ stroke: var(--probe); stroke-width: 1.6; }}
svg .third.early {{ fill: var(--card); }} svg .third.middle {{ fill: var(--probe); fill-opacity: .4; }}
svg .third.late {{ fill: var(--probe); }} svg .leader {{ stroke: var(--soft); stroke-width: .7; }}
svg .name {{ font-size: 11px; stroke: var(--card); stroke-width: 3px; paint-order: stroke; }}
svg .row {{ font-size: 11.5px; }}
{_MARKS}
svg.chart.small {{ min-width: 0; max-width: 330px; }}
.keymark {{ width: 16px; height: 16px; flex: none; }}
.keymark.third circle {{ r: 5px; }}
.small-panels {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 240px), 1fr)); gap: 12px; }}
.small-panels .card {{ padding: 10px 12px; }} .small-panels h3 {{ font-size: 13px; overflow-wrap: anywhere; }}
.small-panels p {{ font-size: 12px; margin: 0; }}
.wide {{ padding: 0; overflow-x: auto; }}
.wide table {{ border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums; }}
.wide th, .wide td {{ padding: 5px 10px; text-align: right; white-space: nowrap; vertical-align: top; }}
.wide td.about {{ white-space: normal; min-width: 220px; color: var(--soft); text-align: left; }}
.wide thead th {{ color: var(--soft); font-weight: 400; border-bottom: 1px solid var(--rule); vertical-align: bottom; }}
.wide tbody tr + tr td, .wide tbody tr + tr th {{ border-top: 1px solid var(--grid); }}
.wide tbody th {{ text-align: left; font-weight: 600; position: sticky; left: 0; background: var(--card); }}
.wide thead th:first-child {{ text-align: left; position: sticky; left: 0; background: var(--card); }}
.wide tr.family th {{ font-weight: 400; color: var(--soft); padding-top: 12px; }}
.wide .iv {{ display: block; color: var(--soft); font-size: 11.5px; }}
.wide .keymark {{ vertical-align: -3px; margin-right: 6px; }}
.better::after {{ content: " ▲"; color: var(--run); }} .worse::after {{ content: " ▼"; color: var(--baseline); }}
.best {{ font-weight: 700; }}
ul.read {{ padding-left: 20px; max-width: 92ch; }} ul.read li {{ margin: 5px 0; }}
.wrong-line {{ text-decoration: underline wavy var(--wrong) 1px; text-underline-offset: 3px; }}
.example {{ margin-top: 14px; }} .example table {{ min-width: 760px; }}
.example td.what {{ padding-left: 16px; white-space: pre-wrap; overflow-wrap: anywhere; min-width: 240px; }}
.example .delta {{ opacity: .8; font-size: 11.5px; display: block; }}
.example header {{ padding: 12px 16px 8px; }} .example header h3 {{ margin: 0 0 2px; }}
"""
)
