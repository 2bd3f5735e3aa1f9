"""How a question is put to a model, in training and in chat alike. Torch-free.

- `styles.py`: the prompt styles, and which of them to use;
- `template.py`: a model's own chat template as a style;
- `exchange.py`: the texts in which the answers of a conversation are learned;
- `shown.py`: proof that a chat template leaves nothing out;
- `render.py`: the process in which a chat template runs.
"""

from litlora.prompts.styles import STYLE_FILE, STYLES, PromptStyle, choose_style, load_style
from litlora.prompts.template import ChatTemplate, load_template

__all__ = [
    "STYLES",
    "STYLE_FILE",
    "ChatTemplate",
    "PromptStyle",
    "choose_style",
    "load_style",
    "load_template",
]
