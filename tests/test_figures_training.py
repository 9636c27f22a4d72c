"""Every number in the figures of notebooks 06 and 07, read from what is drawn and worked out here a
second time.
"""

from __future__ import annotations

import statistics
from html.parser import HTMLParser

import drawn
import numpy as np
import pytest
import spelled

from qlora_nb import recorded
from qlora_nb.lessons import n06, n07
from qlora_nb.memory import ledger
from qlora_nb.ui import charts

MIB = 2**20
SHOWN_AS = {
    "4-bit weights": ("4-bit codes",),
    "scales": ("scales (absmax)", "scales of the scales", "code tables and offsets"),
    "unquantized rest": ("linear weights", "embedding and head", "biases and norms", "buffers"),
    "LoRA weights": ("LoRA weights",),
    "gradients": ("gradients",),
    "optimizer states": ("optimizer states",),
    "kept for the backward pass": ("kept for the backward pass",),
    "working memory": ("working memory",),
    "key-value cache": ("key-value cache",),
    "CUDA itself": ("CUDA context, kernels, reserve",),
}
"""Part of the figure of memory → the ledger's lines in it, in the order of drawing."""
EVERY_LINE = [line for lines in SHOWN_AS.values() for line in lines]


def book(sizes: dict[str, int]) -> ledger.Ledger:
    """A ledger with these bytes by line, in an order that the figure must not depend on."""
    lines = [ledger.Line(name, size, "by hand") for name, size in sizes.items()]
    return ledger.Ledger("by hand", tuple(reversed(lines)))


def check_stack(ax, ledgers: dict[str, dict[str, int]], unit: float) -> None:
    """Parts lie end to end in the order of `SHOWN_AS`, each as long as its lines together; the
    total stands at the end.
    """
    found = drawn.bars(ax)
    there = {}
    for part, lines in SHOWN_AS.items():
        widths = [sum(sizes.get(line, 0) for line in lines) for sizes in ledgers.values()]
        if any(widths):
            there[part] = widths
    assert list(found) == list(there)
    ends = [0.0] * len(ledgers)
    for part, widths in there.items():
        for row, (left, bottom, width, height) in enumerate(found[part]):
            assert width == pytest.approx(
                widths[row] / unit, abs=1e-9
            )  # float sums of a few dozen terms
            assert left == pytest.approx(ends[row], abs=1e-9)
            assert bottom + height / 2 == pytest.approx(row)
            ends[row] += widths[row] / unit
    assert drawn.y_ticks(ax) == list(enumerate(ledgers))
    assert ax.yaxis_inverted(), "the first ledger is on top"
    written = drawn.texts(ax)
    assert [(y, text) for _, y, text in written] == [
        (row, f" {end:.2f}") for row, end in enumerate(ends)
    ]
    assert [x for x, _, _ in written] == pytest.approx(ends)
    assert ax.get_xlim()[1] > 1.1 * max(ends), "room for the number"


def test_budget_of_a_small_model():
    """Every line of a ledger is there once, each of a size of its own; in MiB up to half a GiB."""
    whole = {name: (number + 1) * MIB + 1000 * number for number, name in enumerate(EVERY_LINE)}
    part = {"4-bit codes": 40 * MIB, "key-value cache": 3 * MIB}
    ledgers = {"fine-tuning": whole, "answering": part, "": {"gradients": 7 * MIB}}
    figure = charts.memory_bars({name: book(sizes) for name, sizes in ledgers.items()})
    [ax] = figure.axes
    check_stack(ax, ledgers, MIB)
    assert ax.get_xlabel() == "peak memory (MiB)"
    assert drawn.legend(figure) == list(SHOWN_AS)
    looks = drawn.fills(ax)
    assert len(set(looks)) == len(looks) == len(SHOWN_AS), "no two parts look the same"
    assert len(ax.lines) == 0, "no card, no line"
    rest = sum(size for name, size in whole.items() if name in SHOWN_AS["unquantized rest"])
    total = sum(whole.values())
    assert (
        drawn.title(ax)
        == f"The largest part: unquantized rest, {100 * rest / total:.0f} % of {total / MIB:.2f} MiB"
    )
    assert figure.get_size_inches().tolist() == pytest.approx([8.4, 1.9 + 3 * 0.45])


