"""The style sheet of the HTML report: light and dark, wide and narrow, printable, nothing from the network."""

STYLE = """
:root { color-scheme: light dark; --bg: #fff; --ink: #1b1f24; --dim: #59636e; --line: #d5dae0; --soft: #f1f3f6;
  --blue: #2f6fd6; --green: #2d8a4e; --cyan: #1a8a96; --amber: #b67a00; --purple: #8a4fbf; --gray: #8b949e;
  --red: #c62f3b; --on: #fff; }
@media (prefers-color-scheme: dark) { :root { --bg: #14171b; --ink: #e4e8ec; --dim: #9aa4af; --line: #343b43;
  --soft: #1f242a; --blue: #5c93ea; --green: #4caf70; --cyan: #41b4c0; --amber: #d9a132; --purple: #b080dc;
  --gray: #77818c; --red: #f0707a; --on: #0d1013; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 24px 20px 60px; background: var(--bg); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 20px; margin: 0 0 8px; overflow-wrap: anywhere; }
h2 { font-size: 16px; margin: 32px 0 8px; padding-bottom: 4px; border-bottom: 1px solid var(--line); }
p { margin: 4px 0; overflow-wrap: anywhere; }
.verdict { font-size: 17px; }
.figures { display: flex; flex-wrap: wrap; gap: 8px 28px; margin: 16px 0 0; padding: 0; }
.figures div { display: flex; flex-direction: column-reverse; }
.figures dt { color: var(--dim); font-size: 13px; }
.figures dd { margin: 0; font-size: 20px; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; vertical-align: top; padding: 4px 14px 4px 0; border-bottom: 1px solid var(--line); }
th { color: var(--dim); font-weight: 600; white-space: nowrap; }
td { overflow-wrap: break-word; min-width: 3em; }
td.name { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: 13px; min-width: 16em;
  overflow-wrap: anywhere; }
td.wide { min-width: 14em; }
.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.memory { display: grid; gap: 12px; }
.memory .head { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 16px; }
.memory .dim, .dim { color: var(--dim); font-size: 13px; }
.over { color: var(--red); font-weight: 600; }
svg { display: block; fill: var(--ink); }
svg.bar { width: 100%; height: 16px; }
svg.timeline { width: 100%; min-width: 760px; font-size: 12px; margin: 8px 0; }
svg .small { font-size: 10px; fill: var(--dim); }
svg .end { text-anchor: end; }
svg .on { fill: var(--on); text-anchor: middle; font-size: 11px; pointer-events: none; }
svg line { stroke: var(--line); }
svg .idle { fill: var(--soft); } svg .cut { fill: var(--bg); } svg .cut-text { fill: var(--dim); }
svg .limit { fill: var(--red); } svg .seen { fill: var(--ink); }
.forward, .parameters { fill: var(--blue); background: var(--blue); }
.backward, .activations { fill: var(--green); background: var(--green); }
.weight, .optimizer-part { fill: var(--cyan); background: var(--cyan); }
.reduce, .buffers { fill: var(--amber); background: var(--amber); }
.optimizer, .gradients { fill: var(--purple); background: var(--purple); }
.bar .optimizer, .key .optimizer-part { fill: var(--cyan); background: var(--cyan); }
.transfer { fill: var(--gray); background: var(--gray); }
.reserve { fill: var(--gray); background: var(--gray); }
.wait { fill: var(--soft); background: var(--soft); }
.key { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 8px 0; padding: 0; list-style: none; font-size: 13px; }
.key i { display: inline-block; width: 11px; height: 11px; margin-right: 6px; border-radius: 2px; }
.key .mark { width: 3px; }
.idle { fill: var(--soft); background: var(--soft); }
svg.curve { width: 100%; height: 64px; background: var(--soft); }
svg.topology { max-width: none; font-size: 12px; margin: 8px 0; }
svg .node { fill: none; stroke: var(--line); }
.plots { display: flex; flex-wrap: wrap; gap: 12px 28px; margin: 8px 0; }
.plots figure { margin: 0; flex: 1 1 320px; max-width: 520px; }
.plots figcaption { color: var(--dim); font-size: 13px; }
svg.plot { width: 100%; } .plot .small { font-size: 13px; }
svg .middle { text-anchor: middle; } svg .grid { stroke: var(--soft); }
svg .line { fill: none; stroke: var(--blue); stroke-width: 2; }
svg .even { fill: none; stroke: var(--dim); stroke-dasharray: 4 4; }
svg .point { fill: var(--bg); stroke: var(--blue); stroke-width: 2; } svg .here { fill: var(--blue); }
.map .at { text-align: center; font-weight: 400; font-variant-numeric: tabular-nums; }
.map td:nth-child(n+3) { border-left: 1px solid var(--line); }
.map td i { display: block; height: 12px; border-radius: 2px; }
.map th, .map td { padding: 3px 10px 3px 0; } .map td:nth-child(n+3), .map .at { min-width: 26px; padding: 5px 0 3px; }
.map td.name { min-width: 10em; }
.s0 { fill: var(--blue); background: var(--blue); } .s1 { fill: var(--green); background: var(--green); }
.s2 { fill: var(--amber); background: var(--amber); } .s3 { fill: var(--purple); background: var(--purple); }
.s4 { fill: var(--cyan); background: var(--cyan); } .s5 { fill: var(--red); background: var(--red); }
.s6 { fill: var(--gray); background: var(--gray); } .s7 { fill: var(--dim); background: var(--dim); }
.tip { display: none; position: fixed; z-index: 2; max-width: 90vw; padding: 3px 8px; border-radius: 4px;
  background: var(--ink); color: var(--bg); font-size: 13px; pointer-events: none; }
th button { padding: 0; border: 0; background: none; color: inherit; font: inherit; cursor: pointer; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
.zoom { display: flex; gap: 6px; justify-content: flex-end; }
.zoom button { min-width: 32px; padding: 2px 8px; border: 1px solid var(--line); border-radius: 4px; color: inherit;
  background: var(--soft); font: inherit; font-size: 13px; cursor: pointer; }
@media print { body { max-width: none; padding: 0; font-size: 11px; } .zoom, .tip { display: none !important; }
  section { break-inside: avoid-page; } .scroll { overflow: visible; } svg.timeline { min-width: 0; } }
.key .limit { background: var(--red); } .key .seen { background: var(--ink); }
"""
