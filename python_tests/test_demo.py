"""The demo, with a few steps."""

import pytest

from mor_ext import demo
from mor_ext.training import stdlib_text

pytestmark = pytest.mark.usefixtures("one_thread")


def test_demo(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_bytes(stdlib_text(60_000))
    demo.main(["--text", str(text), "--out", str(tmp_path / "out"), "--steps", "3", "--seed", "1"])
    printed = capsys.readouterr().out
    for row in ("MoR", "vanilla", "byte bigram"):
        assert row in printed
    for picture in ("depth.png", "loss.png"):
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")


def test_errors_name_the_file(tmp_path, capsys):
    for name, message in (("none.txt", "No such file"), ("short.txt", "must have at least")):
        (tmp_path / "short.txt").write_bytes(b"abc")
        with pytest.raises(SystemExit):
            demo.main(["--text", str(tmp_path / name)])
        printed = capsys.readouterr().err
        assert name in printed and message in printed
