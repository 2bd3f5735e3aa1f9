"""How a question is put to a model, in training and in chat alike. Torch-free.

- `styles.py`: the prompt styles, and the file that names one;
- `template.py`: a model's own chat template as a style;
- `choice.py`: which style to use, and the chat templates in `templates/`;
- `exchange.py`: the texts in which the answers of a conversation are learned;
- `shown.py`: proof that a chat template leaves nothing out;
- `render.py`: the process in which a chat template runs.
"""

from litlora.prompts.choice import choose_style, control_tokens, lacking_tokens
from litlora.prompts.styles import STYLE_FILE, STYLES, PromptStyle, load_style, write_style
from litlora.prompts.template import ChatTemplate, load_template

__all__ = [
    "STYLES",
    "STYLE_FILE",
    "ChatTemplate",
    "PromptStyle",
    "choose_style",
    "control_tokens",
    "lacking_tokens",
    "load_style",
    "load_template",
    "write_style",
]
