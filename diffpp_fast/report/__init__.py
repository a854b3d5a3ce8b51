"""Floor 6: what runs have logged, as one page."""

from diffpp_fast.report.drawing import check_drawing
from diffpp_fast.report.runs import find_runs, is_run
from diffpp_fast.report.write import refuse_foreign_report, write_report

__all__ = ["check_drawing", "find_runs", "is_run", "refuse_foreign_report", "write_report"]
