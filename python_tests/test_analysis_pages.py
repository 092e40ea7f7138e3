"""Pictures, tables, coloured text and the page of a run."""

import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from rich.console import Console

from mor_ext.analysis import curves, pareto
from mor_ext.analysis.depth import draw_depth_loss, draw_heat_map
from mor_ext.analysis.page import ColouredText, Facts, Paragraph, Picture, Table, write_page
from mor_ext.analysis.pareto import Point
from mor_ext.analysis.rank import correlate
from mor_ext.analysis.report import write_report
from mor_ext.analysis.style import depth_colours, ink, new_figure, png, save
from mor_ext.analysis.text import Segment, coloured, legend, pieces_of, segments, texts
from mor_ext.models import MoRConfig
from mor_ext.training.tokenizer import encode, train_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
SCRIPT = "<script>alert('&')</script>"
CONFIG = MoRConfig(
    num_hidden_layers=8, num_recursions=3, routing="expert_choice", hidden_size=32, vocab_size=50
)


def bytes_of(data: bytes) -> list[bytes]:
    return [bytes([byte]) for byte in data]


# ---- text ----


def test_a_character_of_several_bytes_is_that_of_its_last():
    pieces = bytes_of("a\u00e9\n".encode() + b"\xff\x1b")
    parts = segments(pieces, [1, 2, 3, 0, 1, 2], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert parts == [
        Segment("a", 1, 0.1),
        Segment("\u00e9", 3, 0.3),
        Segment("\n", 0, 0.4),
        Segment("\ufffd", 1, 0.5),
        Segment("\ufffd", 2, 0.6),
    ]


def test_tokens_of_several_characters_stay_whole():
    pieces = [b"Hel", b"lo \xe0", b"\xa6\xac", b"\xe2"]  # ends within a character
    assert texts(pieces) == ["Hel", "lo ", "\u09ac", "\ufffd"]
    assert texts([]) == []


@pytest.mark.parametrize("kind", ["byte", "char", "bpe", "sentencepiece"])
def test_pieces_of_tokens_are_the_text(kind):
    text = "A river, a r\u00edver.\n\u09a8\u09a6\u09c0 the river \U0001f600\n" * 30
    tokenizer = train_tokenizer(kind, [text], vocab_size=300)
    ids = encode(tokenizer, [text])[0].ids.tolist()
    pieces = pieces_of(tokenizer, ids)
    assert len(pieces) == len(ids)
    assert b"".join(pieces).decode() == text
    if kind == "byte":
        assert pieces[: len("A river, a r\u00ed".encode())][-3:] == [b"r", b"", "\u00ed".encode()]


def test_pieces_of_bytes_that_are_no_text():
    tokenizer = train_tokenizer("byte", [])
    pieces = pieces_of(tokenizer, [*b"a", 0xE2, 0x82, *b"bc", 0xFF])
    assert texts(pieces) == ["a", "", "", "\ufffdb", "c", "\ufffd"]


def test_every_token_has_a_depth():
    with pytest.raises(ValueError, match="must be one for each of 2 tokens, got 1 and 2"):
        segments([b"a", b"b"], [1])


def test_terminal_text_has_the_colours_of_the_depths():
    colours = depth_colours(3)
    line = coloured([Segment("a", 0), Segment("b", 3)], 3)
    assert line.plain == "ab"
    assert [str(span.style).split(" on ")[1] for span in line.spans] == [colours[0], colours[3]]
    assert legend(3).plain.split() == ["0", "1", "2", "3"]


@pytest.mark.parametrize("depths", [1, 3, 12])
def test_text_is_readable_on_every_colour(depths):
    """Contrast of at least 4.5 (WCAG 2, AA); colours are all different."""

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    colours = depth_colours(depths)
    assert len(set(colours)) == depths + 1
    for colour in colours:
        low, high = sorted([luminance(colour), luminance(ink(colour))])
        assert (high + 0.05) / (low + 0.05) >= 4.5, colour


# ---- rank correlation ----


def test_rank_correlation_by_hand():
    """x has ranks 1.5 1.5 3 4.5 4.5, y 2 1 3.5 3.5 5; of their differences from 3
    the products add up to 8.25, the squares to 9 and 9.5."""
    x, y = torch.tensor([[1, 1, 2, 9, 9]]), torch.tensor([[0.3, 0.1, 0.5, 0.5, 0.7]])
    result = correlate(x, y)
    assert result.rho == pytest.approx(8.25 / math.sqrt(9 * 9.5))
    assert result.tokens == 5
    assert math.isnan(result.low) and math.isnan(result.high)  # of one sequence


def test_rank_correlation_does_not_depend_on_the_scale(seed):
    x = torch.randn(4, 30)
    assert correlate(x, x.exp()).rho == pytest.approx(1)
    assert correlate(x, -x.exp()).rho == pytest.approx(-1)
    assert math.isnan(correlate(x, torch.zeros_like(x)).rho)


def test_tokens_without_a_loss_are_left_out(seed):
    x, y = torch.randn(3, 20), torch.randn(3, 20)
    y[:, -1] = math.nan
    inner = correlate(x[:, :-1], y[:, :-1])
    assert correlate(x, y) == inner
    packed = correlate(x.flatten(), y.flatten(), lengths=[20, 20, 20])
    assert packed == inner


def test_the_interval_is_the_bootstraps_over_sequences(seed):
    """Against the same draws of sequences, each ranked anew."""
    x = torch.randint(0, 4, (12, 15)).double()
    y = x * torch.randn(12, 1) + torch.randn(12, 15)  # alike within a sequence
    result = correlate(x, y, samples=50, seed=3)
    draws = torch.randint(12, (50, 12), generator=torch.Generator().manual_seed(3))
    rhos = [correlate(x[drawn].view(1, -1), y[drawn].view(1, -1)).rho for drawn in draws]
    for bound, level in ((result.low, 0.025), (result.high, 0.975)):
        assert bound == pytest.approx(torch.tensor(rhos).double().quantile(level).item())
    assert result.low < result.rho < result.high


def test_more_sequences_than_runs_narrow_the_interval(seed):
    x = torch.randn(640, 3)
    y = x + torch.randn(640, 3)
    few, many = correlate(x[:16], y[:16]), correlate(x, y)
    assert 0 < many.high - many.low < few.high - few.low


def test_errors_of_correlation_shapes():
    for x, y, lengths in (
        (torch.zeros(2, 3), torch.zeros(3, 2), None),
        (torch.zeros(6), torch.zeros(6), None),
        (torch.zeros(6), torch.zeros(6), [3, 4]),
    ):
        with pytest.raises(ValueError, match=r"x and y must be \[batch, length\]"):
            correlate(x, y, lengths)


# ---- pictures ----


def test_heat_map_shows_the_layers_of_each_token():
    config = MoRConfig(num_hidden_layers=8, num_recursions=3, routing="token_choice")
    stage_depth = torch.tensor([[1, 3, 1], [1, 1, 1], [1, 0, 1]])
    figure = draw_heat_map(config, ["a", "\n", "\u09ac"], stage_depth, width=2)
    first, second = figure.axes
    cells = [axis.collections[0].get_array().tolist() for axis in (first, second)]
    plain = 4  # layers 1 and 8, which every token goes through
    assert cells[0] == [[plain, plain], [1, 1], [2, 0], [3, 0], [plain, plain]]
    assert cells[1] == [[plain], [0], [0], [0], [plain]]
    assert [label.get_text() for label in first.get_yticklabels()] == [
        "1",
        "2\u20133",
        "4\u20135",
        "6\u20137",
        "8",
    ]
    assert [label.get_text() for label in first.get_xticklabels()] == ["a", "\u23ce"]
    assert png(figure).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("fields", "second", "rows"),
    [
        (  # layers that are applied up to two times
            {"routing": "action", "sharing": "sequence", "num_recursions": 2},
            [0, 1, 2],
            [[1, 0], [2, 0], [1, 1], [2, 0], [1, 1], [2, 2]],
        ),
        (  # the second, fourth and sixth layer routed; 2 is the colour of the others
            {"routing": "mixture_of_depths", "sharing": "cycle"},
            [1, 0, 1, 1, 1, 0],
            [[2, 2], [1, 0], [2, 2], [1, 1], [2, 2], [1, 0]],
        ),
        ({"sharing": "cycle"}, [1], [[2, 2]]),
    ],
)
def test_heat_map_of_other_layouts(fields, second, rows):
    config = MoRConfig(num_hidden_layers=6, **fields)
    first = [config.num_recursions] * len(second)
    figure = draw_heat_map(config, ["token", " $x$"], torch.tensor([first, second]))
    assert figure.axes[0].collections[0].get_array().tolist() == rows
    assert png(figure).startswith(b"\x89PNG")


