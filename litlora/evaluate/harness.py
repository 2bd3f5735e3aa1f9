"""A model as lm-evaluation-harness asks it; needs the extra `eval`.

Scores are those of the harness's own `hf` model on the same weights: a text is encoded with the
tokens that the tokenizer puts before it, and cut from the left where it is longer than the context.
"""

import difflib
from array import array
from collections.abc import Sequence
from typing import Any

from litlora.data.examples import Example
from litlora.errors import MissingExtraError, UserError, setting
from litlora.evaluate.likelihood import likelihoods
from litlora.evaluate.results import Result
from litlora.evaluate.subject import Subject
from litlora.serve.answer import Request
from litlora.serve.sampling import Sampling
from litlora.settings import HarnessConfig
from litlora.tokenizer import token_text

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise MissingExtraError(
        f"{setting('tasks')} needs lm-evaluation-harness ({str(error).splitlines()[0]}); "
        "install it with: pip install 'litlora[eval]'"
    ) from None

LONGEST_ANSWER = 256
"""Tokens, where a task does not say."""


class HarnessModel(TemplateLM):
    """A subject, in the harness's words."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.subject = subject
        begin = token_text(subject.tokenizer.settings.get("bos_token"))
        self._begin = subject.tokenizer.added_tokens(begin or "")[:1]
        self._begin_text = begin

    @property
    def eot_token_id(self) -> int:
        return self.subject.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context follows: the begin-of-text token, else the end-of-text."""
        return self._begin[0] if self._begin else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        """Names the chat template in the harness's caches."""
        return self.subject.style.title

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        template = self.subject.style.template
        return template.source if chat_template and template is not None else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        template = self.subject.style.template
        return template.render(chat_history, add_generation_prompt=add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        begins = bool(self._begin_text) and string.startswith(self._begin_text)
        begin = not begins if add_special_tokens is None else add_special_tokens
        return self.subject.tokenizer.encode(string, begin=begin)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        examples = []
        for _text, context, continuation in requests:
            if len(continuation) > self.subject.context:
                raise UserError(
                    f"{setting('tasks')}: a continuation has {len(continuation):,} tokens; the model's "
                    f"context holds {self.subject.context:,}"
                )
            ids = (context + continuation)[-(self.subject.context + 1) :]
            examples.append(Example(array("i", ids), ((len(ids) - len(continuation), len(ids)),)))
        found = likelihoods(self.subject.model, examples, self.subject.batch_tokens)
        return [(one.log_prob, one.is_greedy) for one in found]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        windows = []
        for number, request in enumerate(requests):
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.subject.context,
                context_len=1,
            )
            windows += [(number, *make_disjoint_window(window)) for window in rolling]
        totals = [0.0] * len(requests)
        for (number, *_), (log_prob, _) in zip(windows, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += log_prob
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """What follows each context, up to the first of the texts in `until`."""
        found = self.subject.asked([self._request(*request.args) for request in requests])
        return ["".join(token.text for token in tokens) for tokens in found]

    def _request(self, context: str, asked: dict[str, Any]) -> Request:
        asked = normalize_gen_kwargs(asked, LONGEST_ANSWER)
        most = asked["max_gen_toks"]
        if most >= self.subject.context:
            raise UserError(
                f"{setting('tasks')}: an answer may have {most:,} tokens; the model's context holds "
                f"{self.subject.context:,}, the prompt included"
            )
        sampling = Sampling(
            max_new_tokens=most,
            temperature=asked["temperature"] if asked["do_sample"] else 0.0,
            top_p=asked.get("top_p", 1.0),
            stop=tuple(filter(None, asked["until"])),
        )
        prompt = self.tok_encode(context)[-(self.subject.context - most) :]
        return Request(prompt=prompt, sampling=sampling, stop_ids=self.subject.tokenizer.stop_ids)


def run_tasks(subject: Subject, config: HarnessConfig, how: dict[str, Any]) -> list[Result]:
    """The figures of tasks, by the harness's names of them. `how` is what they depend on besides.
    Raises UserError for a task that there is not, and for one whose data cannot be had."""
    if config.chat_template and subject.style.template is None:
        raise UserError(
            f"{setting('chat_template')}: the prompt style {subject.style.title} is no chat template; "
            f"leave it out, or name one as {setting('prompt_style')}"
        )
    manager = _manager(config)
    try:
        found = simple_evaluate(
            HarnessModel(subject),
            tasks=manager.match_tasks(config.tasks),
            num_fewshot=config.num_fewshot,
            limit=config.limit,
            task_manager=manager,
            apply_chat_template=config.chat_template,
            log_samples=False,
        )
    except OSError as error:  # no network, or no such data set
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{setting('tasks')} {' '.join(config.tasks)}: cannot be loaded: {reason}") from None
    asked = {"chat_template": config.chat_template, "num_fewshot": config.num_fewshot, "limit": config.limit}
    return [
        Result(
            measure=f"harness/{task}",
            data=task,
            how=how | asked,
            records=found["n-samples"].get(task, {}).get("effective", 0),
            figures=_figures(values),
        )
        for task, values in found["results"].items()
    ]


def _manager(config: HarnessConfig) -> TaskManager:
    """What knows the tasks. Raises UserError for one that there is not."""
    if config.include_path is not None:  # to read the harness's own takes some twenty seconds
        own = TaskManager(include_path=config.include_path, include_defaults=False)
        if all(own.match_tasks([name]) for name in config.tasks):
            return own
    manager = TaskManager(include_path=config.include_path)
    for name in config.tasks:
        if not manager.match_tasks([name]):
            close = difflib.get_close_matches(name, manager.all_tasks, n=1)
            meant = f"; did you mean {close[0]}?" if close else ""
            raise UserError(f"{setting('tasks')} {name}: the harness has no such task{meant}")
    return manager


def _figures(values: dict[str, Any]) -> dict[str, float]:
    """The harness's figures: `acc,none` as acc, `exact_match,strict-match` as exact_match/strict-match;
    a standard error behind its figure as `acc_stderr`."""
    figures = {}
    for key, value in values.items():
        name, _, filtered = key.partition(",")
        if not filtered or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        is_error = name.endswith("_stderr")
        name = name.removesuffix("_stderr") + ("" if filtered == "none" else f"/{filtered}")
        figures[f"{name}_stderr" if is_error else name] = float(value)
    return figures
