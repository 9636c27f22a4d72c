"""What is run: thin, typed wiring of transformers, PEFT, bitsandbytes, datasets and accelerate."""

from qlora_nb.engine import progress as progress  # before any library asks tqdm for a bar
