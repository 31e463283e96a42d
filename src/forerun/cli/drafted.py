"""A picture (SVG) of a text as it was generated: every token in the colour of who thought of it, and the table beneath.

It brings its own background, so that it is legible on light and dark pages. Every token is pinned to its place, so that
it is drawn alike with any font.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from rich.cells import cell_len

from forerun.bench.run import Summary
from forerun.cli.ink import OWN, Ink

WIDTH, MARGIN = 880, 36
CELL, LINE, SIZE = 8.4, 22, 14
"""Width of a character, height of a line, size of the letters."""
COLUMNS = int((WIDTH - 2 * MARGIN) / CELL)
ROW, BAR_AT, BAR, LONG_BAR = 28, 320, 190, 310
"""Height of a row of the table; where bars begin, and the longest, with or without a clock beside them."""
CARD, EDGE, WORDS, QUIET = "#fdfcf9", "#d9d5cb", "#24292f", "#77736a"
BEST, GAIN, PLAIN, LOSS = "#2c8a4b", "#8cc79c", "#b9b5ab", "#d0503c"
MONO, SANS = "m", "s"
FONTS = {
    MONO: "ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono','Liberation Mono',monospace",
    SANS: "system-ui,-apple-system,'Segoe UI',Helvetica,Arial,'DejaVu Sans',sans-serif",
}


@dataclass(frozen=True)
class Drafted:
    """What to draw. prompt: the last lines before the text. words: the text of every token, and who thought of it.

    account: what the text cost, in one line. rows: the table; is_clocked: whether seconds were measured. footer: lines
    about how, and on which machine.
    """

    title: str
    account: str
    prompt: Sequence[str]
    words: Sequence[tuple[str, str]]
    rows: Sequence[Summary]
    is_clocked: bool
    footer: Sequence[str]


@dataclass(frozen=True)
class Block:
    """A token's part on one line, in cells from the left and lines from the top. is_end: the line ends with it."""

    column: int
    line: int
    text: str
    origin: str
    is_end: bool = False

    @property
    def cells(self) -> int:
        return cell_len(self.text) + self.is_end


def blocks(words: Sequence[tuple[str, str]], columns: int = COLUMNS) -> list[Block]:
    """Where every token stands: lines end where the text says so, or where they are full."""
    found, column, line = [], 0, 0
    for word, origin in words:
        for part in word.replace("\t", "    ").splitlines(keepends=True):
            rest = part.rstrip("\r\n")
            is_end = rest != part
            while cell_len(rest) > columns - column:
                taken, rest = _fitting(rest, columns - column)
                if taken:
                    found.append(Block(column, line, taken, origin))
                column, line = 0, line + 1
            found.append(Block(column, line, rest, origin, is_end))
            column, line = (0, line + 1) if is_end else (column + cell_len(rest), line)
    return found


def _fitting(text: str, room: int) -> tuple[str, str]:
    """The beginning that has at most so many cells, and the rest."""
    cut = 0
    while cell_len(text[: cut + 1]) <= room:
        cut += 1
    return text[:cut], text[cut:]


def svg(picture: Drafted) -> str:
    """The file. A few dozen kilobytes for a hundred tokens."""
    ink, parts, y = Ink(), [], MARGIN + 14.0
    parts.append(_text(MARGIN, y, picture.title, SANS, 19, WORDS, weight=600))
    parts.append(_text(MARGIN, y + 22, picture.account, SANS, 13, QUIET))
    y += 44
    for line in picture.prompt:
        parts.append(_cells(MARGIN, y + LINE / 2 + 5, line.expandtabs(4)[:COLUMNS], QUIET))
        y += LINE
    placed = blocks(picture.words)
    parts += [_token(block, y, ink) for block in placed]
    y += LINE * (1 + max((block.line for block in placed if block.text.strip() or block.origin), default=0)) + 20
    legend, y = _legend(ink, y)
    table, y = _table(picture, y + 14)
    footer = [_text(MARGIN, y + 24 + 17 * n, line, SANS, 11.5, QUIET) for n, line in enumerate(picture.footer)]
    height = round(y + 17 * len(footer) + MARGIN)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"'
        f' role="img" aria-label="{escape(picture.title)}">'
        f"<style>.{MONO}{{font-family:{FONTS[MONO]}}}.{SANS}{{font-family:{FONTS[SANS]}}}</style>"
        f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="12" fill="{CARD}" stroke="{EDGE}"/>'
    )
    return "\n".join([head, *parts, *legend, *table, *footer, "</svg>\n"])


def _token(block: Block, top: float, ink: Ink) -> str:
    x, y = MARGIN + CELL * block.column, top + LINE * block.line
    paper = ink.paper(block.origin)
    drawn = ""
    if paper and block.cells:
        drawn = f'<rect x="{x:.1f}" y="{y + 1:.1f}" width="{CELL * block.cells - 1:.1f}" height="{LINE - 3}" rx="3"'
        drawn += f' fill="{paper}"/>'
    if block.text.strip():
        drawn += _cells(x, y + LINE / 2 + 4.5, block.text, WORDS)
    if block.is_end and paper:
        drawn += _text(x + CELL * (block.cells - 0.5) - 0.5, y + LINE / 2 + 4, "↵", MONO, 10, QUIET, anchor="middle")
    return drawn


