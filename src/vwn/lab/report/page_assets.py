"""Colours, style sheet and script of the report page, kept as text so that an installed package needs no data files."""

# The arms' colours stay apart from each other, in light mode, for readers without red, green or blue receptors too.
LIGHT = {
    **{"paper": "#fdfdfc", "raised": "#ffffff", "ink": "#1c1d1f", "muted": "#5c6066", "rule": "#dfe1e4"},
    **{"tint": "#f3f4f5", "for": "#11694b", "against": "#a3271b", "baseline": "#6a6f76"},
    **{"arm-0": "#086abf", "arm-1": "#f2501d", "arm-2": "#16a375", "arm-3": "#8e2c86", "arm-4": "#8e992d"},
    **{"arm-5": "#241e74", "arm-6": "#b3263a"},
}
DARK = {
    **{"paper": "#15171a", "raised": "#1f2226", "ink": "#e8e9ea", "muted": "#a3a8af", "rule": "#34383e"},
    **{"tint": "#1d2024", "for": "#5fd0a5", "against": "#ff9a8d", "baseline": "#a8adb5"},
    **{"arm-0": "#5eb1f2", "arm-1": "#ff8f63", "arm-2": "#45c9a2", "arm-3": "#dd8fd0", "arm-4": "#ced36a"},
    **{"arm-5": "#a9a5ff", "arm-6": "#f56f84"},
}


def _variables(colours: dict[str, str]) -> str:
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())


STYLE = f"""
:root {{ color-scheme: light dark; {_variables(LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK)} }} }}
"""
STYLE += """
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif;
}
main { max-width: 68rem; margin: 0 auto; padding: 3rem 1rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; font-weight: 650; letter-spacing: -0.015em; margin: 0; }
h2 { font-size: 1.2rem; line-height: 1.3; font-weight: 650; margin: 3.25rem 0 0.75rem; }
h3 { font-size: 0.95rem; font-weight: 600; margin: 0 0 0.5rem; }
p { margin: 0.6rem 0; max-width: 46rem; }
.scroll + h3, .note + h3 { margin-top: 1.5rem; }
h1, h2, h3, p, li, dd, figcaption { overflow-wrap: anywhere; }
.facts { color: var(--muted); margin-top: 0.5rem; }
.question { font-size: 1.1rem; margin: 0.75rem 0 0; }
.headline { font-size: 1.2rem; line-height: 1.5; margin: 1.5rem 0 0; }
.cautions { margin: 3.25rem 0 0; padding: 0.75rem 1rem; background: var(--tint); border-radius: 6px; max-width: 46rem; }
.cautions ul { margin: 0; padding-left: 1.1rem; }
.cautions h2 { font-size: 0.95rem; margin: 0 0 0.3rem; }
.verdicts { list-style: none; margin: 0; padding: 0; max-width: 52rem; }
.verdicts > li { padding: 0.9rem 0; border-top: 1px solid var(--rule); }
.verdicts h3 { display: flex; flex-wrap: wrap; gap: 0.15rem 0.75rem; align-items: baseline; }
.verdicts h3 { font-size: 1rem; margin: 0; }
.verdicts p { margin: 0.35rem 0 0; max-width: none; }
.verdicts details { margin-top: 0.35rem; }
.word { font-size: 0.875rem; font-weight: 600; color: var(--muted); }
.word.for { color: var(--for); }
.word.against { color: var(--against); }
.arms { margin: 0.5rem 0 0; padding-left: 1.1rem; font-size: 0.9375rem; }
.arms ul { padding-left: 1.1rem; }
.note, figcaption { color: var(--muted); font-size: 0.875rem; }
.scroll { overflow-x: auto; }
:focus-visible { outline: 2px solid var(--arm-0); outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; font-size: 0.9375rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.5rem 0 0.5rem 1.25rem; text-align: right; vertical-align: top; }
thead, tbody tr { border-bottom: 1px solid var(--rule); }
thead th { font-size: 0.8125rem; font-weight: 500; color: var(--muted); vertical-align: bottom; line-height: 1.3; }
tbody th { font-weight: 600; }
th:first-child, td:first-child { text-align: left; padding-left: 0; background: var(--paper); }
th:first-child { position: sticky; left: 0; }
.arm { display: inline-block; width: max-content; max-width: 18rem; overflow-wrap: break-word; }
td { white-space: nowrap; }
td small { display: block; color: var(--muted); font-size: 0.8125rem; }
.swatch { display: inline-block; width: 0.7em; height: 0.7em; border-radius: 2px; margin-right: 0.45em; }
.plots { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 2rem; margin-top: 1.75rem; }
figure { margin: 0; min-width: 0; }
.plot { height: 24rem; }
.legend { display: flex; flex-wrap: wrap; gap: 0 1rem; list-style: none; margin: 0 0 0.25rem; padding: 0; }
.legend li { min-width: 0; }
.legend button {
  max-width: 100%; padding: 0.2rem 0; border: 0; background: none; color: inherit; font: inherit; font-size: 0.875rem;
  cursor: pointer; text-align: left; overflow-wrap: anywhere;
}
.legend button[aria-pressed="false"] { color: var(--muted); text-decoration: line-through; }
.line { display: inline-block; width: 1.4rem; margin-right: 0.4rem; vertical-align: 0.25em; }
details { margin-top: 1rem; }
summary { cursor: pointer; color: var(--muted); font-size: 0.875rem; }
details .scroll { margin-top: 0.5rem; }
pre {
  margin: 0.5rem 0 0; padding: 0.8rem 1rem; background: var(--tint); border-radius: 6px;
  font: 0.875rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere;
}
.run { display: grid; grid-template-columns: 3fr 2fr; gap: 0 3rem; margin-top: 1.5rem; }
.run section { min-width: 0; margin-bottom: 1.25rem; }
dl { display: grid; grid-template-columns: minmax(6rem, auto) 1fr; gap: 0.25rem 1.25rem; margin: 0; }
dl { font-size: 0.9375rem; }
dt { color: var(--muted); overflow-wrap: anywhere; }
dd { margin: 0; }
.plots.single { grid-template-columns: minmax(0, 34rem); }
@media (max-width: 50rem) {
  main { padding-top: 1.75rem; }
  h1 { font-size: 1.5rem; }
  h2, .cautions { margin-top: 2.5rem; }
  .headline { font-size: 1.08rem; }
  .plots, .plots.single, .run { grid-template-columns: minmax(0, 1fr); }
  .plot { height: 20rem; }
  table { font-size: 0.875rem; }
  th, td { padding-left: 0.7rem; }
  td small { white-space: normal; }
  .arm { max-width: 7rem; }
  .spread { display: block; color: var(--muted); font-size: 0.8125rem; }
}
"""

