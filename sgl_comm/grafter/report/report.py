"""``Report``: a run's report in every format."""

from __future__ import annotations

from pathlib import Path

from sgl_comm.errors import SglCommError
from sgl_comm.grafter.report import plot
from sgl_comm.grafter.report.data import ReportData
from sgl_comm.grafter.report.html import html
from sgl_comm.grafter.report.markdown import markdown
from sgl_comm.grafter.report.text import text


class Report(ReportData):
    """What the ranks of both sides have written in a run, as one table. Made by ``read``."""

    def text(self) -> str:
        """For a terminal; lines that are no rows begin with "#"."""
        return text(self)

    def markdown(self) -> str:
        """As Markdown, with tables as GitHub has them."""
        return markdown(self)

    def html(self) -> str:
        """As one page that needs no other file; with the plot, or why there is none."""
        try:
            image = plot.png(self, dpi=200)
        except SglCommError as error:
            return html(self, None, str(error))
        return html(self, image)

    def draw(self, path: str | Path) -> None:
        """Writes the plot: the errors in order, and by layer (and step) where tensors have such tags.

        Args:
            path: ends in .png or .svg.

        Raises:
            SglCommError: another suffix, or matplotlib is not installed.
            OSError: the file cannot be written.
        """
        plot.draw(self, path)
