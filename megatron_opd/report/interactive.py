"""Training curves to zoom into: one self-contained page with Plotly, of the package `plotly`, where that is installed."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from importlib.util import find_spec
from typing import Any

from megatron_opd.report.curves import CURVES, curves_by_stage
from megatron_opd.report.runs import Run
from megatron_opd.report.smoothing import smooth, thin, values_of, width_of
from megatron_opd.report.style import marks_of
from megatron_opd.safety.page_policy import page_policy

NOT_INSTALLED = "There are no interactive curves, as plotly is not installed (pip install plotly); the figures below are the same."
_MOST_POINTS = 2000  # of a curve
_DASHES = ("solid", "dash", "dot", "dashdot")
_PAGE = """<!doctype html><html lang=en><meta charset=utf-8><meta http-equiv=Content-Security-Policy content="{policy}">
<meta name=viewport content='width=device-width,initial-scale=1'><title>training curves</title><style>{style}</style>
<p><label>stage and quantity <select id=which></select></label> <label><input type=checkbox id=raw checked> unsmoothed, faint</label>
<label><input type=checkbox id=log> logarithmic</label></p><div id=plot></div>
<p>Bold: running means; click a group in the legend to hide it, drag to zoom, double-click to go back.</p>
<script>{library}</script>
<script>{script}</script>
"""
_STYLE = (
    ":root{color-scheme:light dark}body{font:15px/1.5 system-ui,sans-serif;margin:1rem;color:CanvasText;background:Canvas}"
    "label{display:inline-block}select{font:inherit;max-width:100%}#plot{height:75vh}"
)
_OF_PLOTLY = ""  # its style element is empty when it is made, rules are added one by one; that for maps, which no curve needs, is refused
_SCRIPT = """
const panels = @@PANELS@@;
const which = document.getElementById("which"), raw = document.getElementById("raw"), log = document.getElementById("log");
panels.forEach((panel, number) => which.add(new Option(panel.title, number)));
const dark = matchMedia("(prefers-color-scheme: dark)");
function draw() {
  const panel = panels[which.value], ink = dark.matches ? "#e6e7e8" : "#1a1b1c", line = dark.matches ? "#3b3f43" : "#d4d6d8";
  const traces = panel.traces.filter(trace => raw.checked || !trace.faint);
  const axis = {gridcolor: line, zerolinecolor: line};
  Plotly.react("plot", traces, {paper_bgcolor: "transparent", plot_bgcolor: "transparent", font: {color: ink}, margin: {t: 20, r: 10},
    modebar: {bgcolor: "rgba(0, 0, 0, 0)", color: line, activecolor: ink},
    hovermode: "closest", legend: {orientation: "h", y: -0.15}, xaxis: {...axis, title: {text: "step"}},
    yaxis: {...axis, type: log.checked ? "log" : "linear"}}, {responsive: true, displaylogo: false});
}
which.onchange = () => { log.checked = panels[which.value].log; draw(); };
raw.onchange = log.onchange = dark.onchange = draw;
draw();
"""


def curves_page(groups: Mapping[str, Sequence[Run]]) -> str | None:
    """The page; None where plotly is not installed."""
    if find_spec("plotly") is None:
        return None
    library = (resources.files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8")
    panels = _panels([run for members in groups.values() for run in members], list(groups))
    data = json.dumps(panels, allow_nan=False).replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    library, script = library.replace("</script", "<\\/script"), _SCRIPT.replace("@@PANELS@@", data)
    policy = page_policy(styles=[_STYLE, _OF_PLOTLY], scripts=[library, script], style_attributes=True, own_images=True)
    return _PAGE.format(policy=policy, style=_STYLE, library=library, script=script)


def _panels(runs: Sequence[Run], groups: Sequence[str]) -> list[dict[str, Any]]:
    marks = marks_of(groups)
    found = []
    for stage, curves in curves_by_stage(runs).items():
        for key, title in CURVES:
            traces: list[dict[str, Any]] = []
            named: set[str] = set()
            for curve in curves:
                step, values = values_of(curve.rows, key)
                if not len(step):
                    continue
                colour = marks[curve.group].colour
                # Plotly reads tags in names: what one must not bring in.
                common = {
                    "mode": "lines",
                    "x": None,
                    "legendgroup": curve.group,
                    "name": html.escape(curve.group, quote=False),
                    "text": html.escape(curve.run, quote=False),
                }
                for faint, y in ((True, values), (False, smooth(values, width_of(curve.rows)))):
                    x, y = thin(step, y, most=_MOST_POINTS)
                    line = {
                        "color": colour,
                        "width": 1 if faint else 2.5,
                        "dash": "solid" if faint else _DASHES[groups.index(curve.group) // 6 % 4],
                    }
                    traces.append(
                        common
                        | {"x": x.tolist(), "y": y.tolist(), "line": line, "faint": faint, "opacity": 0.35 if faint else 1}
                        | {
                            "showlegend": not faint and curve.group not in named,
                            "hovertemplate": "%{text}<br>step %{x}: %{y:.4g}<extra></extra>",
                        }
                    )
                named.add(curve.group)
            if traces:
                found.append({"title": f"{stage}: {title}", "traces": traces, "log": key == "grad_norm"})
    return found
