"""The grafter's report: what it makes of the ranks' files, its forms, and ``python -m sgl_comm graft-report``."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from helpers.graft_files import EQUAL, EVIL, errors, header, write, write_model, writer_of
from sgl_comm.__main__ import main
from sgl_comm.errors import SglCommError
from sgl_comm.grafter.compare import Comparison
from sgl_comm.grafter.report import Report


def rows_of(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if not line.startswith("#")]


def append(file: Path, *lines: str | bytes) -> None:
    with file.open("ab") as out:
        out.writelines(line if isinstance(line, bytes) else line.encode() + b"\n" for line in lines)


def test_rows_are_merged_over_the_receiving_ranks(tmp_path: Path) -> None:
    theirs = [
        Comparison(8, 1, 0.9, 1e-5, 0.5, 7, (1, 1), (0, 0)),
        Comparison(6, 2, 0.8, 1e-6, 0.75, 3, (2, 2), (1, 1)),
    ]
    for rank, comparison in enumerate(theirs):
        sends, receives = (writer_of(tmp_path, role, rank, 2) for role in ("baseline", "target"))
        sends.exchange(header(4, "x", layer=1), None, "sent", 32, 0.001)
        receives.exchange(header(4, "x", layer=1), comparison, "received", 32, 0.001)
        sends.close()
        receives.close()
    report = Report.read(tmp_path)
    (row,) = report.rows
    assert (row.sequence, row.direction, row.name, row.tags, row.dtype) == (4, "b2t", "x", {"layer": 1}, "float32")
    assert (row.outcomes, row.ranks) == (("received",), (0, 1))
    assert row.comparison == Comparison(14, 3, 0.8, 1e-5, 0.75, 7, (3, 3), (1, 1))
    assert not row.diverges
    assert report.counts == {"baseline": {"sent": 2}, "target": {"received": 2}}
    assert report.notes == ()
    assert report.settings["target"] == "ranks 0-1, mode graft, backend gloo, b2t_filter True"
    assert not report.failed


@pytest.mark.parametrize("order", [1, -1])
def test_a_nan_of_one_rank_stays(tmp_path: Path, order: int) -> None:
    for rank, value in enumerate([math.nan, 0.5][::order]):
        receives = writer_of(tmp_path, "target", rank, 2)
        receives.exchange(header(0, "x"), errors(value, cosine=value, max_abs=value), "received", 32, 0.001)
    (row,) = Report.read(tmp_path, threshold=1.0).rows
    assert row.comparison is not None
    assert all(math.isnan(value) for value in (row.comparison.rel_l2, row.comparison.cosine, row.comparison.max_abs))
    assert row.diverges


@pytest.mark.parametrize(
    ("comparison", "diverges"),
    [
        (EQUAL, False),
        (errors(1e-3), False),
        (errors(1.001e-3), True),
        (errors(math.inf), True),
        (errors(math.nan), True),
        (errors(0.0, nan=(1, 1)), False),
        (errors(0.0, nan=(1, 0)), True),
        (errors(0.0, inf=(2, 2)), False),
        (errors(0.0, inf=(0, 2)), True),
        (errors(0.0, max_ulp=None), False),
    ],
)
def test_what_diverges(tmp_path: Path, comparison: Comparison, diverges: bool) -> None:
    write(tmp_path, [(header(0, "x"), comparison)])
    report = Report.read(tmp_path, threshold=1e-3)
    assert report.rows[0].diverges is diverges
    assert report.rows[0].comparison is not None
    assert str(report.rows[0].comparison) == str(comparison), "infinities and NaN come through"
    assert (report.first is not None) is diverges
    assert report.failed is diverges


def test_nans_that_only_add_up_diverge(tmp_path: Path) -> None:
    for rank, nan in enumerate([(1, 0), (0, 1)]):
        writer_of(tmp_path, "target", rank, 2).exchange(header(0, "x"), errors(0.0, nan=nan), "observed", 32, 0.001)
    report = Report.read(tmp_path)
    assert report.rows[0].comparison is not None
    assert report.rows[0].comparison.nan == (1, 1)
    assert report.first is report.rows[0]
    assert "on other ranks in theirs than in ours" in report.text()


def test_rows_are_in_order_and_told_apart(tmp_path: Path) -> None:
    found = [
        (header(11, "a"), EQUAL), (header(2, "b", layer=1), errors(0.5)), (header(2, "b", layer=0), EQUAL),
        (header(1, "c"), EQUAL),
    ]  # fmt: skip
    write(tmp_path, found)
    receives = writer_of(tmp_path, "baseline", 1, 2)
    receives.exchange(header(2, "b", "t2b", layer=0), errors(0.25), "received", 32, 0.001)
    report = Report.read(tmp_path)
    assert [(row.sequence, row.direction, row.name, row.tags) for row in report.rows] == [
        (1, "b2t", "c", {}), (2, "b2t", "b", {"layer": 0}), (2, "b2t", "b", {"layer": 1}),
        (2, "t2b", "b", {"layer": 0}), (11, "b2t", "a", {}),
    ]  # fmt: skip
    assert report.first is report.rows[2]


def test_senders_alone_skipped_ones_and_faults(tmp_path: Path) -> None:
    sends, receives = (writer_of(tmp_path, role) for role in ("baseline", "target"))
    sends.exchange(header(0, "alone"), None, "sent", 32, 0.001)
    for side in (sends, receives):
        side.exchange(header(1, "other"), None, "skipped", 32, 0.001, "got dtype float32 and float16")
        side.fault(header(2, "gone", step=7), f"{side._config.role} says\nno")
        side.close()
    report = Report.read(tmp_path)
    alone, skipped = report.rows
    assert (alone.outcomes, alone.ranks, alone.comparison, alone.diverges) == (("sent",), (0,), None, False)
    assert (skipped.outcomes, skipped.why) == (("skipped",), "got dtype float32 and float16")
    assert [(fault.role, fault.rank, fault.sequence, fault.name, fault.text) for fault in report.faults] == [
        ("baseline", 0, 2, "gone", "baseline says no"), ("target", 0, 2, "gone", "target says no"),
    ]  # fmt: skip
    assert report.first is None
    assert report.failed, "a fault is one"

    text = report.text()
    assert rows_of(text)[0] == ["0", "b2t", "alone", "-", "float32", "sent", "0", *["-"] * 8]
    assert rows_of(text)[1][:7] == ["1", "b2t", "other", "-", "float32", "skipped", "0"]
    assert rows_of(text)[1][15:] == ["got", "dtype", "float32", "and", "float16"]
    assert "#   target rank 0, #2 b2t gone step=7: target says no" in text.splitlines()
    assert text.splitlines()[-1] == "# nothing was compared; 2 faults"
    assert "| target | 0 | 2 | `gone` | `step=7` | `target says no` |" in report.markdown().splitlines()
    assert '<td class="fault">target says no</td>' in report.html()


def test_faults_are_known_by_the_summary_too(tmp_path: Path) -> None:
    write(tmp_path, [(header(0, "x"), EQUAL)])
    file = tmp_path / "graft-target-0.jsonl"
    file.write_text(file.read_text().replace('"counts": {', '"counts": {"faults": 2, "lines lost": 2, '))
    report = Report.read(tmp_path)
    assert report.failed
    assert report.text().splitlines()[-1].endswith("; 2 faults")
    assert report.notes == ("target rank 0 could not write all of its lines (2 lost)",)


def test_the_forms_mark_the_first_divergence(tmp_path: Path) -> None:
    write_model(tmp_path)
    report = Report.read(tmp_path)
    assert report.first is report.rows[3]

    text = report.text()
    lines = text.splitlines()
    assert [line.split()[:2] for line in lines if line.startswith(">>")] == [[">>", "3"]]
    assert [int(line.split()[1]) for line in lines if line.startswith("*")] == [4, 5, 9, 10, 11, 15, 16, 17]
    assert rows_of(text)[3] == [
        ">>", "3", "b2t", "layers.3.mlp", "layer=3,step=0", "float32", "received", "0-1", "0.03", "1.000000", "0", "0",
        "6", "16", "0/0", "0/0",
    ]  # fmt: skip
    heads = next(line for line in lines if line.startswith("#  seq"))
    row = next(line for line in lines if line.startswith(">>"))
    for heading, cell in (("rel_l2", "0.03"), ("differing", "6"), ("numel", "16"), ("inf", "0/0")):
        end = re.search(rf"\b{heading}\b", heads)
        assert end is not None
        assert row[: end.end()].endswith(f" {cell}"), "columns are aligned"
    assert lines[-1] == (
        "# first divergence: #3 b2t layers.3.mlp layer=3,step=0: rel_l2 0.03, threshold 0.0001; 9 of 18 tensors diverge"
    )
    assert "# baseline: sent 36" in lines
    assert "# target: received 36" in lines

    markdown = report.markdown().splitlines()
    assert sum("**first**" in line for line in markdown) == 1
    assert sum(line.startswith("| diverges |") for line in markdown) == 8
    assert "| **first** | 3 | b2t | `layers.3.mlp` | `layer=3,step=0` | float32 | received | 0-1 | 0.03 |" in (
        next(line for line in markdown if "**first**" in line)
    )
    table = [line for line in markdown if line.startswith("|")]
    assert len(table) == 2 + 18
    assert {len(line.split("|")) for line in table} == {19}

    page = report.html()
    assert page.count('<tr id="first" class="diverges first">') == 1
    assert page.count('<tr class="diverges">') == 8
    assert "<td>layers.3.mlp</td>" in page.split('id="first"')[1].split("</tr>")[0]
    assert '<a href="#first">first divergence: #3 b2t layers.3.mlp' in page


def test_without_divergence(tmp_path: Path) -> None:
    write_model(tmp_path, bad_from=6)
    report = Report.read(tmp_path)
    assert report.first is None
    assert not report.failed
    assert report.text().splitlines()[-1] == "# no divergence: rel_l2 is at most 0.0001 in 18 tensors"
    assert ">>" not in report.text()
    assert "**first**" not in report.markdown()
    assert 'id="first"' not in report.html()
    assert 'class="verdict"' in report.html()
    tighter = Report.read(tmp_path, threshold=0.0)
    assert tighter.first is tighter.rows[1], "equal tensors do not diverge from a threshold of 0"


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    write_model(tmp_path)
    tags: list[tuple[str, dict[str, str | None]]] = []

    class Collect(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            tags.append((tag, dict(attributes)))

    Collect().feed(Report.read(tmp_path).html())
    names = {name for name, _ in tags}
    assert {"html", "style", "table"} <= names
    assert not names & {"script", "link", "iframe", "object"}
    links = [value for _, attributes in tags for name, value in attributes.items() if name in ("src", "href")]
    assert all(link is not None and link.startswith(("data:image/png;base64,", "#first")) for link in links)


def test_hostile_texts_are_escaped(tmp_path: Path) -> None:
    folder = tmp_path / "<script>"
    write(folder, [(header(0, EVIL, **{EVIL: EVIL, "layer": EVIL, "step": 1}), errors(1.0))])
    receives = writer_of(folder, "target", 1)
    receives.fault(header(1, EVIL), EVIL)
    append(receives.path, exchange_line(name="\ud800", outcome=EVIL, dtype="a|b"), exchange_line(name="$a^$"))
    (folder / "graft-<script>|.jsonl").touch()
    report = Report.read(folder)
    assert len(report.rows) == 3

    page = report.html()
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;|`x`\\x1b[31m") >= 4
    for form in (report.text(), report.markdown(), page):
        assert "\x1b" not in form
        form.encode()
    assert "\\ud800" in report.text()
    markdown = report.markdown()
    assert "<script" not in markdown
    assert "&#60;script&#62;alert(1)&#60;/script&#62;&#124;&#96;x&#96;&#92;x1b&#91;31m" in markdown
    widths = {len(line.split("|")) for line in markdown.splitlines() if line.startswith("|")}
    assert widths == {19, 8}, "no text ends a cell"


def exchange_line(**fields: Any) -> str:
    line = {
        "kind": "exchange", "sequence": 9, "direction": "b2t", "name": "x", "tags": {}, "dtype": "float32",
        "shape": [8], "layout": "", "outcome": "received", "bytes": 32, "seconds": 0.1, **dataclasses.asdict(EQUAL),
    }  # fmt: skip
    return json.dumps({name: value for name, value in {**line, **fields}.items() if value is not ...})


def test_a_line_by_hand_is_read(tmp_path: Path) -> None:
    append(tmp_path / "graft-target-0.jsonl", exchange_line(), exchange_line(sequence=10, cosine="nan", rel_l2="inf"))
    first, second = Report.read(tmp_path).rows
    assert first.comparison == EQUAL
    assert second.comparison is not None
    assert second.comparison.rel_l2 == math.inf
    assert math.isnan(second.comparison.cosine)


@pytest.mark.parametrize(
    "line",
    [
        exchange_line()[:-20],
        "[]",
        "3",
        "{}",
        '{"kind": "exchanges"}',
        '{"kind": ["exchange"]}',
        "[" * 100_000,
        '{"kind": "summary", "counts": {"sent": ' + "9" * 30 + "}}",
        '{"kind": "summary", "counts": {"sent": -1}}',
        '{"kind": "summary", "counts": [1]}',
        '{"kind": "setting", "mode": 3}',
        '{"kind": "fault", "sequence": 1, "direction": "b2t", "name": "x", "tags": {}, "fault": null}',
        b"\xff\xfe{}\n",
        b"\0\0\0\0\n",
        exchange_line(sequence="0"),
        exchange_line(sequence=True),
        exchange_line(sequence=-1),
        exchange_line(direction="t2x"),
        exchange_line(direction="t2b"),
        exchange_line(name=None),
        exchange_line(name=...),
        exchange_line(tags=[]),
        exchange_line(tags={"layer": [1]}),
        exchange_line(outcome={}),
        exchange_line(rel_l2="__import__('os').abort()"),
        exchange_line(rel_l2="1e-3"),
        exchange_line(rel_l2=math.nan),
        exchange_line(rel_l2=-1.0),
        exchange_line(rel_l2=None),
        exchange_line(cosine=1.5),
        exchange_line(max_abs=...),
        exchange_line(max_ulp=1.5),
        exchange_line(numel=-8),
        exchange_line(nan=[1]),
        exchange_line(nan=[1, "2"]),
        exchange_line(inf=7),
    ],
)  # fmt: skip
def test_lines_that_are_none_are_counted_and_left_out(tmp_path: Path, line: str | bytes) -> None:
    write(tmp_path, [(header(0, "x"), EQUAL), (header(1, "y"), EQUAL)])
    before = Report.read(tmp_path)
    append(tmp_path / "graft-target-0.jsonl", line)
    report = Report.read(tmp_path)
    assert report.rows == before.rows
    assert (report.counts, report.settings) == (before.counts, before.settings)
    assert report.notes == ("1 line of graft-target-0.jsonl could not be read",)


def test_a_killed_process(tmp_path: Path) -> None:
    """Its last line is a half, and there is no summary."""
    write(tmp_path, [(header(0, "x"), EQUAL), (header(1, "y"), errors(1.0))])
    file = tmp_path / "graft-target-0.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    assert len(lines) == 4
    file.write_bytes(b"".join(lines[:2]) + lines[2][:50])
    report = Report.read(tmp_path)
    assert [row.comparison for row in report.rows] == [EQUAL, None]
    assert report.rows[1].outcomes == ("sent",), "the sender's line is left"
    assert report.counts == {"baseline": {"sent": 2}, "target": {}}
    assert report.notes == (
        "1 line of graft-target-0.jsonl could not be read",
        "graft-target-0.jsonl has no summary, so its counts are missing: the process has not closed its grafter",
    )
    for form in (report.text(), report.markdown(), report.html()):
        assert "1 line of graft-target-0.jsonl could not be read" in form
        assert "graft-target-0.jsonl has no summary" in form
    file.write_bytes(file.read_bytes() + b"\n{\n")
    assert "2 lines of graft-target-0.jsonl could not be read" in Report.read(tmp_path).notes


def test_files_that_are_missing_or_of_another_run(tmp_path: Path) -> None:
    for rank, world in ((0, 4), (2, 4), (3, 12)):
        side = writer_of(tmp_path, "target", rank, world)
        side.exchange(header(0, "x"), EQUAL, "received", 32, 0.001)
        side.close()
    (tmp_path / "graft-notes.jsonl").write_text("{}")
    (tmp_path / "graft-target-1.jsonl").mkdir()
    report = Report.read(tmp_path)
    assert report.rows[0].ranks == (0, 2, 3)
    assert "0,2-3" in report.text()
    assert report.notes == (
        "the files give the target different numbers of ranks (4, 12): they are of several runs",
        "there is no file of target rank 1,4-10 and 1 more",
        "graft-notes.jsonl is left out: it is no graft-<role>-<rank>.jsonl",
        "graft-target-1.jsonl is left out: it is no graft-<role>-<rank>.jsonl",
    )


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(
        SglCommError, match=r"got report folder .*nowhere', which is no folder; expected one with files"
    ):
        Report.read(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(SglCommError, match="which is no folder"):
        Report.read(tmp_path / "file")
    with pytest.raises(SglCommError, match=r"without files graft-<role>-<rank>.jsonl; expected the lines of a grafter"):
        Report.read(tmp_path)
    write(tmp_path, [(header(0, "x"), EQUAL)])
    for threshold in (math.nan, -1.0, math.inf):
        with pytest.raises(SglCommError, match=r"got threshold .*; expected a number from 0 on"):
            Report.read(tmp_path, threshold)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "run")
    files = {name: tmp_path / f"report.{name}" for name in ("markdown", "html")}
    command = ["graft-report", str(tmp_path / "run")]
    assert main([*command, *(part for name, file in files.items() for part in (f"--{name}", str(file)))]) == 1
    report = Report.read(tmp_path / "run")
    assert capsys.readouterr().out == report.text()
    assert files["markdown"].read_text(encoding="utf-8") == report.markdown()
    assert files["html"].read_text(encoding="utf-8") == report.html()
    assert main([*command, "--threshold", "0.5"]) == 0
    assert "# no divergence: rel_l2 is at most 0.5" in capsys.readouterr().out
    writer_of(tmp_path / "run", "target", 0, 2).fault(header(0, "x"), "no")
    assert main([*command, "--threshold", "0.5"]) == 1
    assert "1 fault" in capsys.readouterr().out.splitlines()[-1]


def test_the_command_says_what_it_cannot_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert main(["graft-report", str(folder)]) == 2
        output = capsys.readouterr()
        assert output.out == ""
        assert re.fullmatch(r"sgl_comm: grafter: got report folder .*; expected .*\n", output.err)


def test_the_command_says_what_it_cannot_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, [(header(0, "x"), EQUAL)])
    assert main(["graft-report", str(tmp_path), "--markdown", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--threshold", "nan"],
        ["--threshold", "-1"],
        ["--threshold", "few"],
        ["--html", "no/such/folder/file.html"],
        ["--plot", "plot.exe"],
    ],
)
def test_bad_arguments_are_refused(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["graft-report", str(tmp_path), *arguments])
    assert "error:" in capsys.readouterr().err


def test_a_terminal_without_these_letters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, [(header(0, "é"), EQUAL)])
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", terminal)
    assert main(["graft-report", str(tmp_path)]) == 0
    assert b" \\xe9 " in terminal.buffer.getvalue()  # type: ignore[attr-defined]
