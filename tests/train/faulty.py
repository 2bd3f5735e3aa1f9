"""finetune/lora.py with a fault, for tests/train/test_watch.py.

FAULT="METHOD RANK HOW" in the environment: when the rank calls this method of the Trainer after two
steps, it gets a signal (HOW: SIGKILL, SIGSTOP), raises UserError (HOW: error), hangs while its threads
go on (HOW: hang; ranks then wait 5 seconds for each other, not 30 minutes), or finds that its clock is
a century ahead (HOW: clock).
"""

import importlib.util
import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

from litlora import cli
from litlora.errors import UserError
from litlora.settings import FinetuneLoRA

REPO = Path(__file__).parent.parent.parent


def main(settings: FinetuneLoRA) -> None:
    from litlora.train import interrupts, parallel
    from litlora.train.fit import Trainer

    name, rank, how = os.environ["FAULT"].split()
    real = getattr(Trainer, name)

    def method(self, *arguments):
        if self.at.step == 2 and self.parallel.rank == int(rank):
            if how == "error":
                raise UserError("something that only this rank meets")
            elif how == "hang":
                time.sleep(1000)
            elif how == "clock":
                interrupts.time = SimpleNamespace(monotonic=lambda: time.monotonic() + 3e9)
            else:
                os.kill(os.getpid(), getattr(signal, how))
        return real(self, *arguments)

    if how == "hang":
        parallel.EXCHANGE = timedelta(seconds=5)
    setattr(Trainer, name, method)
    spec = importlib.util.spec_from_file_location("command", REPO / "finetune/lora.py")
    command = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(command)
    command.main(settings)


if __name__ == "__main__":
    cli.run(main, FinetuneLoRA)