@pytest.mark.parametrize(
    ("limit", "title"),
    [
        (None, "The largest part: 4-bit weights, 60 % of 10.00 GiB"),
        (10.0, "All fit 10 GiB"),
        (9.5, "Over 9.5 GiB: large"),
        (0.25, "Over 0.25 GiB: small, large"),
    ],
)
def test_budget_against_a_card(limit, title):
    gib = 1024 * MIB
    ledgers = {
        "small": {"4-bit codes": gib // 4, "working memory": gib // 4},
        "large": {
            "4-bit codes": 6 * gib,
            "buffers": 3 * gib,
            "CUDA context, kernels, reserve": gib,
        },
    }
    figure = charts.memory_bars({name: book(sizes) for name, sizes in ledgers.items()}, limit)
    [ax] = figure.axes
    check_stack(ax, ledgers, gib)
    assert ax.get_xlabel() == "peak memory (GiB)"
    assert drawn.title(ax) == title
    if limit is None:
        assert len(ax.lines) == 0
    else:
        [(name, (x, y))] = drawn.lines(ax).items()
        assert name == f"card of {limit:g} GiB"
        assert x.tolist() == [limit, limit]
        assert y.tolist() == [0, 1], "from the bottom of the axes to the top"
        assert ax.lines[0].get_linestyle() == "--"
        assert name in drawn.legend(figure)


def test_budget_draws_the_card_in_the_unit_of_the_bars():
    figure = charts.memory_bars({"model": book({"buffers": 300 * MIB})}, 0.25)
    [ax] = figure.axes
    assert ax.lines[0].get_xdata() == [256, 256]
    assert drawn.title(ax) == "Over 0.25 GiB: model"


LENGTHS = [
    [12, 15, 15, 20, 13, 12, 12, 19],
    [7] * 5,
    [10 + (37 * n) % 101 for n in range(163)],
    list(range(1, 23)),
    list(range(30, 231)),
]


@pytest.mark.parametrize(
    "n_tokens", LENGTHS, ids=["few", "all the same", "many", "one of each", "wide"]
)
def test_lengths_counts_rows(n_tokens):
    [ax] = n06.lengths(n_tokens, 500).axes
    bins = [
        (patch.get_x(), patch.get_x() + patch.get_width(), patch.get_height())
        for patch in ax.patches
    ]
    shortest, longest = min(n_tokens), max(n_tokens)
    assert len(bins) == min(40, longest - shortest + 1)
    if longest > shortest:
        assert bins[0][0] == shortest
        assert bins[-1][1] == pytest.approx(longest)
    assert np.ptp([right - left for left, right, _ in bins]) == pytest.approx(0, abs=1e-9)
    small = 1e-9  # edges are not exact; no length lies so near to one without lying on it
    for number, (left, right, height) in enumerate(bins):
        last = number == len(bins) - 1
        rows = [
            n
            for n in n_tokens
            if left - small <= n < right - small or (last and n >= right - small)
        ]
        assert height == len(rows)
    assert sum(height for *_, height in bins) == len(n_tokens)
    assert (
        drawn.title(ax)
        == f"Rows have {statistics.mean(n_tokens):.0f} tokens on average; max_length allows 500"
    )
    assert ax.get_xlim()[0] == ax.get_ylim()[0] == 0
    assert ax.get_xlim()[1] >= longest
    assert ax.get_ylim()[1] > max(height for *_, height in bins)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("length of a row (tokens)", "rows")


@pytest.mark.parametrize(
    "n_tokens", LENGTHS, ids=["few", "all the same", "many", "one of each", "wide"]
)
def test_lengths_marks_the_length_that_95_percent_do_not_exceed(n_tokens):
    [ax] = n06.lengths(n_tokens, 500).axes
    [(name, (x, y))] = drawn.lines(ax).items()
    at = x[0]
    assert x.tolist() == [at, at]
    assert 20 * sum(n <= at for n in n_tokens) >= 19 * len(n_tokens)
    assert 20 * sum(n < at for n in n_tokens) < 19 * len(n_tokens), "and no shorter one does"
    assert name == f"95 % of rows are no longer than {at}"
    assert drawn.legend(ax) == [name]
    assert y.tolist() == [0, 1], "from the bottom of the axes to the top"
    assert ax.lines[0].get_linestyle() == "--"


def curve(n: int) -> list[float]:
    return [4 / (1 + 0.1 * step) + 0.3 * np.cos(step) for step in range(n)]


@pytest.mark.parametrize(("n", "window"), [(1, 1), (9, 1), (25, 2), (47, 4)])
def test_loss_curve_of_a_run_that_goes_on(n, window):
    losses = curve(n)
    figure = charts.loss_curve(losses)
    [ax] = figure.axes
    found = drawn.lines(ax)
    means = [np.mean(losses[max(0, end - window) : end]) for end in range(1, n + 1)]
    names = ["training loss of each step", f"mean of the last {window} steps"]
    assert list(found) == drawn.legend(ax) == names
    for name, expected in zip(names, (losses, means), strict=True):
        x, y = found[name]
        assert x.tolist() == list(range(1, n + 1))
        assert y.tolist() == pytest.approx(expected)
    assert drawn.title(ax) == f"Training loss after {n} steps: {means[-1]:.2f} nats"
    assert ax.get_ylim()[0] == 0
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("optimizer step", "loss (nats per answer token)")


def test_loss_curve_before_the_first_step():
    [ax] = charts.loss_curve([]).axes
    assert drawn.title(ax) == "Training loss after 0 steps: nan nats"
    assert [len(x) for x, _ in drawn.lines(ax).values()] == [0, 0]


@pytest.mark.parametrize("on_the_way", [{}, {5: 3.25, 10: 2.125}])
def test_loss_curve_with_held_out_rows(on_the_way):
    losses = curve(12)
    [ax] = charts.loss_curve(losses, 4.5, 0.125, on_the_way).axes
    found = drawn.lines(ax)
    assert list(found) == drawn.legend(ax)
    x, y = found["held-out rows"]
    assert (x.tolist(), y.tolist()) == ([0, 13], [4.5, 0.125])
    if on_the_way:
        x, y = found["held-out rows, while training"]
        assert (x.tolist(), y.tolist()) == ([5, 10], [3.25, 2.125])
    looks = [(line.get_linestyle(), line.get_marker()) for line in ax.lines[2:]]
    assert looks == [("None", "D")] * (1 + bool(on_the_way)), "no line between"
    filled = [line.get_fillstyle() for line in ax.lines[2:]]
    assert filled == ["full", "none"][: len(filled)], "other rows, other marks"
    assert found["training loss of each step"][1].tolist() == pytest.approx(losses)
    assert drawn.title(ax) == "Held-out loss goes from 4.50 to 0.12 nats"


@pytest.mark.parametrize(
    ("n", "max_steps", "end"), [(0, 260, 261), (1, 260, 261), (1, 0, 2), (9, 0, 10)]
)
def test_loss_curve_has_the_axis_of_the_whole_run_from_the_first_step_on(n, max_steps, end):
    [ax] = charts.loss_curve(curve(n), max_steps=max_steps).axes
    assert ax.get_xlim() == (0, end)
    assert ax.get_ylim()[0] == 0
    if n == 1:
        assert ax.get_ylim()[1] > curve(1)[0]
        assert ax.lines[0].get_marker() == ".", "a single step is seen"


@pytest.mark.parametrize(
    ("on_the_way", "after", "said"),
    [
        ({5: 0.5, 10: 0.75}, 1.0, "; it was lowest at step 5"),
        ({5: 0.5, 10: 0.75}, 0.25, ""),
        ({5: 0.75, 10: 0.5}, 1.0, ""),
        ({5: 9.0}, 8.0, ""),
    ],
)
def test_loss_curve_says_where_overfitting_begins(on_the_way, after, said):
    """The rows watched may be some of them only: their losses are compared with each other."""
    [ax] = charts.loss_curve(curve(12), 4.0, after, on_the_way).axes
    assert drawn.title(ax) == f"Held-out loss goes from 4.00 to {after:.2f} nats{said}"


def test_loss_curve_needs_both_ends_of_the_held_out_loss():
    for ends in ({"before": 0.0}, {"after": 0.0}):
        [ax] = charts.loss_curve([1.0, 2.0], **ends).axes
        assert len(ax.lines) == 2
        assert drawn.title(ax) == "Training loss after 2 steps: 2.00 nats"
    [ax] = charts.loss_curve([1.0], 0.0, 0.0).axes
    assert len(ax.lines) == 3, "a loss of 0 is a loss"


def check_scores(results: dict, kinds: list[str], title: str) -> None:
    """Bars of a kind stand beside one another around its tick, in the order of the answerers, as
    high as the share in %.
    """
    figure = n06.scores(results)
    [ax] = figure.axes
    found = drawn.bars(ax)
    answerers = [label for label, result in results.items() if result]
    assert list(found) == drawn.legend(figure) == answerers
    assert drawn.x_ticks(ax) == list(enumerate(kinds))
    width = 0.8 / len(answerers)
    for number, label in enumerate(answerers):
        expected = {}
        for kind, share in results[label].items():
            expected[kinds.index(kind) - 0.4 + number * width] = 100 * share
        lefts = [left for left, *_ in found[label]]
        heights = [height for *_, height in found[label]]
        assert lefts == pytest.approx(list(expected))
        assert heights == pytest.approx(list(expected.values()))
        assert [(bottom, wide) for _, bottom, wide, _ in found[label]] == [
            (0, pytest.approx(width))
        ] * len(expected)
    assert len(set(drawn.fills(ax))) == len(answerers), "no two answerers look the same"
    assert [hatch for _, hatch in drawn.fills(ax)] == ["", "//", "..", ""][: len(answerers)]
    assert drawn.title(ax) == title
    assert ax.get_ylim() == (0, 105)
    assert ax.get_ylabel() == "exact match (%)"


def test_scores_of_four_answerers():
    results = {
        "majority": {"all": 0.125, "who": 0.25, "where": 0.0625},
        "copy": {"where": 0.5, "all": 0.75, "who": 1.0},
        "base": {"all": 0.03125, "who": 0.015625, "where": 0.046875},
        "QLoRA": {"all": 0.875, "who": 0.9375, "where": 0.8125},
    }
    check_scores(results, ["all", "who", "where"], "QLoRA: 88 % of held-out answers exactly right")


def test_scores_where_kinds_are_missing():
    results = {
        "majority": {"who": 0.25},
        "copy": {},
        "base": {"what": 0.5, "all": 0.625},
        "last": {"who": 0.75},
    }
    check_scores(
        results, ["all", "who", "what"], "last: not every kind of question was seen in training"
    )
    check_scores(
        {"one": {"all": 0.5}, "none": {}}, ["all"], "one: 50 % of held-out answers exactly right"
    )
    check_scores(
        {"one": {"who": 0.5}}, ["who"], "one: not every kind of question was seen in training"
    )


class Spans(HTMLParser):
    """(text, style) of every span, and all other text."""

    def __init__(self, page: str):
        super().__init__()
        self.spans, self.rest, self.styles = [], "", []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        if tag == "span":
            self.styles.append(dict(attributes)["style"])
            self.spans.append(["", self.styles[-1]])
        elif self.styles:
            self.spans[-1][0] += f"[{tag}]"

    def handle_endtag(self, tag):
        if tag == "span":
            self.styles.pop()

    def handle_data(self, data):
        if self.styles:
            self.spans[-1][0] += data
        else:
            self.rest += data


@pytest.mark.parametrize(
    ("tokens", "trains"),
    [
        (["Where", " is", "\n", "An&na", "?", " <b>", "the park", "."], [False] * 5 + [True] * 3),
        (["a", "b", "a"], [True, False, True]),
        (["a"], [False]),
    ],
)
def test_label_mask_shows_every_token_and_whether_it_trains(tokens, trains):
    ids = list(range(len(tokens)))
    page = Spans(n06.label_mask(ids, trains, spelled.Spelled(*tokens)))
    expected = []  # by character: neighbours that both train share a span
    for token, trained in zip(tokens, trains, strict=True):
        expected += [(c, trained) for c in token.replace("\n", "⏎[br]")]
    for mark, of_trained in (
        ("border-bottom", True),
        ("background:#009E73", True),
        ("opacity", False),
    ):
        seen = [(c, (mark in style) == of_trained) for text, style in page.spans for c in text]
        assert seen == expected
    assert all("white-space:pre-wrap" in style for _, style in page.spans), "blanks are seen"
    n_trained = trains.count(True)
    assert page.rest == f"underlined and green: the {n_trained} tokens that train, of {len(tokens)}"
    assert Spans("<span style='a'>x</span>y").spans == [["x", "a"]], (
        "the reader of the page reads it"
    )


@pytest.fixture(scope="module")
def bytes_tokenizer():
    return spelled.of_bytes()


def shown(tokenizer, prompt: str, answer: str) -> tuple[Spans, int]:
    """What the reader sees of a row whose answer trains; how many tokens train."""
    masked = tokenizer.encode(prompt)
    trained = tokenizer.encode(answer)
    trains = [False] * len(masked) + [True] * len(trained)
    page = Spans(n06.label_mask(masked + trained, trains, tokenizer))
    return page, len(trained)


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [("where is 安娜?\n", "在河边。"), ("猫", "狗"), ("你好 Anna", "at the river."), ("?", "🙂🙂")],
)
def test_label_mask_shows_whole_characters(bytes_tokenizer, prompt, answer):
    """A character of three bytes is one piece, and the border between prompt and answer stays."""
    page, n_trained = shown(bytes_tokenizer, prompt, answer)
    pieces = {True: "", False: ""}
    for text, style in page.spans:
        pieces["border-bottom" in style] += text
    assert pieces[True] == answer
    assert pieces[False] == prompt.replace("\n", "⏎[br]")
    assert f"the {n_trained} tokens that train" in page.rest, "tokens are counted, not characters"
    for character in set("安娜在河边猫狗🙂") & set(prompt + answer):
        ids = bytes_tokenizer.encode(character)
        assert len(ids) > 1
        assert "\ufffd" in bytes_tokenizer.decode(ids[:1]), "alone, a token of it has no text"
        assert character in "".join(text for text, _ in page.spans)


