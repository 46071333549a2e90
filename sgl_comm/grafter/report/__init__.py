"""What grafters write in a run, and how it is read, merged over the ranks and shown."""

from sgl_comm.grafter.report.data import DEFAULT_THRESHOLD, Row
from sgl_comm.grafter.report.report import Report
from sgl_comm.grafter.report.writer import ReportWriter

__all__ = ["DEFAULT_THRESHOLD", "Report", "ReportWriter", "Row"]
