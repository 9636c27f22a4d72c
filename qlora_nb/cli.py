"""The command line: look at the machine, fetch ahead, plan the memory, run the notebooks.

Every heavy import stands inside the command that needs it, so that `--help` and a misspelt name
answer at once. A refusal (`KitError`) is printed as one paragraph on stderr and exits with 2; a
failed notebook exits with 1.
"""

import importlib
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from qlora_nb.errors import KitError


class _Group(TyperGroup):
    """Commands whose refusals are a sentence, not a traceback."""

    def main(self, *args, **options):
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(errors="replace")  # a terminal that knows ASCII alone
        return super().main(*args, **options)

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except (KitError, KeyboardInterrupt) as error:
            said, code = (error, 2) if isinstance(error, KitError) else ("stopped by you", 130)
            typer.echo(f"qlora-nb: {said}", err=True)
            raise SystemExit(code) from None


_ABOUT = "Learn QLoRA by taking it apart, then run it: from an offline CPU to pythia-12b."
app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help=_ABOUT,
)
_PARAMETERS = {"allow_extra_args": True, "ignore_unknown_options": True}
Profile = Annotated[str, typer.Option(help="tiny, smollm2, t4 or full")]


@app.command()
def doctor() -> None:
    """This machine, its packages, the profile that fits. Exits with 1 if a package is missing or
    outside its range.
    """
    from qlora_nb import cards, machine, sources

    with suppress(ImportError, OSError):
        importlib.import_module("torch")  # once loaded it says itself which cards it can use
    here = machine.this_machine()
    for what, how_much in machine.describe(here).items():
        print(f"{what:10} {how_much}")
    if here.gpu_remedy:
        print(f"{'remedy':10} {here.gpu_remedy}")
    for line in cards.remarks(here.gpus, here.system):
        print(line)
    constraints = sources.project_root() / "constraints.txt"
    pins = constraints.read_text() if constraints.is_file() else ""
    versions = machine.versions()
    for version in versions:
        pin = re.search(rf"^{version.package}==([^\s;]+)", pins, re.MULTILINE)
        tested = (
            f"tested with {pin[1]}"
            if pin and pin[1] != str(version.installed).split("+")[0]
            else ""
        )
        print(
            f"  {version.package:18} {version.installed or '-':12} {version.problem or tested or 'ok'}"
        )
    print(
        f"hub: {sources.hub_endpoint()} {'can' if sources.hub_is_reachable() else 'cannot'} be reached"
    )
    print(f"take this profile: {_fitting_profile(here)}")
    raise typer.Exit(1 if any(version.problem for version in versions) else 0)


@app.command()
def fetch(what: Annotated[str, typer.Argument(help="smollm2, or a hub model such as EleutherAI/pythia-410m")],
          dataset: Annotated[bool, typer.Option("--dataset", help="the name is a data set's")] = False) -> None:  # fmt: skip
    """Download a model or a data set ahead. Run it again after a cut: whole files are kept."""
    from qlora_nb.model import fetch

    if what == "smollm2":
        fetch.fetch_smollm2()
    else:
        fetch.fetch_repo(what, "dataset" if dataset else "model")


@app.command(context_settings=_PARAMETERS)
def plan(ctx: typer.Context, profile: Profile = "tiny",
         gpu_gib: Annotated[float | None, typer.Option(help="memory of the card you mean (GiB)")] = None) -> None:  # fmt: skip
    """Every byte at the peak of a run before anything is loaded, and what would lower it.
    Parameters: -p NAME VALUE.
    """
    from qlora_nb.settings import validate

    settings = validate({"profile": profile, **_parameters(ctx.args), "gpu_gib": gpu_gib})
    from qlora_nb import sources
    from qlora_nb.memory import budget, estimates
    from qlora_nb.memory.plan import plan_of
    from qlora_nb.model import configs

    config, on_gpu = configs.config_of(settings.model_id), gpu_gib is not None or None
    train = budget.peak(plan_of(settings, True, config, on_gpu))
    print(train, budget.peak(plan_of(settings, False, config, on_gpu)), sep="\n\n", end="\n\n")
    size = sources.download_bytes(settings.model_id)
    print(
        f"download and disk: {f'{size / 1e9:.1f} GB' if size else 'nothing, or known only to the hub'}"
    )
    print(
        f"host memory while loading onto a GPU: {estimates.host_bytes(config) / 2**30:.1f} GiB (assumed)"
    )
    rate, where = (
        estimates.operations_per_s(),
        "here: operations over this device's measured float32 rate",
    )
    if gpu_gib is not None:
        rate, where = (
            estimates.T4_OPERATIONS_PER_S,
            "on a T4: operations over a quarter (assumed) of its published rate",
        )
    least_s = settings.max_steps * estimates.step_flops(plan_of(settings, True, config)) / rate
    print(f"time: {settings.max_steps} steps take at least {least_s / 3600:.2g} h {where}")
    print(budget.advice(settings, gpu_gib))
    for option in budget.options(settings, config, on_gpu):
        print(f"  option: {option}")
    print(settings.papermill_line())
    raise typer.Exit(1 if gpu_gib is not None and train.total_gib > gpu_gib else 0)