def test_a_heat_map_needs_a_text_and_all_stages_of_each_token():
    with pytest.raises(ValueError, match=r"stage_depth must be \[2, 3\] .* got \[2, 1\]"):
        draw_heat_map(CONFIG, ["a", "b"], torch.ones(2, 1))


def test_depth_against_loss_has_a_box_for_each_depth():
    depth = torch.tensor([[0, 2, 2], [2, 0, 5]])
    loss = torch.tensor([[0.5, 1.0, 2.0], [3.0, math.nan, 1.0]])
    figure = draw_depth_loss(depth, loss, correlate(depth, loss))
    axis = figure.axes[0]
    assert [t.get_text() for t in axis.get_xticklabels()] == ["0\n(1)", "2\n(3)", "5\n(1)"]
    assert "rank correlation" in axis.get_title(loc="left")


LOG = [
    {"step": 1, "loss": 3.0, "learning_rate": 1e-3, "tokens_per_second": 100.0},
    {"step": 2, "loss": 2.0, "learning_rate": 1e-3, "tokens_per_second": 110.0},
    {"step": 2, "eval_loss": 2.5, "eval_bits_per_byte": 3.6, "eval_agreement": 0.9},
    {"epoch": 1.0, "loss": 9.0},  # no step: not of a curve
]


