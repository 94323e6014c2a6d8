"""What a user can cause ends in one sentence, whichever program it is; `--debug` brings the traceback back."""

from __future__ import annotations

import pytest

from datamodules.__main__ import main as data_main
from results.__main__ import main as results_main
from results.common import trouble
from sweeps.__main__ import main as sweeps_main


def _fails(arguments):
    assert "--debug" not in arguments
    return {}["missing"]


def test_an_error_that_nobody_worded_is_one_line_with_its_place_and_a_way_to_more(capsys, monkeypatch):
    monkeypatch.delenv(trouble.DEBUG, raising=False)
    assert trouble.told(_fails, ["x"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: KeyError: 'missing' (")
    assert "test_trouble.py" in shown
    assert "Traceback" not in shown
    with pytest.raises(KeyError):
        trouble.told(_fails, ["x", "--debug"])
    monkeypatch.setenv(trouble.DEBUG, "1")
    with pytest.raises(KeyError):
        trouble.told(_fails, ["x"])


def test_a_place_that_cannot_be_written_is_told_in_a_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    inside = str(tmp_path / "file" / "inside")
    for main, arguments in (
        (data_main, ["synthetic", inside, "--train=1", "--test=1", "--defects=1", "--categories=wood"]),
        (results_main, ["audit", "--out", inside]),
        (results_main, ["tables", "--root", str(tmp_path / "none"), "--out", inside]),
        (sweeps_main, ["run", inside]),
    ):
        assert main(arguments) == 2
        shown = capsys.readouterr().err.replace("\n", "")
        assert shown.lower().startswith("error: "), shown
        assert str(tmp_path / "file") in shown
