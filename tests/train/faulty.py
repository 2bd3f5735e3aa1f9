"""finetune/lora.py with a fault, for tests/train/test_watch.py.

FAULT="METHOD RANK HOW" in the environment: when the rank calls this method of the Trainer after two
steps, it is killed (HOW: SIGKILL), or raises UserError (HOW: error).
"""

import importlib.util
import os
import signal
from pathlib import Path

from litlora import cli
from litlora.errors import UserError
from litlora.settings import FinetuneLoRA

REPO = Path(__file__).parent.parent.parent


def main(settings: FinetuneLoRA) -> None:
    from litlora.train.fit import Trainer

    name, rank, how = os.environ["FAULT"].split()
    real = getattr(Trainer, name)

    def method(self, *arguments):
        if self.at.step == 2 and self.parallel.rank == int(rank):
            if how == "error":
                raise UserError("something that only this rank meets")
            os.kill(os.getpid(), getattr(signal, how))
        return real(self, *arguments)

    setattr(Trainer, name, method)
    spec = importlib.util.spec_from_file_location("command", REPO / "finetune/lora.py")
    command = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(command)
    command.main(settings)


if __name__ == "__main__":
    cli.run(main, FinetuneLoRA)