def test_label_mask_joins_no_tokens_across_the_border(bytes_tokenizer):
    """Where a row is cut in the middle of a character, each half is shown as its bytes."""
    ids = bytes_tokenizer.encode("猫")
    page = Spans(n06.label_mask(ids, [False, *[True] * (len(ids) - 1)], bytes_tokenizer))
    first, *rest = [f"<0x{byte:02X}>" for byte in "猫".encode()]
    assert [text for text, _ in page.spans] == [first, "".join(rest)]
    assert ["border-bottom" in style for _, style in page.spans] == [False, True]


def test_label_mask_refuses_one_label_too_few():
    with pytest.raises(ValueError, match="shorter"):
        n06.label_mask([0, 1], [True], spelled.Spelled(*"ab"))


@pytest.mark.parametrize(
    ("base", "tuned", "bits"),
    [
        (
            [(" the", 0.5), (" a", 0.25), ("\n", 0.125)],
            [(" park", 0.75), ("", 0.0625), ("'q'", 0.03125)],
            3.14159,
        ),
        ([("x", 1.0)], [("y", 0.4), ("z", 0.3)], 0.0),
    ],
)
def test_next_tokens_of_both_models(base, tuned, bits):
    figure = n07.next_tokens(base, tuned, bits)
    for ax, rows, name in zip(figure.axes, (base, tuned), ("base", "tuned"), strict=True):
        [boxes] = drawn.bars(ax).values()
        assert [left for left, *_ in boxes] == [0] * len(rows)
        assert [width for *_, width, _ in boxes] == pytest.approx(
            [100 * share for _, share in rows]
        )
        assert [bottom + height / 2 for _, bottom, _, height in boxes] == pytest.approx(
            list(range(len(rows)))
        )
        plain = {"\n": r"\n", "": "·", "'q'": "'q'"}
        assert drawn.y_ticks(ax) == [
            (row, plain.get(token, token)) for row, (token, _) in enumerate(rows)
        ]
        assert ax.yaxis_inverted(), "the most probable one is on top"
        assert ax.get_title(loc="left") + ax.get_title() == name
        assert ax.get_xlim() == (0, 100)
        assert ax.get_xlabel() == "probability (%)"
    assert drawn.fills(figure.axes[0]) != drawn.fills(figure.axes[1])
    assert figure.get_suptitle() == f"The two differ by {bits:.2f} bits at this token"


