"""The command line: flags, texts, what goes to stdout and stderr, exit codes."""

from __future__ import annotations

import argparse
import logging

import pytest

from common import UserError, cli
from common.results.analysis import Note


@pytest.fixture(autouse=True)
def level():
    before = cli.LOG.level
    yield
    cli.LOG.setLevel(before)


def parse(*arguments: str) -> argparse.Namespace:
    return cli.shared_parser("").parse_args([*arguments])


def exit_code(error: BaseException | None = None, *arguments: str) -> int:
    def work(args: argparse.Namespace) -> None:
        if error:
            raise error

    return cli.run(work, parse(*arguments), "program")


@pytest.mark.parametrize(("error", "code", "said"), [
    (None, 0, ""),
    (UserError("wrong\nfile"), 2, "program: wrong file\n"),
    (KeyboardInterrupt(), 130, "program: stopped; nothing was written\n"),
    (KeyboardInterrupt("half is written"), 130, "program: stopped; half is written\n"),
    (MemoryError(), 2, "program: out of memory: a smaller --batch-size or shorter texts need less\n"),
    (RuntimeError("CUDA out of memory"), 2, "program: out of memory: a smaller --batch-size or shorter texts need "
                                            "less\n"),
])  # fmt: skip
def test_every_end_has_its_exit_code_and_one_line(error, code, said, capsys):
    assert exit_code(error) == code
    assert capsys.readouterr() == ("", said)


def test_a_fault_of_ours_is_not_hidden():
    with pytest.raises(RuntimeError, match="a bug"):
        exit_code(RuntimeError("a bug"))


def test_debug_shows_the_traceback(capsys):
    assert exit_code(UserError("wrong"), "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


def test_an_option_without_a_value_is_said(capsys):
    assert exit_code(None, "--text=--") in (0, 2)
    assert len(capsys.readouterr().err.splitlines()) <= 1


@pytest.mark.parametrize(("flags", "shown"), [(["--quiet"], ["warning: b"]), ([], ["a", "warning: b"]),
                                              (["--verbose"], ["a", "warning: b", "c"])])  # fmt: skip
def test_quiet_and_verbose(flags, shown, capsys):
    def work(args: argparse.Namespace) -> None:
        cli.hear(Note("a"))
        cli.hear(Note("b", warning=True))
        cli.detail("c")
        cli.tell("result")

    assert cli.run(work, parse(*flags), "program") == 0
    out, err = capsys.readouterr()
    assert (out, err.splitlines()) == ("result\n", shown)


def test_a_bar_is_drawn_on_a_terminal_only(capsys):
    cli.LOG.setLevel(logging.INFO)
    with cli.progress("working", 3) as advance:
        advance(3)
    assert capsys.readouterr() == ("", "")


def test_a_table_is_100_columns_wide_with_numbers_to_the_right_and_no_control_characters(capsys):
    cli.print_table("Title", ["head", "score"], [["5.1", "0.9"], ["10.11", "\x1b[31m0.25"]])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Title") and max(map(len, lines)) <= cli.WIDTH
    row = next(line for line in lines if " 5.1" in line)
    assert row.index("5.1") > row.index(" ") and row.split() == ["5.1", "0.9"]
    assert not any("\x1b" in line for line in lines)


def test_texts_are_those_of_the_flag_of_the_file_or_of_the_script(tmp_path):
    assert cli.chosen_texts(parse(), ["default"]) == ["default"]
    assert cli.chosen_texts(parse("--text", "a", "--text", ""), ["default"]) == ["a", ""]
    (tmp_path / "texts").write_text("one\n\n  \ntwo\n", encoding="utf-8")
    assert cli.chosen_texts(parse("--sequences-file", str(tmp_path / "texts")), ["default"]) == ["one", "two"]
    (tmp_path / "texts").write_text("\n")
    for args, default in ((parse("--sequences-file", str(tmp_path / "texts")), ["default"]), (parse(), [])):
        with pytest.raises(UserError, match="no text to analyse"):
            cli.chosen_texts(args, default)


def test_numbers_and_words_are_read_and_others_refused():
    assert cli.number_or("auto")("auto") == "auto" and cli.number_or("auto")("7") == 7
    assert cli.row_count("auto") is None and cli.row_count("8") == 8
    assert cli.threshold("dynamic") is None and cli.threshold("0.4") == 0.4
    refused = [(cli.number_or("auto"), "-1"), (cli.number_or("auto"), "x"), (cli.row_count, "0"),
               (cli.threshold, "1.1"), (cli.threshold, "x"), (cli.whole_number, "9" * 30)]  # fmt: skip
    for read, text in refused:
        with pytest.raises(argparse.ArgumentTypeError):
            read(text)


def test_a_flag_that_nearly_exists_is_named(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse("--sede", "3")
    assert stopped.value.code == 2 and "did you mean --seed?" in capsys.readouterr().err


def test_what_an_interruption_left_out_ends_as_ctrl_c_does():
    cli.say_missing(())
    with pytest.raises(KeyboardInterrupt, match="not measured: a, b; the rest is written, run again to go on"):
        cli.say_missing(["a", "b"])
