"""The method of every command that trains an adapter; what they differ in is the objective."""

from collections.abc import Callable

from litlora import cli
from litlora.data.examples import Examples, tokenize
from litlora.lora import adapter_of, add_lora
from litlora.settings import FinetuneLoRA
from litlora.train.method import Method
from litlora.train.objective import SFT, Objective


def adapter_method(
    settings: FinetuneLoRA,
    objective: Callable[..., Objective] = SFT,
    tokenize: Callable[..., Examples] = tokenize,
) -> Method:
    """Train LoRA, as these settings say, on this objective and on examples that `tokenize` makes."""
    return Method(
        prepare=lambda model: add_lora(model, settings.lora, start=False),  # a run starts it
        trains_base=False,
        dense=settings.lora.modules_to_save,
        content=lambda model: adapter_of(model, settings.lora),
        objective=objective,
        tokenize=tokenize,
        stores="the adapter only",
        resume=cli.RESUME,
        repeat=cli.REPEAT,
        next=cli.chat_with_result(),
    )
