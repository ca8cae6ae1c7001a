"""Small multiples as an SVG: panels with lines or bars, legible on light and dark pages, without any library."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from xml.sax.saxutils import escape

_WIDTH: Final = 290
_HEIGHT: Final = 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 34, 34
_LEGEND: Final = 48
#: A label of the x axis needs so much room.
_LABEL: Final = 24

#: Colours that stand out from white and from black, also for people who tell few colours apart (Okabe and Ito).
COLOURS: Final = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c959f")

_STYLE: Final = """
  text { font: 11px system-ui, sans-serif; fill: #1f2328; }
  .title { font-size: 12px; font-weight: 600; }
  .axis { stroke: #8c959f; stroke-width: 1; fill: none; }
  .grid { stroke: #8c959f; stroke-opacity: .3; stroke-width: 1; }
  @media (prefers-color-scheme: dark) { text { fill: #e6edf3; } }
"""


@dataclass(frozen=True)
class Panel:
    """One plot.

    Attributes:
        title: What it shows.
        x_label: Below it.
        y_label: Beside it.
        x: Positions of the points, or names of the groups of bars.
        lines: A value for each position, by name; None where there is none. What lies above `top` is cut off.
        bottom: Least value shown.
        top: Largest value shown.
        step: Between marks of the y axis.
        bars: Draw bars instead of lines.
    """

    title: str
    x_label: str
    y_label: str
    x: Sequence[float | str]
    lines: dict[str, Sequence[float | None]]
    bottom: float
    top: float
    step: float
    bars: bool = False


def draw(rows: Sequence[Sequence[Panel]], names: Sequence[str]) -> str:
    """An SVG document with rows of panels and a legend of `names`, which are the lines' in every panel."""
    width = _WIDTH * max(len(row) for row in rows)
    height = _HEIGHT * len(rows) + _LEGEND
    colours = dict(zip(names, COLOURS, strict=False))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        f"<style>{_STYLE}</style>",
    ]
    parts += _legend(names, colours, width)
    for down, row in enumerate(rows):
        for across, panel in enumerate(row):
            parts.append(f'<g transform="translate({across * _WIDTH},{down * _HEIGHT + _LEGEND})">')
            parts += _frame(panel)
            parts += _bars(panel, colours) if panel.bars else _lines(panel, colours)
            parts.append("</g>")
    return "\n".join([*parts, "</svg>", ""])


def _legend(names: Sequence[str], colours: dict[str, str], width: int) -> list[str]:
    parts = []
    columns = (len(names) + 1) // 2
    for place, name in enumerate(names):
        x, y = 14 + place % columns * (width - 20) // columns, 14 + place // columns * 18
        parts.append(f'<rect x="{x}" y="{y - 5}" width="18" height="4" fill="{colours[name]}"/>')
        parts.append(f'<text x="{x + 24}" y="{y + 1}">{escape(name)}</text>')
    return parts


def _y(panel: Panel, value: float) -> float:
    share = (value - panel.bottom) / (panel.top - panel.bottom)
    return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def _x(panel: Panel, place: int) -> float:
    """The middle of a position: by value for numbers, evenly for names."""
    inner = _WIDTH - _LEFT - _RIGHT
    if panel.bars:
        return _LEFT + (place + 0.5) * inner / len(panel.x)
    numbers = [float(each) for each in panel.x]
    return _LEFT + (numbers[place] - numbers[0]) / (numbers[-1] - numbers[0]) * inner


def _frame(panel: Panel) -> list[str]:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = [f'<text class="title" x="{_LEFT}" y="{_TOP - 14}">{escape(panel.title)}</text>']
    marks = round((panel.top - panel.bottom) / panel.step)
    for mark in range(marks + 1):
        value = panel.bottom + mark * panel.step
        y = _y(panel, value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    parts.append(f'<path class="axis" d="M{_LEFT} {_TOP}V{bottom}H{right}"/>')
    last = 0.0
    for place, value in enumerate(panel.x):
        x = _x(panel, place)
        if x - last >= _LABEL:
            last = x
            label = value if isinstance(value, str) else f"{value:g}"
            parts.append(f'<text x="{x:.1f}" y="{bottom + 14}" text-anchor="middle">{escape(label)}</text>')
    middle = (_LEFT + right) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(panel.x_label)}</text>')
    upright = f"rotate(-90 12 {(_TOP + bottom) / 2})"
    parts.append(
        f'<text transform="{upright}" x="12" y="{(_TOP + bottom) / 2}" text-anchor="middle">'
        f"{escape(panel.y_label)}</text>"
    )
    return parts


def _lines(panel: Panel, colours: dict[str, str]) -> list[str]:
    parts = []
    for name, values in panel.lines.items():
        for points in _pieces(panel, values):
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            thick = 2.5 if name == next(iter(colours)) else 1.6
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colours[name]}" stroke-width="{thick}"/>')
    return parts


def _pieces(panel: Panel, values: Sequence[float | None]) -> list[list[tuple[float, float]]]:
    """The parts of a line that are within the panel, up to its edge where it leaves."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for place, value in enumerate(values):
        if value is not None and value <= panel.top:
            before = values[place - 1] if place else None
            if not pieces[-1] and before is not None and before > panel.top:
                pieces[-1].append(_edge(panel, place, value, before))
            pieces[-1].append((_x(panel, place), _y(panel, value)))
        elif pieces[-1]:
            last = values[place - 1]
            if value is not None and last is not None:
                pieces[-1].append(_edge(panel, place, value, last))
            pieces.append([])
    return [piece for piece in pieces if len(piece) > 1]


def _edge(panel: Panel, place: int, value: float, before: float) -> tuple[float, float]:
    """Where the line from the position before `place` crosses the top."""
    share = (panel.top - before) / (value - before)
    left, right = _x(panel, place - 1), _x(panel, place)
    return left + share * (right - left), _y(panel, panel.top)


def _bars(panel: Panel, colours: dict[str, str]) -> list[str]:
    parts = []
    wide = (_WIDTH - _LEFT - _RIGHT) / len(panel.x) * 0.8 / len(panel.lines)
    for number, (name, values) in enumerate(panel.lines.items()):
        for place, value in enumerate(values):
            if value is not None:
                x = _x(panel, place) + (number - len(panel.lines) / 2) * wide
                y = _y(panel, min(value, panel.top))
                parts.append(
                    f'<rect x="{x:.1f}" y="{y:.1f}" width="{wide * 0.92:.1f}" '
                    f'height="{_HEIGHT - _BOTTOM - y:.1f}" fill="{colours[name]}"/>'
                )
    return parts
