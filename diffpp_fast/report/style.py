"""The page's own style sheet."""

from __future__ import annotations

from diffpp_fast.report.drawing import DARK, LIGHT

#: Of the phases of a step, in turn; told apart from their neighbours also without colours, by the gaps.
PHASES = (
    "#4477aa",
    "#ee7733",
    "#228833",
    "#ccbb44",
    "#aa3377",
    "#66ccee",
    "#bbbbbb",
    "#994455",
    "#8866cc",
    "#999933",
    "#ee99aa",
    "#117777",
)

_RULES = """
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1280px; padding: 1rem 1.25rem 4rem; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; border-bottom: 1px solid var(--line); padding-bottom: .25rem; }
h3 { font-size: .95rem; margin: 0; }
p { max-width: 75ch; margin: .4rem 0 .8rem; }
p, li, .note { overflow-wrap: anywhere; }
a { color: inherit; }
.note, .unit { color: var(--faint); font-size: .85rem; }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1rem; font-size: .9rem; }
.runs { list-style: none; padding: 0; margin: .75rem 0; }
.runs li { margin: .15rem 0; }
.chip { display: inline-block; width: .8em; height: .8em; border-radius: .2em; margin-right: .4em; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .75rem; margin: 1rem 0; }
.tile, .panel, .card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.tile { padding: .6rem .8rem; }
.tile b { display: block; font-size: 1.15rem; font-variant-numeric: tabular-nums; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 360px), 1fr)); gap: .9rem; }
.panel { margin: 0; padding: .7rem .8rem .5rem; min-width: 0; }
.panel svg { display: block; width: 100%; height: auto; font-family: inherit; }
.panel svg * { stroke-linejoin: round; stroke-linecap: butt; }
.panel .note { margin: 0; }
.cards { display: flex; flex-wrap: wrap; gap: .75rem; }
.card { margin: 0; padding: .6rem; max-width: 100%; }
.card figcaption { font-size: .85rem; margin-bottom: .35rem; overflow-wrap: anywhere; }
.row { display: flex; flex-wrap: wrap; gap: .4rem; }
.row div { font-size: .72rem; color: var(--faint); width: var(--picture); }
.row span { display: block; }
.row img { display: block; width: 100%; border-radius: 4px; border-bottom: 3px solid transparent; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; max-width: none; }
.scroll { overflow-x: auto; margin: .5rem 0 1rem; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
thead th { white-space: nowrap; }
tbody th { font-weight: normal; }
code { font: .85em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.number td, .number thead th:not(:first-child) { text-align: right; white-space: nowrap; }
.number tbody th { min-width: 11rem; }
.number td span { display: block; }
.wide td { min-width: 14ch; max-width: 46ch; overflow-wrap: anywhere; }
.changed { background: var(--mark); }
.changed th, .changed td { padding-left: .4rem; }
.warning { border-left: 4px solid var(--warn); padding-left: .7rem; }
.bar { display: flex; gap: 2px; height: 1.6rem; margin: .3rem 0 .6rem; border-radius: 4px; overflow: hidden; }
summary { cursor: pointer; margin: .5rem 0; }
@media (max-width: 600px) { body { padding: .75rem .75rem 3rem; } .card { width: 100%; } }
@media print { nav { display: none; } .panel, .card { break-inside: avoid; } }
"""


def style_sheet() -> str:
    """Light, and dark where the reader's system is; curves take their colours from here."""
    light = {"page": "#fff", "card": "#fafafa", "text": "#1c1c1c", "faint": "#666", "line": "#d8d8d8",
             "mark": "#fff3c4", "warn": "#d55e00"}  # fmt: skip
    dark = {"page": "#14161a", "card": "#1c1f25", "text": "#e6e6e6", "faint": "#9aa0a8", "line": "#3a3f47",
            "mark": "#41381a", "warn": "#ff8c3f"}  # fmt: skip
    light |= {f"run-{place}": colour for place, colour in enumerate(LIGHT)}
    dark |= {f"run-{place}": colour for place, colour in enumerate(DARK)}
    both = {f"phase-{place}": colour for place, colour in enumerate(PHASES)}
    return (
        f":root {{ color-scheme: light dark; {_variables(light | both)} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {_variables(dark)} }} }}{_RULES}"
    )


def _variables(values: dict[str, str]) -> str:
    return " ".join(f"--{name}: {value};" for name, value in values.items())
