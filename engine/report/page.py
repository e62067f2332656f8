"""The page: a template, our scripts and styles, the plotting library, and the runs' numbers as JSON."""

import json
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from engine.report.run_folder_data import run_folder_data


def write_report(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Write the page of a run, or of several that are compared.

    Args:
        output: the HTML file; `report.html` in the first folder when not given.

    Returns:
        Where it is.

    Raises:
        ValueError: one of them is not a folder, or `output` cannot be written.
    """
    folders = [Path(folder) for folder in folders]
    output = folders[0] / "report.html" if output is None else Path(output)
    page = report_page(folders)
    half_done = output.with_name(output.name + ".partial")
    try:
        half_done.write_text(page, encoding="utf-8", errors="replace")  # texts may hold halves of surrogate pairs
        half_done.replace(output)
    except OSError as error:
        with suppress(OSError):
            half_done.unlink()
        raise ValueError(f"The report {output} cannot be written: {error.strerror}. Name another --output.") from error
    return output


def report_page(folders: Sequence[Path]) -> str:
    """The HTML of the page.

    Raises:
        ValueError: one of them is not a folder.
    """
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder; give the --output_dir of a run.")
    names = run_names(folders)
    data = {
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "runs": [run_folder_data(folder, name) for folder, name in zip(folders, names, strict=True)],
    }
    assets = files("engine.report") / "assets"
    texts = {path.name: path.read_text(encoding="utf-8") for path in assets.iterdir()}
    return Template(texts["page.html"]).substitute(
        title=escape(f"Report: {', '.join(names)}"),
        styles=texts["uPlot.min.css"] + texts["report.css"],
        library=f"/*\n{texts['uPlot.LICENSE']}*/\n{texts['uPlot.iife.min.js']}",
        data=embedded(data),
        scripts="\n".join(texts[name] for name in ("elements.js", "charts.js", "texts.js", "report.js")),
    )


def run_names(folders: Sequence[Path]) -> list[str]:
    """The ends of the folders' paths, as long as it takes to tell them apart; numbered if a folder is given twice."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-length:]) for path in parts]
        if len(set(names)) == len(set(parts)):
            break
    seen: dict[str, int] = {}
    for name in names:
        seen[name] = seen.get(name, 0) + 1
    return names if max(seen.values()) == 1 else [f"{name} ({number})" for number, name in enumerate(names, 1)]


def embedded(data: Any) -> str:
    """JSON that may stand in a <script>: no character of it can end the element or open a comment."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
