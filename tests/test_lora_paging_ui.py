"""Notebooks 02 and 05: exercise checkers, every control at both ends, and what the text says."""

import ast
import io
from functools import partial

import bitsandbytes as bnb
import nbformat
import pytest
import torch
from conftest import NOTEBOOKS
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM

from qlora_nb import cards
from qlora_nb.lessons import n02, n03, n05
from qlora_nb.memory import budget, dry_run, ledger, step_sizes
from qlora_nb.memory.plan import Plan, plan_of
from qlora_nb.model import configs
from qlora_nb.pythia import PYTHIA
from qlora_nb.settings import PROFILES, resolve, validate
from qlora_nb.theory import blockwise, codebooks, lora, paging
from qlora_nb.ui import charts, panels, widgets


def ends(control):
    if hasattr(control, "options"):
        options = [o[1] if isinstance(o, tuple) else o for o in control.options]
        return options[0], options[-1]
    return control.min, control.max


def drive(panel):
    """Every control to both ends, one at a time (the pictures must differ) and all together."""
    assert isinstance(panel.result, Figure)
    *controls, _, shown = panel.children
    for control in controls:
        start = control.value
        pictures = []
        for value in (*ends(control), start):
            panel.result = None
            control.value = value
            if control.value != start or panel.result is not None:
                assert isinstance(panel.result, Figure), (control.description, value)
            pictures.append(shown.value)
        out_of_memory = "Paged: out of memory" in shown.value  # nothing then waits for the bus
        idle = control.description == "bus (GB/s)" and out_of_memory
        assert idle or pictures[0] != pictures[1], control.description
    for k in (0, 1):
        for control in controls:
            control.value = ends(control)[k]
        assert isinstance(panel.result, Figure)
        panel.result.savefig(io.BytesIO())


def update_and_factors():
    torch.manual_seed(0)
    update = torch.randn(48, 24)
    return update, lora.best_rank(update, 24)


def widget_cells(name: str, **names) -> list:
    """The widgets of a notebook, made by its own cells from these names."""
    cells = [
        c.source
        for c in nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4).cells
        if "widgets.explore(" in c.source
    ]
    names |= {
        "PYTHIA": PYTHIA,
        "cards": cards,
        "widgets": widgets,
        "partial": partial,
        "ledger": ledger,
        "Plan": Plan,
        "n02": n02,
        "n05": n05,
    }
    made = []
    for cell in cells:
        *before, last = ast.parse(cell).body
        exec(compile(ast.Module(before, []), name, "exec"), names)
        made.append(eval(compile(ast.Expression(last.value), name, "eval"), names))
    return made


def test_lora_widgets():
    update, factors = update_and_factors()
    made = widget_cells(
        "02_lora", settings=resolve({"r": 8}), shown=update, A_best=factors[0], B_best=factors[1]
    )
    assert len(made) == 1
    drive(*made)


@pytest.mark.parametrize(
    ("pythia", "r", "gib"), [("12b", 16, 24.0), ("12b", 64, 5.0), ("410m", 16, 8.0)]
)
def test_paging_widgets(pythia, r, gib):
    plain, paged = (
        step_sizes.longest_pass(pythia, r, int(gib * 2**30), paged=p) for p in (False, True)
    )
    usual, spike = int(0.98 * plain), plain + max(1, (paged - plain) // 2)
    steps = [
        step_sizes.step_sizes(pythia, r, tokens)
        for tokens in (usual, usual, usual, spike, usual, usual)
    ]
    settings, own = (
        resolve({"pythia": pythia, "r": r, "gpu_gib": gib}),
        step_sizes.step_sizes(pythia, r, 2048),
    )
    made = widget_cells("05_paged_optimizers", settings=settings, own=own, tokens=2048, steps=steps)
    assert len(made) == 2
    for panel in made:
        drive(panel)


def cell_with(name: str, words: str) -> tuple[str, str]:
    """The first code cell of a notebook that holds these words, and the next text after it."""
    cells = nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4).cells
    i = next(i for i, c in enumerate(cells) if c.cell_type == "code" and words in c.source)
    text = next(c for c in cells[i:] if c.cell_type == "markdown")
    return cells[i].source, text.source


