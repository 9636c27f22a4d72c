"""One kind of progress bar, with the time left, for everything that takes longer than two seconds.

In a notebook tqdm would draw a widget, and of a widget nothing is left in what papermill stores and
logs. So bars are text, those of the libraries too (datasets, transformers, huggingface_hub and PEFT
all ask tqdm for theirs): a line that is overwritten in a terminal and in a notebook, in a file a
new line every two seconds. What is done sooner shows nothing.
"""

import sys

import tqdm.auto
from tqdm.asyncio import tqdm_asyncio

SILENT_S = 2.0

IN_KERNEL = type(sys.stdout).__module__.startswith("ipykernel")


class Bar(tqdm_asyncio):
    """tqdm's text bar, silent for the first seconds."""

    def __init__(self, *args, **options):
        often = 0.1 if sys.stderr.isatty() else SILENT_S
        file = sys.stdout if IN_KERNEL else None  # None is stderr, which JupyterLab paints red
        super().__init__(*args, **{"delay": SILENT_S, "mininterval": often, "file": file} | options)

    @staticmethod
    def status_printer(file):
        """How a state of the bar is written: over the last one, in a file under it."""
        if file.isatty() or IN_KERNEL:
            return tqdm_asyncio.status_printer(file)
        return lambda line: line and print(line, file=file, flush=True)


def use_text_bars() -> None:
    """From now on libraries that ask tqdm for a bar get this one; call it before they are
    imported.
    """
    tqdm.tqdm = Bar
    tqdm.auto.tqdm = Bar
