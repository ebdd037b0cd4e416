"""Everything that a run reports: the screen, metrics, pictures, traces and results."""

from typing import TYPE_CHECKING

from poolformer_jax.lazy import lazy_names

if TYPE_CHECKING:
    from train.report.journal import Journal as Journal
    from train.report.journal import last_logged_step as last_logged_step
    from train.report.pictures import draw_confusion as draw_confusion
    from train.report.profile import Profiler as Profiler
    from train.report.progress import Record as Record
    from train.report.progress import create_console as create_console
    from train.report.results import evaluation_report as evaluation_report
    from train.report.results import print_header as print_header
    from train.report.results import print_summary as print_summary
    from train.report.results import write_results as write_results

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "journal": "Journal last_logged_step",
        "pictures": "draw_confusion",
        "profile": "Profiler",
        "progress": "Record create_console",
        "results": "evaluation_report print_header print_summary write_results",
    },
)