SCRIPT = """
(() => {
  "use strict";
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const touch = window.matchMedia("(pointer: coarse)").matches;
  const bare = window.matchMedia("(hover: none), (pointer: coarse), (max-width: 50rem)").matches;
  const font = getComputedStyle(document.body).fontFamily;
  const resolve = (value, style) => {
    if (Array.isArray(value)) return value.map((item) => resolve(item, style));
    if (value && typeof value === "object")
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, resolve(item, style)]));
    const name = typeof value === "string" && /^var\\((--[a-z0-9-]+)\\)$/.exec(value);
    return name ? style.getPropertyValue(name[1]).trim() : value;
  };
  const config = {
    responsive: true,
    displaylogo: false,
    displayModeBar: bare ? false : "hover",
    // Named one by one, and no server: Plotly's own choice includes sending the chart to its cloud.
    modeBarButtons: [["toImage", "zoom2d", "autoScale2d", "resetScale2d"]],
    showSendToCloud: false,
    plotlyServerURL: "",
    toImageButtonOptions: { format: "svg" },
  };
  const draw = (id) => {
    const { data, layout } = resolve(figures[id], getComputedStyle(document.documentElement));
    layout.font.family = font;
    // On a touch screen a drag must scroll the page, not zoom the plot.
    if (touch) layout.dragmode = false;
    for (const trace of data)
      trace.visible = !document.querySelector(`[data-plot="${id}"][data-arm="${trace.meta}"][aria-pressed="false"]`);
    Plotly.react(id, data, layout, config);
  };
  const drawAll = () => Object.keys(figures).forEach(draw);
  drawAll();
  dark.addEventListener("change", drawAll);
  for (const button of document.querySelectorAll(".legend button"))
    button.addEventListener("click", () => {
      button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") === "false"));
      draw(button.dataset.plot);
    });
})();
"""
