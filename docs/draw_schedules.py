"""Draws docs/schedules.svg: where the weights are in each schedule.

The positions are those of `zo_fused.step.schedule`, so the picture can't say anything else.
"""

from __future__ import annotations

from pathlib import Path

from zo_fused.step.schedule import Position, Schedule

WIDTH, HEIGHT, LEVEL, PACE, LEFT = 760, 150, 38, 62, 120
PANELS = [
    ("plain", Schedule()),
    ("one_sided", Schedule(one_sided=True)),
    ("deferred", Schedule(deferred=True)),
    ("one_sided, deferred", Schedule(one_sided=True, deferred=True)),
    ("queries=2", Schedule(queries=2)),
]
BLUE, RED, GREY = "#2563eb", "#dc2626", "#9ca3af"


def text(x: float, y: float, words: str, color: str = "#374151", anchor: str = "start") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" fill="{color}" text-anchor="{anchor}">{words}</text>'


def line(x1: float, y1: float, x2: float, y2: float, color: str, extra: str = "") -> str:
    return (
        f'<line x1="{x1:.0f}" y1="{y1:.0f}" x2="{x2:.0f}" y2="{y2:.0f}" stroke="{color}" {extra}/>'
    )


def panel(top: float, name: str, schedule: Schedule) -> list[str]:
    """Two steps: the place of the weights over time, dots for losses, arrows for sweeps."""
    middle = top + HEIGHT / 2 + 8
    level = {sign: middle - sign * LEVEL for sign in (1.0, 0.0, -1.0)}
    parts = [text(8, top + 22, name, "#111827")]
    for sign, words in ((1.0, "theta + eps z"), (0.0, "theta"), (-1.0, "theta - eps z")):
        parts.append(line(LEFT, level[sign], WIDTH - 10, level[sign], "#e5e7eb"))
        parts.append(text(LEFT - 8, level[sign] + 4, words, GREY, "end"))
    at = Position(1.0) if schedule.deferred else Position(0.0)
    x, sweeps = LEFT + 14.0, 0

    def move(to: Position, color: str) -> None:
        nonlocal at, x, sweeps
        there = (to.sign, to.query) == (at.sign, at.query) or to.sign == at.sign == 0
        if not there or color == RED:
            y1, y2 = level[at.sign], level[to.sign]
            parts.append(line(x, y1, x, y2, color, 'stroke-width="2" marker-end="url(#tip)"'))
            sweeps += 1
        at = to
        parts.append(line(x, level[at.sign], x + PACE * 0.9, level[at.sign], "#111827"))
        x += PACE * 0.9

    for step in range(2):
        for position in schedule.positions(schedule.count([0])):
            move(position, BLUE)
            words = "L" if schedule.queries == 1 else f"L{position.query + 1}"
            middle_x = x - PACE * 0.45
            parts.append(f'<circle cx="{middle_x:.0f}" cy="{level[at.sign]:.0f}" r="4"/>')
            parts.append(text(middle_x, level[at.sign] - 8, words, "#111827", "middle"))
        move(Position(1.0) if schedule.deferred else Position(0.0), RED)
        if step == 0:
            gap = x - PACE * 0.45
            parts.append(line(gap, top + 26, gap, top + HEIGHT - 8, GREY, 'stroke-dasharray="3 4"'))
    parts.append(text(WIDTH - 10, top + 22, f"{sweeps // 2} sweeps a step", "#111827", "end"))
    return parts


def draw() -> str:
    """The picture, as SVG."""
    parts = [part for i, (name, s) in enumerate(PANELS) for part in panel(i * HEIGHT, name, s)]
    height = len(PANELS) * HEIGHT
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="12">\n'
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" '
        'markerHeight="6" orient="auto"><path d="M0 0L8 4L0 8z" fill="context-stroke"/></marker>'
        f'</defs>\n<rect width="{WIDTH}" height="{height}" fill="white"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


if __name__ == "__main__":
    Path(__file__).with_name("schedules.svg").write_text(draw())