@app.command(context_settings=_PARAMETERS)
def generate(ctx: typer.Context, profile: Profile = "tiny",
             prompts: Annotated[str, typer.Option(help="a .txt with a prompt a line, or a data file; else the profile's")] = "",
             out: Annotated[str, typer.Option(help="a .jsonl for the answers; called again it goes on [printed]")] = "",
             base: Annotated[bool, typer.Option("--base", help="without the adapter")] = False) -> None:  # fmt: skip
    """Answer prompts greedily with the tuned model, in batches. Parameters: -p NAME VALUE, as -p
    adapter runs/…/adapter.
    """
    from qlora_nb.settings import resolve

    settings = resolve({"profile": profile, **_parameters(ctx.args)})
    from qlora_nb.answer import adapters, generate
    from qlora_nb.model import load

    rows = (
        generate.read_rows(prompts, settings.columns)
        if prompts
        else [generate.row_of(p) for p in settings.prompts]
    )
    tokenizer, model = load.load_tokenizer(settings), load.load_base(settings)
    if not base:
        folder, where_from = adapters.find_adapter(settings)
        model = adapters.load_adapter(model, folder)
        print(where_from)
    if out:
        print(
            f"{generate.answer_file(model, tokenizer, rows, Path(out), settings)} of {len(rows)} answered into {out}"
        )
        return
    for row, text in zip(rows, generate.answer_all(model, tokenizer, rows, settings), strict=True):
        print(f"{row['instruction']}\n    {text!r}")


@app.command(context_settings=_PARAMETERS)
def run(ctx: typer.Context, profile: Profile = "tiny",
        only: Annotated[str, typer.Option(help="beginnings of notebook names, as 03,04")] = "",
        out: Annotated[str | None, typer.Option(help="folder for everything written [runs]")] = None,
        resume: Annotated[str, typer.Option(help="latest, or a sequence folder to go on with")] = "no") -> None:  # fmt: skip
    """Execute the notebooks in order and write a report. Parameters as papermill takes them: -p
    NAME VALUE.
    """
    from qlora_nb.batch import sequence

    given = {
        "profile": profile,
        **({"output_dir": str(Path(out).absolute())} if out else {}),
        **_parameters(ctx.args),
    }
    summary = sequence.run_sequence(
        given, [part.strip() for part in only.split(",")] if only else None, resume=resume
    )
    raise typer.Exit(0 if summary["status"] == "done" else 1)


@app.command()
def lab(
    no_browser: Annotated[
        bool, typer.Option("--no-browser", help="only copy the notebooks")
    ] = False,
) -> None:
    """JupyterLab on your own copies in my_notebooks/, without outputs, so that your guess comes
    before the answer.
    """
    from qlora_nb import sources

    root = sources.project_root()
    copy_for_learning(root / "notebooks", root / "my_notebooks")
    if not no_browser:
        raise typer.Exit(
            subprocess.call([sys.executable, "-m", "jupyter", "lab", "my_notebooks"], cwd=root)
        )


def copy_for_learning(source: Path, target: Path) -> list[Path]:
    """Copy notebooks without outputs; a copy that is already there is the learner's own and is
    never touched.
    """
    import nbformat

    from qlora_nb.batch import sequence
    from qlora_nb.record import files

    notebooks, fresh = sequence.choose(source), []
    with files.writing(target, "make room there, or remove what is in the way"):
        target.mkdir(exist_ok=True)
        for path in notebooks:
            copy = target / path.name
            if copy.exists():
                print(f"kept your {copy.name} (remove it to get a fresh copy)")
                continue
            notebook = sequence.read_notebook(path)
            for cell in notebook.cells:
                if cell.cell_type == "code":
                    cell.outputs, cell.execution_count = [], None
            nbformat.write(notebook, copy)
            fresh.append(copy)
    print(f"{len(fresh)} fresh copies in {target}")
    return fresh


def _parameters(args: list[str]) -> dict[str, object]:
    """`-p NAME VALUE` as often as wanted; typer has no option of two values that repeats."""
    match args:
        case []:
            return {}
        case ["-p" | "--parameters", name, value, *rest] if name not in (
            others := _parameters(rest)
        ):
            return {name: value} | others
        case ["-p" | "--parameters", name, _, *_]:
            raise KitError("this parameter is given twice", value=name, remedy="give it once")
    raise KitError(
        "this argument is not understood",
        value=args[0],
        allowed="-p NAME VALUE",
        remedy="see qlora-nb run --help",
    )


def _fitting_profile(here) -> str:
    from qlora_nb.memory import preflight
    from qlora_nb.settings import validate

    for name in ("full", "t4") if here.gpus else ():
        settings = validate({"profile": name})
        with suppress(KitError):
            preflight.require_fit(settings, here)
            return f"{name} ({settings.model_id}), or any smaller one"
    return "tiny (ships with the kit); smollm2 after `qlora-nb fetch smollm2`"


if __name__ == "__main__":
    app()
