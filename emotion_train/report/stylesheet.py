"""The report's style: every colour is a variable, with one set each for light, dark and paper."""

from __future__ import annotations

STYLESHEET = """
:root{color-scheme:light dark;--page:#f6f7f8;--card:#fff;--ink:#1b1f24;--muted:#626a73;--edge:#e3e6e9;--accent:#3558d4;--on:#fff;
--soft:#c3cff5;--floor:#b3bac2;--good:#1e7d3c;--open:#9a6400;--bad:#c22b2b;--second:#c2571a}
@media (prefers-color-scheme:dark){:root{--page:#0f1215;--card:#171b1f;--ink:#e8eaed;--muted:#9aa3ad;--edge:#2a3036;--accent:#86a0ff;
--on:#0c1020;--soft:#35447d;--floor:#4d565f;--good:#6fd58c;--open:#f2b94f;--bad:#ff8a8a;--second:#ffb074}}
@media print{:root{--page:#fff;--card:#fff;--ink:#000;--muted:#444;--edge:#ccc;--accent:#3558d4;--on:#fff;--soft:#c3cff5;--floor:#b3bac2;
--good:#1e7d3c;--open:#9a6400;--bad:#c22b2b;--second:#c2571a}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
-webkit-print-color-adjust:exact;print-color-adjust:exact}
main{max-width:1080px;margin:0 auto;padding:32px 20px 64px}
header{margin-bottom:28px}
.run{max-width:none;margin:0 0 14px;color:var(--muted);overflow-wrap:anywhere}.run b{color:var(--ink);font-weight:600}
.lead{max-width:62ch;margin:0 0 16px;font-size:22px;line-height:1.35;font-weight:600;text-wrap:pretty}
h1{position:relative;margin:0 0 22px;padding:16px 20px 16px 52px;border:1px solid var(--edge);border-left:5px solid;border-radius:8px;
background:var(--card);font-size:19px;line-height:1.45;font-weight:550;text-wrap:pretty}
h1.good{border-left-color:var(--good)}h1.open{border-left-color:var(--open)}h1.bad{border-left-color:var(--bad)}
h1 span{position:absolute;left:19px;font-weight:700}
h1.good span{color:var(--good)}h1.open span{color:var(--open)}h1.bad span{color:var(--bad)}
h2{margin:0 0 14px;font-size:17px;font-weight:650}h3{margin:22px 0 8px;font-size:15px;font-weight:650;overflow-wrap:anywhere}
h3 small{margin-left:6px;color:var(--muted);font-size:13px;font-weight:400}.note{color:var(--muted);font-size:13px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(170px,1fr));gap:12px;margin:0}
.tiles div{padding:14px 16px;border:1px solid var(--edge);border-radius:8px;background:var(--card)}
.tiles dt{color:var(--muted);font-size:13px}.tiles dd{margin:0;font-size:26px;line-height:1.3;font-weight:650;
font-variant-numeric:tabular-nums}
.tiles small{display:block;color:var(--muted);font-size:12.5px;font-weight:400}
section{margin:0 0 16px;padding:20px 24px 22px;border:1px solid var(--edge);border-radius:8px;background:var(--card)}
p{max-width:75ch;margin:0 0 14px}ul{margin:0;padding-left:20px}li{margin:5px 0;max-width:85ch;overflow-wrap:anywhere}
figure{margin:0 0 8px;break-inside:avoid}figcaption{margin:6px 0 12px;color:var(--muted);font-size:13px}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(380px,100%),1fr));gap:8px 32px;align-items:start}
.wide{overflow-x:auto}
.posts{list-style:none;padding:0}.posts li{max-width:none;margin:0;padding:7px 0;border-top:1px solid var(--edge)}
.posts small{display:block;color:var(--muted);font-size:12.5px}
.tracks{max-width:820px}.track{display:grid;grid-template-columns:170px minmax(0,1fr) 60px;gap:0 12px;align-items:center;padding:5px 0}
.track>:first-child{text-align:right;overflow-wrap:anywhere}.track:first-child>:not(.rail){font-weight:650}
.track>:last-child{font-variant-numeric:tabular-nums}
.rail{position:relative;height:20px;background:var(--page);border-radius:3px}.rail>*{position:absolute;top:0;height:100%}
.rail i{left:0;border-radius:3px}.rail u{top:50%;height:2px;margin-top:-1px;background:var(--ink);text-decoration:none;
box-shadow:0 0 0 1.5px var(--card)}.rail u::before,.rail u::after{content:"";position:absolute;top:-5px;left:-1px;width:2px;height:12px;
background:var(--ink)}.rail u::after{left:auto;right:-1px}.rail s{width:0;border-left:1px dashed var(--muted)}
.rail b{top:50%;width:10px;height:10px;margin:-5px;border-radius:50%;background:var(--accent)}
.axis{padding:0}.axis .rail{background:none;height:18px}.axis em{transform:translateX(-50%);color:var(--muted);font-size:12px;font-style:normal}
.axis em:first-child{transform:none}.axis em:last-child{transform:translateX(-100%)}
.pairs{columns:2 380px;column-gap:40px}.pairs>div{break-inside:avoid-column;padding-bottom:1px}.pairs>div:first-child h3{margin-top:0}
table{border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums}
th,td{padding:5px 14px 5px 0;border-bottom:1px solid var(--edge);text-align:right;font-weight:400;white-space:nowrap}
th:last-child,td:last-child{padding-right:2px}tr{break-inside:avoid}tbody tr:last-child>*{border-bottom:0}
thead th{color:var(--muted);font-size:13px;vertical-align:bottom}.word,.bars th:first-child{text-align:left}
tbody th.word,.bars tbody th{max-width:260px;overflow:hidden;text-overflow:ellipsis}
.prose,tbody th.prose{min-width:280px;max-width:460px;white-space:pre-wrap;overflow-wrap:anywhere}
.total tbody tr:last-child>*{border-top:1px solid var(--muted);font-weight:650}
.bars{width:100%}.bars td.between{text-align:left}.bars thead th:not(.number){text-align:left}.average>*{color:var(--muted)}.average:nth-last-child(2)>*{border-top:1px solid var(--muted)}
.bar div{display:flex;align-items:center;gap:9px}.bar span{min-width:2.2em;text-align:right}.bar b{flex:1;min-width:40px}
.bar i{display:block;height:9px;border-radius:2px}
code{font:13px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
i.accent{background:var(--accent)}i.soft{background:var(--soft)}i.floor{background:var(--floor)}
.facts{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:5px 20px;margin:0;font-size:14px}
.facts dt{color:var(--muted)}.facts dd{margin:0;overflow-wrap:anywhere;font-variant-numeric:tabular-nums}
pre{margin:0;columns:3 230px;column-gap:32px;white-space:pre-wrap;overflow-wrap:anywhere;
font:12.5px/1.55 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
svg{display:block;width:100%;height:auto;overflow:visible;font-size:12px}
svg text{fill:var(--ink);font-variant-numeric:tabular-nums}svg .muted{fill:var(--muted)}svg .strong{font-weight:650}
svg .accent{fill:var(--accent)}svg .floor{fill:var(--floor)}svg .soft{fill:var(--soft)}svg .grid{stroke:var(--edge);fill:none}
svg .diagonal{stroke:var(--muted);stroke-dasharray:4 4;fill:none}
svg .second{fill:var(--second)}svg .line,svg .ring{stroke:var(--accent);stroke-width:2;fill:none;stroke-linejoin:round}
svg .line.second,svg .ring.second{stroke:var(--second)}
svg .plate{fill:var(--page)}svg .heat{fill:var(--accent)}svg .on{fill:var(--on)}svg .off{fill:var(--ink)}svg .right text{font-weight:650}
@media (max-width:520px){main{padding:16px 8px 40px}section{padding:14px 12px}table{font-size:13px}th,td{padding-right:9px}
tbody th.word{max-width:110px;white-space:normal;overflow-wrap:anywhere}.prose,tbody th.prose{min-width:150px}
.lead{font-size:19px}h1{font-size:17px;padding:12px 14px 12px 40px}h1 span{left:14px}.tiles{grid-template-columns:1fr 1fr}
.track{grid-template-columns:minmax(0,1fr) 56px}.track>:first-child{grid-column:1/-1;text-align:left}.axis>:first-child{display:none}
.facts{grid-template-columns:1fr;gap:0}.facts dd{margin-bottom:6px}
.stack thead,.bars thead{display:none}.stack,.stack tbody,.stack tr,.bars,.bars tbody{display:block;width:100%}
.stack tr{padding:7px 0;border-bottom:1px solid var(--edge)}.stack tr>*{display:flex;justify-content:space-between;max-width:none;
padding:1px 0;border:0;white-space:normal;overflow-wrap:anywhere}.stack tbody th.word{max-width:none}.stack tr>th{font-weight:650}
.stack [data-head]::before{content:attr(data-head);padding-right:14px;color:var(--muted);font-weight:400;white-space:nowrap}
.stack tr>:empty{display:none}.stack .prose{display:block;min-width:0;text-align:left}.stack .prose::before{display:block}
.bars tr{display:grid;grid-template-columns:repeat(4,minmax(0,1fr));gap:2px 8px;padding:8px 0;border-bottom:1px solid var(--edge)}
.bars tbody th{grid-column:1/-1;max-width:none;padding:0;border:0;font-weight:650;white-space:normal;overflow-wrap:anywhere}
.bars td{padding:0;border:0;text-align:left;white-space:normal}.bars tr.average>*{border-top:0}
.bars td[data-head^=calibration]{grid-column:span 2}figure:has(.matrix)::before{content:"scroll sideways →";color:var(--muted);font-size:12px}
.bars td:empty,.bar b{display:none}.bar span{min-width:0}
.bars td::before{content:attr(data-head);display:block;color:var(--muted);font-size:11px}}
@media print{main{max-width:none;padding:0}section{border:0;padding:8px 0;margin-bottom:12px}h2,h3{break-after:avoid}
.wide{overflow:visible}svg{min-width:0!important}}
"""