@pytest.mark.parametrize("n", [1, 3, 12, 13, 30])
def test_along_an_answer(n):
    steps = [
        (f" t{at}", [("a", 0.5)], [("b", 0.5)], 0.25 * (at * 7 % 5) + 0.125) for at in range(n)
    ]
    steps[-1] = ("(end\n)", [], [], 0.5)
    [ax] = n07.along(steps).axes
    [boxes] = drawn.bars(ax).values()
    bits = [step[3] for step in steps]
    assert [height for *_, height in boxes] == bits
    assert [bottom for _, bottom, *_ in boxes] == [0] * n
    assert [left + width / 2 for left, _, width, _ in boxes] == pytest.approx(list(range(n)))
    assert drawn.x_ticks(ax) == [(at, f" t{at}") for at in range(n - 1)] + [(n - 1, r"(end\n)")]
    rotations = {label.get_rotation() for label in ax.get_xticklabels()}
    if n > 12:
        assert rotations == {45}
    else:
        assert rotations == {0}
    highest, mean = max(bits), statistics.fmean(bits)
    assert (
        drawn.title(ax) == f"The models differ by {highest:.1f} bits at most, {mean:.1f} on average"
    )
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("token of the tuned answer", "divergence (bits)")


def test_sampled_shows_each_share_beside_its_draws():
    tokens = ["In", " At", "others"]
    shares = {}
    for i in range(4):
        chances = dict(zip(tokens, (60 - 9 * i, 30 + i, 10 + 8 * i)))
        drawn_shares = dict(zip(tokens, (57.5 - 8 * i, 32 + i, 10.5 + 7 * i)))
        shares[f"T = {i}"] = {"probability": chances, "drawn": drawn_shares}
    figure = n07.sampled(shares)
    assert drawn.legend(figure.axes[0]) == ["probability", "drawn"]
    for ax, (heading, groups) in zip(figure.axes, shares.items(), strict=True):
        assert drawn.title(ax) == heading
        found = drawn.bars(ax)
        assert list(found) == ["probability", "drawn"]
        for label, boxes in found.items():
            assert [height for *_, height in boxes] == list(groups[label].values())
            assert [bottom for _, bottom, *_ in boxes] == [0, 0, 0]
        for place, (left, right) in enumerate(zip(found["probability"], found["drawn"])):
            assert left[0] + left[2] == pytest.approx(place)
            assert right[0] == pytest.approx(place), "the two touch over their token"
        assert drawn.x_ticks(ax) == list(enumerate(tokens))
        first, second = drawn.fills(ax)
        assert first != second
    assert [ax.get_ylabel() for ax in figure.axes] == ["share (%)", "", "", ""]