def states_that_leave_the_card(pythia: str, r: int) -> int:
    """Bytes of both float32 states of every adapter matrix with 100,000 elements or more, from
    transformers' own modules.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(configs.pythia_config(pythia))
    sides = [
        side
        for m in model.base_model.modules()
        if isinstance(m, torch.nn.Linear)
        for side in m.weight.shape
    ]
    return sum(2 * 4 * r * side for side in sides if r * side >= 100_000)


@pytest.mark.parametrize(
    ("pythia", "r"), [("12b", 8), ("12b", 4), ("12b", 64), ("410m", 16), ("410m", 32), ("14m", 8)]
)
def test_thrashing_moves_the_states_that_are_paged_and_no_others(pythia, r):
    """The figure as notebook 05 draws it; 12b at rank 8 holds 180 MiB of states, of which 123.75
    can leave the card.
    """
    source, _ = cell_with("05_paged_optimizers", "plot_thrashing(")
    names = {
        "own": step_sizes.step_sizes(pythia, r, 2048),
        "paging": paging,
        "n05": n05,
        "ledger": ledger,
    }
    *before, last = ast.parse(source).body
    exec(compile(ast.Module(before, []), "05", "exec"), names)
    ax = eval(compile(ast.Expression(last.value), "05", "eval"), names).axes[0]
    moved, least = (line.get_ydata() for line in ax.lines)
    paged = states_that_leave_the_card(pythia, r)
    assert max(moved) == pytest.approx(2 * paged / 2**30)
    assert max(least) <= 2 * paged / 2**30
    assert moved[-1] == least[-1] == 0
    title = ax.get_title(loc="left")
    assert (
        f"{2 * paged / 2**30:.3g} GiB" in title
        if paged
        else "None of these states is paged" in title
    )


def captioned() -> dict[str, Figure]:
    """Figures of notebooks 01, 02, 03 and 05 as these draw them in profile tiny: (notebook, call) →
    figure.
    """
    full, nf4 = validate({"profile": "full"}), codebooks.nf4_code()
    update, _ = update_and_factors()
    usual = [step_sizes.step_sizes("12b", 8, tokens) for tokens in (17_714, 18_712)]
    share = blockwise.code_usage(blockwise.quantize(update, nf4)[0])
    return {
        ("01_setup", "panels.plan_figure("): panels.plan_figure(full, gpu_gib=12.0),
        ("01_setup", "charts.memory_bars(smaller, 16.0)"): charts.memory_bars(
            {"QLoRA": budget.peak(plan_of(full, on_gpu=True))}, 16.0
        ),
        ("02_lora", "n02.plot_losses("): n02.plot_losses(
            {"a": [1.0, 0.5], "b": [2.0, 2.0], "c": [3.0, 1.0]}, "title"
        ),
        ("02_lora", "n02.plot_captured("): n02.plot_captured(
            dict.fromkeys("ab", lora.captured_energy(update)), 8
        ),
        ("03_nf4_explained", "n03.plot_number_line("): n03.plot_number_line(weight=0.31),
        ("03_nf4_explained", "n03.plot_usage("): n03.plot_usage({"a": share}, nf4),
        ("05_paged_optimizers", "n05.plot_step("): n05.plot_step("12b", 8, 2048, 24.0),
        ("05_paged_optimizers", "n05.plot_run("): n05.plot_run(usual, 24.0),
    }


def test_a_caption_that_names_a_dashed_or_dotted_line_has_one_in_its_figure():
    named = 0
    for (name, call), figure in captioned().items():
        caption = cell_with(name, call)[1].lower()
        drawn = {line.get_linestyle() for ax in figure.axes for line in ax.lines}
        for word, style in {"dashed": "--", "dotted line": ":"}.items():
            assert style in drawn or word not in caption, (name, call, word)
            named += word in caption
    assert named >= 7


def test_8_bit_states_have_two_scales_a_block_as_the_text_says():
    p = torch.nn.Parameter(torch.randn(8192))
    p.grad = torch.randn(8192)
    optimizer = bnb.optim.AdamW8bit([p])
    optimizer.step()
    scales = sum(optimizer.state[p][name].numel() for name in ("absmax1", "absmax2"))
    assert scales == 2 * 8192 // 256
    _, text = cell_with("05_paged_optimizers", '("absmax1", "absmax2")')
    assert "two float32 for each block of 256" in " ".join(text.split())


def test_what_05_says_of_the_table_and_of_the_loss():
    assert step_sizes.state_split("70m", 8)[0] == 0
    paged, fixed = step_sizes.state_split("70m", 128)
    assert paged > fixed, "not every small model pages nothing: the rank counts too"
    _, text = cell_with("05_paged_optimizers", 'compare_guess("paged share"')
    assert "In a small model at a small rank" in text
    config = configs.pythia_config("410m")
    whole, sliced = (
        dry_run.dry_run(Plan(config, length=2048, r=8, loss_chunk=n)).loss for n in (0, 128)
    )
    assert 0 < sliced < whole, "a chunked loss cuts the needle down and does not remove it"
    assert all(
        profile["loss_chunk"].value for profile in PROFILES.values()
    )  # it is a road that the kit takes
