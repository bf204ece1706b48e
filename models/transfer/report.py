"""A page that says what was learned and how well: figures beside those of the baselines, curves and confusions as
pictures. Markdown for the card, HTML with the pictures inside for people."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from models.transfer.evaluate import Scores

# More classes than that do not fit into a picture; the table has them all.
MOST_SHOWN = 40

_STYLE = (
    "body{font:16px sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
    "td,th{padding:.2em .8em;text-align:left}table{border-collapse:collapse}tr{border-bottom:1px solid #ddd}"
    "img{max-width:100%}"
)


def markdown(name: str, scores: Sequence[Scores], classes: Sequence[str], notes: Sequence[str]) -> str:
    """The report as text. The first of `scores` is the head, the others are what it is compared with."""
    ours = scores[0]
    lines = [
        f"# {name}: report",
        "",
        f"{len(ours.truth)} test examples that were not trained on, {len(classes)} classes.",
    ]
    lines += ["", "| | accuracy | macro F1 | log loss | calibration error |", "| --- | --- | --- | --- | --- |"]
    for one in scores:
        loss, error = one.log_loss, one.calibration_error
        cells = (
            f"{one.accuracy:.1%} ± {one.interval:.1%}",
            f"{one.macro_f1:.3f}",
            "" if loss is None else f"{loss:.3f}",
            "" if error is None else f"{error:.3f}",
        )
        lines.append(f"| {one.name} | {' | '.join(cells)} |")
    lines += ["", "± is half of a 95 % interval.", "", *(f"- {note}" for note in notes), ""]
    lines += ["| class | precision | recall | F1 | test examples |", "| --- | --- | --- | --- | --- |"]
    for label, (precision, recall, f1, count) in zip(classes, ours.per_class(), strict=True):
        lines.append(f"| {label} | {precision:.3f} | {recall:.3f} | {f1:.3f} | {count} |")
    return "\n".join(lines) + "\n"


def page(name: str, text: str, pictures: Sequence[tuple[str, bytes]]) -> str:
    """The report as one HTML file."""
    body = _as_html(text)
    for title, content in pictures:
        data = base64.b64encode(content).decode()
        body += f'<h2>{html.escape(title)}</h2>\n<img src="data:image/png;base64,{data}" alt="{html.escape(title)}">\n'
    head = f'<meta charset="utf-8"><title>{html.escape(name)}</title>\n<style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en">{head}\n{body}</html>\n'


def _as_html(text: str) -> str:
    out: list[str] = []
    table = False
    for line in text.splitlines():
        cells = [html.escape(cell.strip()) for cell in line.strip("|").split("|")]
        if line.startswith("|") and not set(line) <= set("|- "):
            out.append(("" if table else "<table>") + "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
            table = True
            continue
        if line.startswith("|"):
            continue
        if table:
            out.append("</table>")
            table = False
        if line.startswith("# "):
            out.append(f"<h1>{html.escape(line[2:])}</h1>")
        elif line:
            out.append(f"<p>{html.escape(line.removeprefix('- '))}</p>")
    return "\n".join([*out, "</table>" if table else ""])


def pictures(scores: Sequence[Scores], classes: Sequence[str]) -> list[tuple[str, bytes]]:
    """Confusions, reliability, and precision over recall, as PNG."""
    ours = scores[0]
    made = [("Accuracy beside the baselines", _bars(scores))]
    if len(classes) <= MOST_SHOWN:
        made.append(("Confusion: truth in rows, answers in columns", _confusion(ours, classes)))
    made.append(("Reliability: how often what was said with that probability was right", _reliability(scores)))
    if ours.probabilities is not None and len(classes) <= MOST_SHOWN:
        made.append(("Precision over recall, for each class", _precision_recall(ours, classes)))
    return made


def _figure(width: float, height: float):  # type: ignore[no-untyped-def]
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _png(figure) -> bytes:  # type: ignore[no-untyped-def]
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return content.getvalue()


def _bars(scores: Sequence[Scores]) -> bytes:
    figure, axes = _figure(8, 1 + 0.6 * len(scores))
    names = [_short(one.name) for one in scores]
    axes.barh(names, [one.accuracy for one in scores], xerr=[one.interval for one in scores], color="#4477aa")
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("accuracy")
    return _png(figure)


def _short(name: str) -> str:
    return name if len(name) <= 48 else f"{name[:45]}..."


def _confusion(scores: Scores, classes: Sequence[str]) -> bytes:
    matrix = scores.confusion[:, : len(classes)]
    size = 2 + 0.42 * len(classes)
    figure, axes = _figure(size + 1, size)
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(classes)), classes, rotation=90)
    axes.set_yticks(range(len(classes)), classes)
    for row, column in np.argwhere(matrix):
        colour = "white" if share[row, column] > 0.5 else "black"
        axes.text(column, row, str(matrix[row, column]), ha="center", va="center", color=colour, fontsize=8)
    return _png(figure)


def _reliability(scores: Sequence[Scores]) -> bytes:
    figure, axes = _figure(6, 5)
    axes.plot([0, 1], [0, 1], color="#bbbbbb")
    for one in scores:
        curve = one.reliability()
        if curve:
            axes.plot([sure for sure, _, _ in curve], [right for _, right, _ in curve], "o-", label=_short(one.name))
    axes.set_xlabel("probability said")
    axes.set_ylabel("how often right")
    axes.legend()
    return _png(figure)


def _precision_recall(scores: Scores, classes: Sequence[str]) -> bytes:
    from sklearn.metrics import precision_recall_curve

    assert scores.probabilities is not None
    figure, axes = _figure(7, 5)
    for label, name in enumerate(classes):
        mine = scores.truth == label
        if mine.any():
            precision, recall, _ = precision_recall_curve(mine, scores.probabilities[:, label])
            axes.plot(recall, precision, label=name)
    axes.set_xlabel("recall")
    axes.set_ylabel("precision")
    axes.legend(fontsize=7, ncols=2)
    return _png(figure)


def write(directory: Path, name: str, text: str, images: Sequence[tuple[str, bytes]]) -> Path:
    """`report.md`, `report.html` and the pictures; returns the page. Raises `OSError`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "report.md").write_text(text, encoding="utf-8")
    for number, (_, content) in enumerate(images, 1):
        (directory / f"picture-{number}.png").write_bytes(content)
    target = directory / "report.html"
    target.write_text(page(name, text, images), encoding="utf-8")
    return target