def test_curves_are_those_that_the_log_has():
    figure = curves.draw_curves(LOG)
    drawn = {axis.get_title(loc="left"): axis for axis in figure.axes}
    assert list(drawn) == ["Loss", "Bits per byte", "Routing", "Speed", "Learning rate"]
    loss, held_out = drawn["Loss"].lines
    assert loss.get_xydata().tolist() == [[1, 3], [2, 2]]
    assert held_out.get_xydata().tolist() == [[2, 2.5]]
    assert held_out.get_label() == "loss, held-out"
    assert drawn["Speed"].get_ylabel() == "tokens a second"


def test_a_log_with_nothing_to_draw_says_what_it_has():
    with pytest.raises(ValueError, match=r"log must have .* got the keys \['epoch', 'step'\]"):
        curves.draw_curves([{"step": 1, "epoch": 0.5}])


POINTS = [
    Point("MoR", 2e6, 1.5, "0.5"),
    Point("MoR", 1e6, 2.0, "0.7"),
    Point("vanilla", 3e6, 1.5),  # as good as MoR, at more compute
    Point("twin", 2e6, 1.5),  # neither beats the other
    Point("best", 4e6, 1.0),
]


def test_the_pareto_front():
    assert pareto.on_front(POINTS) == [True, True, False, True, True]
    assert pareto.on_front([]) == []


def test_a_pareto_plot_has_points():
    with pytest.raises(ValueError, match="points must be at least one, got none"):
        pareto.draw_pareto([], "FLOPs a token", "nats a token")


def test_pareto_plot_and_table(tmp_path):
    figure = pareto.draw_pareto(POINTS, "FLOPs a token", "nats a token")
    axis = figure.axes[0]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("FLOPs a token", "nats a token")
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels == ["Pareto front", "MoR", "vanilla", "twin", "best"]
    save(figure, tmp_path / "pareto.png")
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
    console = Console(width=100, file=io.StringIO())
    console.print(pareto.pareto_table(POINTS, "FLOPs a token", "nats a token"))
    rows = [line.split() for line in console.file.getvalue().splitlines() if "M " in line]
    assert rows[0] == ["MoR", "0.7", "1.000", "M", "2.0000", "*"]
    assert [row[0] for row in rows] == ["MoR", "MoR", "twin", "vanilla", "best"]
    assert rows[3][-1] != "*"


# ---- the page ----


