"""What is run: thin, typed wiring of transformers, PEFT, bitsandbytes, datasets and accelerate."""
