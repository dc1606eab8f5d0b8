"""The style sheet of the page.

Credit is blue where it is positive and orange where it is negative: the pair that colour-blind readers tell apart. Both
themes are written out; the browser's preference picks.
"""

STYLE = """
:root { color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1b1f24; --soft: #59636e; --rule: #d9dee4; --grid: #e8ebef;
  --run: #0b62b0; --baseline: #b3541e; --first: #8b949e; --gain: 20 110 200; --loss: 230 120 15; --wrong: #a33f00; }
@media (prefers-color-scheme: dark) { :root {
  --page: #0f1216; --card: #181c22; --ink: #e6eaef; --soft: #9aa5b1; --rule: #323942; --grid: #262c34;
  --run: #6cb2f5; --baseline: #f0a060; --first: #7d8894; --gain: 60 140 230; --loss: 225 120 30; --wrong: #ffb072; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 56px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; }
h2 { font-size: 19px; margin: 40px 0 4px; }
h3 { font-size: 15px; margin: 0 0 6px; }
p { margin: 4px 0 12px; max-width: 82ch; }
.soft, .how { color: var(--soft); }
code { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: .9em; overflow-wrap: anywhere; }

.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); gap: 12px;
  margin-top: 20px; }
.tile, .card { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 14px 16px; }
.tile .name { color: var(--soft); font-size: 13px; }
.tile .figure { font-size: 24px; font-weight: 600; line-height: 1.35; font-variant-numeric: tabular-nums; }
.tile .note { font-size: 13px; color: var(--soft); }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 12px; }
.panels > .card:only-child { max-width: 700px; }
figure { margin: 0; min-width: 0; }
.scroll { overflow-x: auto; }

svg.chart { display: block; width: 100%; min-width: 420px; height: auto; }
svg text { fill: var(--ink); font: 12px system-ui, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
svg .tick, svg .title { fill: var(--soft); }
svg .number { font-size: 10px; stroke: var(--card); stroke-width: 3px; paint-order: stroke;
  font-variant-numeric: tabular-nums; }
svg .label { font-weight: 600; }
svg .label.run { fill: var(--run); } svg .label.baseline { fill: var(--baseline); }
svg .grid { stroke: var(--grid); } svg .axis { stroke: var(--soft); }
svg .even { stroke: var(--soft); stroke-dasharray: 5 4; }
svg .line { fill: none; stroke-width: 2.2; stroke-linejoin: round; }
svg .line.run { stroke: var(--run); } svg .line.baseline { stroke: var(--baseline); stroke-dasharray: 6 4; }
svg .dot { fill: var(--run); stroke: var(--card); stroke-width: 1; } svg .dot.baseline { fill: var(--baseline); }
svg .error { stroke: var(--run); stroke-width: 1.5; } svg .count { fill: var(--first); opacity: .55; }
svg .bar.last { fill: var(--run); } svg .bar.first { fill: none; stroke: var(--first); stroke-width: 1.5; }

.key { display: flex; flex-wrap: wrap; gap: 4px 20px; font-size: 13px; margin: 0 0 10px; align-items: center; }
.key span { display: inline-flex; align-items: center; gap: 7px; }
.swatch { width: 14px; height: 14px; display: inline-block; border: 1.5px solid transparent; flex: none; }
.swatch.last { background: var(--run); } .swatch.first { border-color: var(--first); }
.swatch.even { height: 0; width: 22px; border: 0; border-top: 1.5px dashed var(--soft); }
details { margin-top: 8px; font-size: 13px; } summary { cursor: pointer; color: var(--soft); }
.numbers { max-height: 22rem; overflow: auto; margin-top: 6px; }
.numbers table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.numbers th, .numbers td { padding: 2px 12px 2px 0; text-align: right; font-weight: 400; }
.numbers th { color: var(--soft); border-bottom: 1px solid var(--rule); }

.key .scale { display: inline-flex; align-items: stretch; gap: 0; border: 1px solid var(--rule); font-size: 12px; }
.scale i { font-style: normal; padding: 1px 9px; font-variant-numeric: tabular-nums; }
.gain { background: rgb(var(--gain) / var(--c)); } .loss { background: rgb(var(--loss) / var(--c)); }
.notes { margin: 0; padding-left: 20px; color: var(--soft); }
.list { margin-top: 12px; } .list .rows { margin: 0 -16px; } .list ul { margin: 4px 0; padding-left: 20px; }
.list .rows td { white-space: normal; } .list .rows td.what { padding-left: 16px; width: 45%; }
.list .rows td { width: auto; } .list details { margin-top: 0; }
h3.group { font-size: 16px; margin: 26px 0 0; } h3.group + p { margin-bottom: 0; }
.trace { margin-top: 14px; padding: 0; overflow: hidden; }
.trace header { padding: 12px 16px 10px; border-bottom: 1px solid var(--rule); }
.trace header h3 { margin: 0; }
.facts { display: flex; flex-wrap: wrap; gap: 2px 22px; font-size: 13px; color: var(--soft); }
.facts b { color: var(--ink); font-weight: 600; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.prompt { padding: 8px 16px; border-bottom: 1px solid var(--rule); font-size: 13px; }
.prompt .text { max-height: 11em; overflow: auto; }
.text { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: 13px; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.rows { max-height: 44rem; overflow: auto; }
.rows table { border-collapse: collapse; width: 100%; min-width: 620px; }
.rows th { font-size: 12px; font-weight: 400; color: var(--soft); text-align: right; padding: 6px 12px 4px 4px;
  position: sticky; top: 0; background: var(--card); white-space: nowrap; z-index: 1; }
.rows th.what { text-align: left; padding-left: 16px; }
.rows td { border-top: 1px solid var(--rule); vertical-align: top; padding: 5px 12px 5px 4px; text-align: right;
  font-size: 13px; font-variant-numeric: tabular-nums; white-space: nowrap; width: 1%; }
.rows td.what { text-align: left; width: auto; padding: 5px 8px 5px 0; white-space: normal; }
.rows td.credit { font-weight: 700; }
.piece { display: grid; grid-template-columns: 38px 1fr; }
.mark { text-align: center; font-weight: 700; user-select: none; }
.mark.bad { color: var(--wrong); }
.piece.bad .text { text-decoration: underline wavy var(--wrong) 1px; text-underline-offset: 3px; }
.tag { font-size: 11px; border: 1px solid currentColor; border-radius: 3px; padding: 0 5px; margin-left: 8px;
  white-space: nowrap; display: inline-block; text-decoration: none;
  font-family: system-ui, "Liberation Sans", sans-serif; }
.tag.whole { float: right; }
.meter { display: inline-block; vertical-align: middle; width: 46px; height: 8px; border: 1px solid var(--soft);
  margin-left: 8px; }
.meter i { display: block; height: 100%; background: var(--soft); }
footer { margin-top: 40px; font-size: 13px; color: var(--soft); border-top: 1px solid var(--rule); padding-top: 12px; }
@media print { .rows, .numbers, .prompt .text { max-height: none; } .trace { break-inside: avoid; } }
"""
