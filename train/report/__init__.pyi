from .journal import Journal as Journal, last_logged_step as last_logged_step
from .meter import Record as Record
from .page import write_report_files as write_report_files
from .pictures import draw as draw, paint_sheet as paint_sheet
from .profile import Profiler as Profiler
from .progress import create_console as create_console
from .results import (
    evaluation_report as evaluation_report,
    write_results as write_results,
)
from .summary import print_header as print_header, print_summary as print_summary
from .trackers import Log as Log