class Reader(HTMLParser):
    """Elements and text of a page; fails at a closing tag without its opening."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open, self.elements, self.text = [], [], ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_text_on_a_page_is_text(tmp_path):
    figure, _ = new_figure(2, 2)
    write_page(
        tmp_path / "page.html",
        SCRIPT,
        Paragraph(SCRIPT, SCRIPT),
        Facts(SCRIPT, {SCRIPT: SCRIPT, "list": [SCRIPT]}),
        Table(SCRIPT, [SCRIPT], [[SCRIPT]], SCRIPT),
        Picture(SCRIPT + '"', figure, SCRIPT),
        ColouredText(SCRIPT, [Segment(SCRIPT, 1)], 2, SCRIPT),
        subtitle=SCRIPT,
    )
    page = (tmp_path / "page.html").read_text()
    reader = Reader(page)
    assert "<script" not in page
    assert reader.text.count(SCRIPT) == 18  # title and heading, and all but alt
    (image,) = (attributes for tag, attributes in reader.elements if tag == "img")
    assert image["alt"] == SCRIPT + '"'


def test_a_page_needs_nothing_but_itself(tmp_path):
    figure, _ = new_figure(2, 2)
    write_page(tmp_path / "page.html", "Run", Picture("Curves", figure), Facts("Config", {"a": 1}))
    page = (tmp_path / "page.html").read_text()
    reader = Reader(page)
    sources = [a["src"] for _, a in reader.elements if "src" in a]
    assert len(sources) == 1 and sources[0].startswith("data:image/png;base64,iVBOR")
    assert not [a for _, a in reader.elements if "href" in a]
    assert "http:" not in page and "https:" not in page and "url(" not in page
    policies = [a["content"] for _, a in reader.elements if "http-equiv" in a]
    assert policies[0].startswith("default-src 'none'")
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page


def test_coloured_text_tells_depth_and_loss(tmp_path):
    parts = [Segment("a", 0, 1.234), Segment("\n", 2)]
    write_page(tmp_path / "page.html", "Run", ColouredText("Text", parts, 2))
    spans = [a for tag, a in Reader((tmp_path / "page.html").read_text()).elements if tag == "span"]
    legend_spans, text_spans = spans[:3], spans[3:]
    assert [span["title"] for span in text_spans] == ["depth 0, loss 1.23 nats", "depth 2"]
    assert [s["style"] for s in text_spans] == [legend_spans[d]["style"] for d in (0, 2)]


def test_values_are_shown_for_readers(tmp_path):
    values = {"a": 12345, "b": 0.00001, "c": True, "d": None, "e": (1, 0.66666), "f": "x"}
    write_page(tmp_path / "page.html", "Run", Facts("Config", values))
    text = Reader((tmp_path / "page.html").read_text()).text
    assert "a12,345b1e-05cyesd\u2013e1, 0.6667fx" in text


def test_report_of_a_run(tmp_path, seed):
    depth = torch.randint(0, 4, (3, 40))
    stage_depth = torch.stack([torch.ones_like(depth), depth, torch.ones_like(depth)], dim=-1)
    loss = torch.rand(3, 40)
    loss[:, -1] = math.nan
    pieces = bytes_of(("x" * 38 + "\u00e9").encode())
    write_report(
        tmp_path / "run.html", "Run", CONFIG, {"nats a byte": 1.25}, LOG, pieces, stage_depth, loss
    )
    reader = Reader((tmp_path / "run.html").read_text())
    assert sum(tag == "img" for tag, _ in reader.elements) == 3
    for shown in ("nats a byte1.25", "expert_choice", "projections", "\u00e9"):
        assert shown in reader.text
    titles = [a["title"] for tag, a in reader.elements if tag == "span" and "title" in a]
    assert len(titles) == 39
    assert titles[0] == f"depth {depth[0, 0]}, loss {loss[0, 0]:.2f} nats"
    assert titles[-1] == f"depth {depth[0, -1]}"


def test_the_example_of_the_docs_runs(tmp_path, monkeypatch, capsys):
    page = Path(__file__).parents[1] / "docs" / "analysis.md"
    (snippet,) = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    exec(compile(snippet, "analysis.md", "exec"), {})
    assert "FLOPs a token, forward" in capsys.readouterr().out
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["depth.png", "depth_loss.png", "run.html"]
