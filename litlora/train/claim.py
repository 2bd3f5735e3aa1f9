"""The claim on a run directory: one run writes there at a time, and what an earlier one left is
kept until the new one has saved something."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from litlora.errors import UserError, setting
from litlora.paths import FINAL
from litlora.storage.atomic import setting_aside, settle
from litlora.train.run_directory import RUN_NAMES


@contextmanager
def claimed(run_dir: Path, *, anew: bool) -> Iterator[Callable[[], None]]:
    """Make the directory, and keep other runs out of it as long as the block, or this process,
    lasts.

    `anew`: the run does not resume, so what an earlier one left there is set aside. Calling what is
    yielded removes it; if the block fails before that, it is put back.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    handle = os.open(run_dir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{setting('out_dir')} {run_dir}: another run is writing there") from None
        except OSError:
            pass  # a file system without locks
        settle(run_dir)
        earlier = [path for pattern in RUN_NAMES for path in run_dir.glob(pattern)] if anew else []
        earlier.sort(key=lambda path: path.name != FINAL)  # a resume looks for it first
        with setting_aside(earlier) as forget:
            yield forget
    finally:
        os.close(handle)