def test_merge_ranks_shows_what_is_recorded():
    names = "mean difference (logits)", "answers that change (%)", "held-out loss (nats)"
    ways = "not merged", "dequantized", "packed", "original"
    by_rank = {}
    for i, rank in enumerate((2, 8, 32)):
        found = {}
        for j, way in enumerate(ways):
            found[way] = {name: 0.5 + 4 * i + j + 0.125 * k for k, name in enumerate(names)}
        by_rank[str(rank)] = {"gap": 3.0 + 0.25 * i, "ways": found}
    figure = n07.merge_ranks(by_rank)
    for k, (ax, name) in enumerate(zip(figure.axes, names, strict=True)):
        lines = drawn.lines(ax)
        if k == 0:
            x, y = lines.pop("first to second")
            assert (x.tolist(), y.tolist()) == ([2, 8, 32], [3.0, 3.25, 3.5])
        assert list(lines) == list(ways[1:])
        for way, (x, y) in lines.items():
            assert x.tolist() == [2, 8, 32]
            assert y.tolist() == [by_rank[rank]["ways"][way][name] for rank in by_rank]
        assert len({line.get_color() for line in ax.lines}) == len(ax.lines)
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("rank r", name)
        assert [text for _, text in drawn.x_ticks(ax)] == ["2", "8", "32"]
    assert [ax.get_yscale() for ax in figure.axes] == ["log", "linear", "linear"]
    assert drawn.legend(figure.axes[0]) == ["first to second", *ways[1:]]


def test_what_07_says_of_merging_at_several_ranks():
    """The paragraph under the figure, against the recorded numbers."""
    record, _ = recorded.read("merge_ranks")
    n_changed = set()
    for found in record["by_rank"].values():
        ways = found["ways"]
        before = ways["not merged"]
        assert (
            ways["dequantized"]
            | {"mean difference (logits)": 0.0}
            | {"largest difference (logits)": 0.0}
            == before
        )
        assert ways["dequantized"]["largest difference (logits)"] < 1e-3
        for way in ("packed", "original"):
            assert ways[way]["mean difference (logits)"] < 0.2 * found["gap"]
            assert ways[way]["held-out loss (nats)"] > before["held-out loss (nats)"]
            n_changed.add(round(2.4 * ways[way]["answers that change (%)"]))
    assert record["settings"]["eval_rows"] == 240
    assert (min(n_changed), max(n_changed)) == (0, 8)
    lost = [
        found["ways"]["packed"]["held-out loss (nats)"]
        - found["ways"]["not merged"]["held-out loss (nats)"]
        for found in record["by_rank"].values()
    ]
    assert lost == sorted(lost, reverse=True), "less with a larger rank"
