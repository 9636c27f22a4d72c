"""One kind of progress bar, with the time left, for everything that takes longer than two seconds.

In a notebook tqdm would draw a widget, and of a widget nothing is left in what papermill stores and
logs. So bars are text: in a terminal and in a notebook a line that is overwritten, in a file a new
line every two seconds. datasets, transformers, huggingface_hub and PEFT ask `tqdm` or `tqdm.auto`
for their bars, so replacing these two names before they are imported replaces all bars.
"""

import sys

import tqdm.auto
from tqdm.asyncio import tqdm_asyncio

from qlora_nb import processes

SILENT_S = 2.0
"""Work that takes fewer seconds shows no bar."""

IN_KERNEL = type(sys.stdout).__module__.startswith("ipykernel")


class Bar(tqdm_asyncio):
    """tqdm's text bar, silent for the first seconds."""

    def __init__(self, *args, **options):
        options.setdefault("disable", processes.rank() > 0)  # of several processes one speaks
        options.setdefault("delay", SILENT_S)
        options.setdefault("mininterval", 0.1 if sys.stderr.isatty() else SILENT_S)
        # None is stderr, which JupyterLab paints red
        options.setdefault("file", sys.stdout if IN_KERNEL else None)
        super().__init__(*args, **options)

    @staticmethod
    def status_printer(file):
        """How a state of the bar is written: over the last one, in a file under it."""
        if file.isatty() or IN_KERNEL:
            return tqdm_asyncio.status_printer(file)

        def print_line(line: str) -> None:
            if line:
                print(line, file=file, flush=True)

        return print_line


def use_text_bars() -> None:
    """From now on libraries that ask tqdm for a bar get this one; call it before they are
    imported.
    """
    tqdm.tqdm = Bar
    tqdm.auto.tqdm = Bar
