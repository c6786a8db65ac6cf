"""The report page's style sheet and its one script (the cursor over a chart).

Owns colours and type, light and dark. Knows no figures.
"""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --text: #16181d; --soft: #646b78; --rule: #e4e7ec;
  --accent: #2f6feb; --accent-soft: #2f6feb22; --shade: #f0f1f4; --start: #9aa3b2; --first: #c9a13b; --end: #d3d7de;
  --bad: #c93c37; --good: #1a7f4b; }
@media (prefers-color-scheme: dark) { :root { --page: #0f1115; --card: #181b21; --text: #e8eaee; --soft: #969eac;
  --rule: #2a2f38; --accent: #6ea3ff; --accent-soft: #6ea3ff2e; --shade: #20242c; --start: #6b7484; --first: #d8b14f;
  --end: #3a404b; --bad: #ff7b72; --good: #4cc38a; } }
* { box-sizing: border-box; margin: 0; }
body { background: var(--page); color: var(--text); padding: 32px 20px 56px;
  font: 14px/1.45 Inter, "Segoe UI", Roboto, "Helvetica Neue", Arial, "DejaVu Sans", sans-serif; }
main { max-width: 1180px; margin: auto; display: grid; gap: 16px; }
main > * { min-width: 0; }
.product { color: var(--accent); font-weight: 600; letter-spacing: .02em; }
h1 { font-size: 26px; line-height: 1.25; font-weight: 650; overflow-wrap: anywhere; margin: 2px 0 6px; }
h2, figcaption { font-size: 14px; font-weight: 600; margin-bottom: 10px; }
figcaption span { color: var(--soft); font-weight: 400; margin-left: 4px; }
.sub, .note { color: var(--soft); }
.status { font-weight: 600; padding: 1px 9px; border-radius: 99px; border: 1px solid; margin-right: 6px; }
.finished { color: var(--good); } .failed { color: var(--bad); } .running { color: var(--accent); }
.problem { color: var(--bad); margin-top: 8px; overflow-wrap: anywhere; white-space: pre-wrap; }
.tiles { display: grid; gap: 12px; grid-template-columns: repeat(7, 1fr); }
@media (max-width: 1080px) {
  .tiles { grid-template-columns: repeat(4, 1fr); } .tile:first-child { grid-column: span 2; }
}
@media (max-width: 560px) { .tiles { grid-template-columns: repeat(2, 1fr); } }
.card, .tile { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 16px 18px; }
.tile { padding: 13px 15px; } .tile h3 { font-size: 12px; font-weight: 500; color: var(--soft); }
.tile .value { font-size: 25px; font-weight: 620; font-variant-numeric: tabular-nums; letter-spacing: -.01em; }
.tile .note { font-size: 12px; }
.spans { display: flex; gap: 2px; height: 16px; border-radius: 5px; overflow: hidden; } .spans i { display: block; }
.start { background: var(--start); } .first { background: var(--first); } .steady { background: var(--accent); }
.end { background: var(--end); }
ul { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: 4px 22px; margin-top: 10px;
  color: var(--soft); }
li strong { color: var(--text); font-weight: 600; margin: 0 3px; }
li b { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 6px;
  vertical-align: -1px; }
.charts { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font-size: 11px; fill: var(--soft); font-variant-numeric: tabular-nums; }
.label { text-anchor: end; } .time { text-anchor: middle; }
.grid { stroke: var(--rule); } .start-up { fill: var(--shade); } .cursor { stroke: var(--soft); visibility: hidden; }
.line { fill: none; stroke: var(--accent); stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
.area, .band { fill: var(--accent-soft); } .band + .area { display: none; }
.starting { fill: var(--start); background: var(--start); opacity: .55; } .strips .running { fill: var(--shade); }
.busy { fill: var(--accent); background: var(--accent); } .b0 { opacity: .04; } .b1 { opacity: .2; }
.b2 { opacity: .4; } .b3 { opacity: .6; } .b4 { opacity: .8; }
.legend { margin: 8px 0 14px; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: right; font-weight: 500; color: var(--soft); font-size: 12px; padding: 4px 10px 6px;
  white-space: nowrap; }
td { text-align: right; padding: 5px 10px; border-top: 1px solid var(--rule); }
td:nth-child(-n+2), th:nth-child(-n+2) { text-align: left; } td:first-child, th:first-child { padding-left: 0; }
.errors td, .errors th, .settings td { text-align: left; vertical-align: top; } .settings td:first-child {
  color: var(--soft); width: 230px; } .settings tr:first-child td { border-top: 0; }
code { font: 12px/1.4 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  overflow-wrap: anywhere; }
#tip { position: fixed; pointer-events: none; background: var(--text); color: var(--page); padding: 4px 9px;
  border-radius: 6px; font-size: 12px; visibility: hidden; white-space: nowrap; }
"""

SCRIPT = """
const tip = document.getElementById("tip");
const clock = s => s < 60 ? s.toFixed(s < 10 ? 1 : 0) + "s"
  : s < 3600 ? Math.floor(s / 60) + "m " + String(Math.floor(s % 60)).padStart(2, "0") + "s"
  : Math.floor(s / 3600) + "h " + String(Math.floor(s % 3600 / 60)).padStart(2, "0") + "m";
for (const svg of document.querySelectorAll("svg.chart")) {
  const chart = JSON.parse(svg.dataset.chart), cursor = svg.querySelector(".cursor");
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), width = svg.viewBox.baseVal.width;
    const x = (event.clientX - box.left) * width / box.width;
    const bin = Math.floor((x - chart.left) / chart.width * chart.seconds / chart.bin);
    const text = chart.texts[bin];
    const shown = text != null && x >= chart.left ? "visible" : "hidden";
    cursor.style.visibility = tip.style.visibility = shown;
    if (shown === "hidden") return;
    cursor.setAttribute("x1", x); cursor.setAttribute("x2", x);
    const band = chart.bands && chart.bands[bin] ? " (" + chart.bands[bin] + ")" : "";
    tip.textContent = clock(bin * chart.bin) + "  " + chart.name + ": " + text + band;
    tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + "px";
    tip.style.top = event.clientY + 16 + "px";
  });
  svg.addEventListener("pointerleave", () => { cursor.style.visibility = tip.style.visibility = "hidden"; });
}
"""
