"""A run's folder -> one self-contained HTML page, which opens offline: `python launch/report.py OUT`.

`page.py` puts the page together, `run_folder_data.py` reads a folder, `rows.py` its JSONL files. The browser draws
it by `assets/`: report.js the sections, charts.js the curves (with uPlot 1.6.32, bundled), texts.js samples and tokens.
"""

from engine.report.page import report_page, write_report

__all__ = ["report_page", "write_report"]
