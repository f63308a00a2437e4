"""SVG figures that can be read on a light and on a dark page."""

import os
from collections.abc import Sequence
from xml.sax.saxutils import escape

from benchmarks.report import FIGURES

STYLE = """
text { font: 13px sans-serif; fill: #24292f }
.code { font: 13px monospace }
.title { font: bold 14px sans-serif }
.small { font: 11px sans-serif; fill: #57606a }
.no { fill: #eaeef2 } .first { fill: #0969da } .second { fill: #1a7f37 } .across { fill: #bc4c00 }
.padding { fill: #d0d7de; opacity: 0.35 }
path { stroke: #57606a; fill: none; stroke-width: 1.5 }
.axis { stroke: #d0d7de; stroke-width: 1 } .dashed { stroke-dasharray: 5 4 }
.line1 { stroke: #0969da; stroke-width: 2 } .line2 { stroke: #bc4c00; stroke-width: 2 }
@media (prefers-color-scheme: dark) {
  text { fill: #c9d1d9 } .small { fill: #8b949e }
  .no { fill: #21262d } .first { fill: #58a6ff } .second { fill: #3fb950 } .across { fill: #f0883e }
  .padding { fill: #484f58 } path { stroke: #8b949e } .axis { stroke: #30363d }
  .line1 { stroke: #58a6ff } .line2 { stroke: #f0883e }
}
"""


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start", turned: float = 0) -> str:
    """Words whose baseline begins, ends or has its middle (`anchor`) at a place, turned by so many degrees."""
    place = f'transform="translate({x:g} {y:g}) rotate({turned:g})"' if turned else f'x="{x:g}" y="{y:g}"'
    return f'<text class="{kind}" {place} text-anchor="{anchor}">{escape(words)}</text>'


def cell(x: float, y: float, size: tuple[float, float], kind: str, opacity: float = 1) -> str:
    """A rectangle with round corners, of a width and a height."""
    shade = "" if opacity == 1 else f' fill-opacity="{opacity:.3f}"'
    return f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{size[0]:g}" height="{size[1]:g}" rx="3"{shade}/>'


def line(points: Sequence[tuple[float, float]], kind: str = "") -> str:
    """A line through points."""
    way = " L ".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path class="{kind}" d="M {way}"/>'


def save(name: str, width: float, height: float, parts: Sequence[str]) -> None:
    """Write figures/`name`.svg."""
    os.makedirs(FIGURES, exist_ok=True)
    with open(os.path.join(FIGURES, f"{name}.svg"), "w", encoding="utf-8") as file:
        file.write(f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}">\n')
        file.write(f"<style>{STYLE}</style>\n" + "\n".join(parts) + "\n</svg>\n")
