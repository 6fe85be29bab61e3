"""The style sheet of the reports. Colours follow the reader's light or dark setting; nothing comes from elsewhere."""

from haste.evaluation.style import DARK, LIGHT, Theme

SERIES = len(LIGHT.series)  # colours of runs


def _series(theme: Theme) -> str:
    return " ".join(f"--series-{place}: {colour};" for place, colour in enumerate(theme.series))


STYLE_SHEET = (
    f":root {{ {_series(LIGHT)} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {_series(DARK)} }} }}"
    + """
:root {
  color-scheme: light dark;
  --page: #f4f5f7; --card: #ffffff; --text: #1b1f24; --muted: #5f6873;
  --line: #e1e4e8; --wrong: #c62828; --code: #f0f2f5;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0d1014; --card: #15191f; --text: #e8eaed; --muted: #9aa3ae;
    --line: #2b313a; --wrong: #ff8a80; --code: #1d232b;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; padding: 2.5rem 1.25rem 4rem; background: var(--page); color: var(--text);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1080px; margin: 0 auto; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .5rem; letter-spacing: -.02em; }
h2 { font-size: 1.2rem; margin: 0 0 .75rem; letter-spacing: -.01em; }
p { margin: 0 0 1rem; max-width: 75ch; }
.lead { color: var(--muted); font-size: 1.05rem; }
section {
  background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 1.5rem; margin-top: 1.25rem;
}
.facts {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: .75rem; margin-top: 1.5rem;
}
.fact { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 1rem 1.25rem; }
.fact b {
  display: block; font-size: 1.6rem; line-height: 1.25; letter-spacing: -.02em; font-variant-numeric: tabular-nums;
}
.fact span { color: var(--muted); font-size: .875rem; }
figure { margin: 0 0 1rem; }
figure:last-child, p:last-child, pre:last-child { margin-bottom: 0; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
figcaption { color: var(--muted); font-size: .875rem; margin-top: .5rem; max-width: 85ch; }
h3 { font-size: 1rem; margin: 0 0 .25rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: 1.25rem 1rem; }
.panels:not(:last-child) { margin-bottom: 1.25rem; }
.panel { min-width: 0; }
.panel figure { margin: 0; }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; max-width: none; }
.legend i { display: inline-block; width: 1.75rem; margin-right: .5rem; vertical-align: middle; }
.legend span { overflow-wrap: anywhere; }
table.images td { border: 0; padding: 0 .75rem .75rem 0; min-width: 200px; }
table.images th { border: 0; padding-bottom: .25rem; }
table.images th.row { color: var(--text); padding-top: .25rem; }
table.images img { display: block; width: 100%; max-width: 360px; height: auto; }
.tiles {
  display: grid; grid-template-columns: repeat(10, minmax(0, 56px)); gap: .5rem; align-items: end; margin-bottom: 1rem;
}
.tile { margin: 0; }
.tile img { display: block; width: 100%; aspect-ratio: 1; margin: 0 0 3px; image-rendering: pixelated; }
.tile figcaption {
  margin: 0; text-align: center; font-size: .8rem; line-height: 1.4; word-spacing: -.15em; overflow-wrap: anywhere;
}
.tile.wrong figcaption { color: var(--wrong); font-weight: 600; }
.scroll { overflow-x: auto; margin-bottom: 1rem; }
.scroll:last-child { margin-bottom: 0; }
table { border-collapse: collapse; width: 100%; font-size: .925rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .45rem .9rem .45rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--muted); font-weight: 600; }
tr:last-child td { border-bottom: 0; }
td.number, th.number { text-align: right; padding-right: 1.5rem; }
pre {
  background: var(--code); border-radius: 8px; padding: 1rem; font-size: .85rem; line-height: 1.6;
  white-space: pre-wrap; overflow-wrap: anywhere;
}
code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
summary { cursor: pointer; font-size: 1.2rem; font-weight: bold; letter-spacing: -.01em; }
details[open] summary { margin-bottom: .75rem; }
@media (min-width: 1060px) {
  .tiles { grid-template-columns: repeat(20, 40px); }
}
@media (max-width: 600px) {
  .tiles { grid-template-columns: repeat(10, minmax(0, 32px)); gap: 4px 1px; }
  .tile figcaption { font-size: .7rem; }
  body { padding: 1.25rem .75rem 2rem; }
  section { padding: 1rem; }
  h1 { font-size: 1.6rem; }
}
"""
)
