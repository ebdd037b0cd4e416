from .journal import Journal as Journal, last_logged_step as last_logged_step
from .page import write_report_files as write_report_files
from .pictures import draw_sheet as draw_sheet
from .profile import Profiler as Profiler
from .progress import Record as Record, create_console as create_console
from .results import (
    evaluation_report as evaluation_report,
    print_header as print_header,
    print_summary as print_summary,
    write_results as write_results,
)
from .trackers import Log as Log