def _legend(ink: Ink, y: float) -> tuple[list[str], float]:
    """The prompt and the target's own words have no background."""
    parts, x = [], float(MARGIN)
    for label, colour in (("the prompt", QUIET), (OWN, WORDS)):
        parts.append(_text(x, y + 15, label, SANS, 13, colour))
        x += 6.6 * len(label) + 18
    for label, paper in ink.legend():
        width = 7.0 * len(label) + 20
        if x + width > WIDTH - MARGIN:
            x, y = MARGIN, y + 28
        parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="22" rx="4" fill="{paper}"/>')
        parts.append(_text(x + width / 2, y + 15, label, SANS, 13, WORDS, anchor="middle"))
        x += width + 10
    return parts, y + 28


def _table(picture: Drafted, y: float) -> tuple[list[str], float]:
    """Bars say how many times plain, or without a clock how many tokens a step made."""
    rows, right = picture.rows, WIDTH - MARGIN
    parts = [f'<line x1="{MARGIN}" x2="{right}" y1="{y}" y2="{y}" stroke="{EDGE}"/>']
    heads = [
        ("drafter", MARGIN, "start"),
        ("times plain" if picture.is_clocked else "tokens per step", BAR_AT, "start"),
    ]
    if picture.is_clocked:
        heads += [("tokens per s", right - 190, "end"), ("tokens per step", right - 80, "end")]
    heads.append(("identical", right, "end"))
    parts += [_text(x, y + 20, head, SANS, 11.5, QUIET, anchor=anchor) for head, x, anchor in heads]
    y += 28
    values = [row.speedup if picture.is_clocked else row.tokens_per_step for row in rows]
    unit = (BAR if picture.is_clocked else LONG_BAR) / max(values)
    for row, value in zip(rows, values, strict=True):
        parts += _row(picture, row, Bar(value, unit, value == max(values)), y)
        y += ROW
    x = BAR_AT + unit
    parts.append(
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y - ROW * len(rows):.1f}" y2="{y:.1f}" stroke="{QUIET}"'
        ' stroke-dasharray="2 3"/>'
    )
    return parts, y


@dataclass(frozen=True)
class Bar:
    """A figure, the length of one unit of it, and whether it is the largest."""

    value: float
    unit: float
    is_best: bool


def _row(picture: Drafted, row: Summary, bar: Bar, y: float) -> Iterator[str]:
    right, middle = WIDTH - MARGIN, y + ROW / 2 + 4.5
    is_plain = row is picture.rows[0]
    colour = PLAIN if is_plain else LOSS if bar.value < 1 else BEST if bar.is_best else GAIN
    words = colour if colour in (BEST, LOSS) else WORDS
    unit = "x" if picture.is_clocked else ""
    length = bar.unit * bar.value
    yield _text(MARGIN, middle, "plain" if is_plain else _short(row.drafter), SANS, 13.5, WORDS)
    yield f'<rect x="{BAR_AT}" y="{y + 7:.1f}" width="{length:.1f}" height="{ROW - 14}" rx="3" fill="{colour}"/>'
    yield _text(BAR_AT + max(length, bar.unit) + 8, middle, f"{bar.value:.2f}{unit}", SANS, 13.5, words, weight=600)
    if picture.is_clocked:
        yield _text(right - 190, middle, f"{row.tokens_per_second:,.0f}", SANS, 13.5, WORDS, anchor="end")
        yield _text(right - 80, middle, f"{row.tokens_per_step:.2f}", SANS, 13.5, WORDS, anchor="end")
    same = "-" if is_plain or row.identical is None else "✓ yes" if row.identical else "no"
    yield _text(right, middle, same, SANS, 13.5, LOSS if same == "no" else WORDS, anchor="end")


def _short(name: str, most: int = 38) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _cells(x: float, y: float, text: str, colour: str) -> str:
    """Code at its place; blanks around it need no letters."""
    bare = text.strip()
    x += CELL * cell_len(text[: len(text) - len(text.lstrip())])
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" class="{MONO}" font-size="{SIZE}" fill="{colour}" xml:space="preserve"'
        f' textLength="{CELL * cell_len(bare):.1f}" lengthAdjust="spacingAndGlyphs">{_plain(bare)}</text>'
    )


def _text(
    x: float, y: float, text: str, font: str, size: float, colour: str, anchor: str = "start", weight: int = 400
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" class="{font}" font-size="{size}" fill="{colour}"'
        f' text-anchor="{anchor}" font-weight="{weight}">{_plain(text)}</text>'
    )


def _plain(text: str) -> str:
    """No control characters, which XML has none for."""
    return escape("".join(letter if letter.isprintable() else "·" for letter in text))
