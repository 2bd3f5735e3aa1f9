"""The examples of a run: small data in memory, large data from the cache, which one process of
several makes."""

from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from litlora.data.cache import DataCache, default_place
from litlora.data.conversation import Conversation
from litlora.data.dataset import Dataset, Records
from litlora.data.examples import Examples, NoExampleError, split, tokenize
from litlora.data.parts import Setup
from litlora.data.skipped import Skipped
from litlora.data.store import Store
from litlora.errors import UserError
from litlora.prompts import PromptStyle
from litlora.settings import DataSource
from litlora.tokenizer import Tokenizer
from litlora.train.parallel import Parallel


class Preparation:
    """How conversations become the examples of a run."""

    def __init__(
        self,
        source: DataSource,
        tokenizer: Tokenizer,
        style: PromptStyle,
        max_seq_length: int,
        say: Callable[[str], None],
        parallel: Parallel | None = None,
        tokenize: Callable[..., Examples] = tokenize,
    ) -> None:
        """`tokenize` makes examples of what is in memory."""
        self._source, self._tokenizer, self._style = source, tokenizer, style
        self._limit, self._parallel, self._say = max_seq_length, parallel, say
        self._tokenize = tokenize
        self.notices: list[str] = []
        """What the user must know of the records that were left out of `examples`."""

    def examples(self, dataset: Dataset) -> tuple[Examples, Examples | None]:
        """(training, validation). Raises DataError if no example is left, or for a record that
        cannot be used, unless such ones are left out."""
        fraction, seed = self._source.val_fraction, self._source.split_seed
        data = dataset.conversations
        if dataset.validation is not None:
            return self._all(data), self._all(dataset.validation)
        if not isinstance(data, list):
            return self._stored(data).split(fraction, seed, self._limit)
        train, val = split(data, fraction, seed)
        try:
            return self._all(train), self._all(val) if val else None
        except NoExampleError:
            usable = [number for number, each in enumerate(data) if self._has_example(each)]
            if not usable:
                raise
        # One of the two has nothing but records that are left out.
        self.notices.clear()
        train, val = split(data, fraction, seed, usable)
        return self._all(train), self._all(val) if val else None

    def _has_example(self, conversation: Conversation) -> bool:
        try:
            self._tokenize([conversation], self._tokenizer, self._style, self._limit, Skipped())
        except NoExampleError:
            return False
        return True

    def _all(self, data: list[Conversation] | Records) -> Examples:
        if not isinstance(data, list):
            return self._stored(data).split(0, 0, self._limit)[0]
        skipped = Skipped() if self._source.on_bad == "skip" else None
        found = self._tokenize(data, self._tokenizer, self._style, self._limit, skipped)
        self.notices += skipped.notices() if skipped is not None else []
        return found

    def _stored(self, records: Records) -> Store:
        """The records in the cache. One process makes it, however long that takes: the others wait
        for its lock, as no exchange between processes may wait for hours."""
        style, parallel = self._style, self._parallel
        setup = Setup(self._tokenizer, style.name, style.template, self._limit)
        place = self._source.cache_dir
        cache = DataCache(Path(place).expanduser() if place else default_place(), self._say)
        if parallel is None or parallel.world_size == 1:
            store = cache.get(cache.key(records, setup), records, setup)
        else:
            store = self._made_by_one(cache, records, setup)
        self.notices += store.notices()
        return store

    def _made_by_one(self, cache: DataCache, records: Records, setup: Setup) -> Store:
        parallel = self._parallel
        key, error = None, None
        if parallel.is_main:
            key, error = _or_error(lambda: cache.key(records, setup))
        key, error = parallel.broadcast((key, error))
        if error is None and parallel.is_main:
            with ExitStack() as stack:
                _, error = _or_error(lambda: stack.enter_context(cache.locked(key)))
                parallel.barrier()
                if error is None:
                    _, error = _or_error(lambda: cache.make(key, records, setup))
        elif error is None:
            parallel.barrier()
            with suppress(UserError), cache.locked(key):
                pass
        error = parallel.broadcast(error)
        if error is not None:
            raise error
        return cache.get(key, records, setup)


def _or_error(call: Callable[[], Any]) -> tuple[Any, UserError | None]:
    try:
        return call(), None
    except UserError as error:
        return None, error
