"""The style sheet of all pages. It names no file and no font that would have to be loaded."""

STYLE = """\
:root { --ink: #1f2933; --soft: #52606d; --faint: #7b8794; --line: #e4e7eb; --wash: #f7f9fb; --blue: #2f6db3;
  --good: #2e7d4f; --bad: #b3432f; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; color: var(--ink); background: #fff; font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto,
  "Noto Sans", "DejaVu Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .5rem; padding-top: .9rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
p { margin: .4rem 0 .7rem; max-width: 78ch; }
.meta, .note { color: var(--soft); font-size: .9rem; }
a { color: var(--blue); }
nav { margin: .9rem 0 0; font-size: .9rem; }
nav a { text-decoration: none; margin-right: .9rem; white-space: nowrap; }
.lead { background: var(--wash); border-left: 4px solid var(--blue); border-radius: 4px; padding: .7rem 1.1rem;
  margin: 1.1rem 0; }
.lead p { max-width: none; margin: .45rem 0; }
.lead ul { margin: .15rem 0 .7rem; padding-left: 1.2rem; }
.lead li { margin: .1rem 0; }
.lead .domain { font-weight: 600; }
.scroll { overflow-x: auto; margin: .7rem 0 1rem; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap;
  vertical-align: top; }
thead th { font-weight: 600; color: var(--soft); border-bottom: 2px solid #cbd2d9; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
tbody th { font-weight: 500; }
tr.group > * { border-top: 2px solid #cbd2d9; }
thead th { white-space: normal; max-width: 9.5rem; }
td small { display: inline-block; min-width: 4.6em; margin-left: .35em; color: var(--faint); font-size: .78rem;
  font-weight: 400; }
td.best { font-weight: 700; }
td.mean, th.mean { background: var(--wash); }
.better { color: var(--good); } .worse { color: var(--bad); } .unclear { color: var(--soft); }
td.text, th.text { text-align: left; white-space: normal; min-width: 9rem; }
figure { margin: .9rem 0 1.2rem; }
figure img { width: 100%; max-width: 960px; height: auto; display: block; }
figcaption { color: var(--soft); font-size: .88rem; max-width: 85ch; margin-top: .3rem; }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); gap: 14px; margin-top:
  .8rem; }
.sample { border: 1px solid var(--line); border-radius: 8px; padding: 12px; font-size: .88rem; break-inside: avoid;
  }
.sample img { width: 104px; height: 104px; object-fit: contain; float: right; margin: 0 0 6px 10px; border: 1px
  solid var(--line); border-radius: 4px; background: #fff; }
.sample .domain { color: var(--faint); font-size: .8rem; }
.sample .truth { font-weight: 600; display: block; }
.sample dl { clear: both; margin: .5rem 0 0; border-top: 1px solid var(--line); padding-top: .45rem; }
.sample dt { color: var(--faint); font-size: .78rem; } .sample dd { margin: 0 0 .35rem; overflow-wrap: anywhere; }
.thumbs { display: grid; grid-template-columns: repeat(auto-fill, minmax(112px, 1fr)); gap: 10px; margin: .7rem 0; }
.thumbs figure { margin: 0; break-inside: avoid; }
.thumbs img { width: 100%; aspect-ratio: 1; border: 1px solid var(--line); border-radius: 4px; }
.thumbs figcaption { font-size: .76rem; line-height: 1.3; overflow-wrap: anywhere; max-height: 3.9em;
  overflow: hidden; }
details { margin: .6rem 0; } summary { cursor: pointer; color: var(--blue); font-size: .92rem; }
pre { background: var(--wash); border: 1px solid var(--line); border-radius: 4px; padding: .8rem; overflow-x: auto;
  font-size: .8rem; line-height: 1.4; }
code { background: var(--wash); padding: .1em .3em; border-radius: 3px; overflow-wrap: anywhere; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 0 32px; align-items: start;
  }
@media (max-width: 700px) { td small { display: block; margin: 0; line-height: 1.25; } figure { overflow-x: auto; }
  figure img { min-width: 640px; } figcaption { position: sticky; left: 0; } body { font-size: 15px; } main {
  padding: 18px 14px 40px; } th, td { padding: .34rem .5rem; } h1 { font-size: 1.4rem; } }
@media print { nav { display: none; } h2, figure, .sample { break-inside: avoid; } }
"""
