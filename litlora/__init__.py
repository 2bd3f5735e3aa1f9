"""litlora: fine-tune language models with LoRA, every line readable. Importing it imports no
torch."""

__version__ = "0.1.0"
