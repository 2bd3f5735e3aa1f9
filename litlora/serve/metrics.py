"""Counters of a server, in the text form of Prometheus."""

from collections import Counter
from collections.abc import Mapping

HELP = {
    "requests_total": ("counter", "Requests for answers, by status."),
    "prompt_tokens_total": ("counter", "Tokens of prompts."),
    "reused_prompt_tokens_total": ("counter", "Tokens of prompts that had been computed before."),
    "answer_tokens_total": ("counter", "Tokens of answers."),
    "cancelled_total": ("counter", "Answers whose client went away."),
    "first_token_seconds": ("summary", "From a request to the first token of its answer."),
    "request_seconds": ("summary", "From a request to the end of its answer."),
    "running": ("gauge", "Answers that are being computed."),
    "waiting": ("gauge", "Answers that wait for a place in the batch."),
}


class Metrics:
    """What a server has done so far; kept by one thread."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def add(self, name: str, count: float = 1, status: int | None = None) -> None:
        self.counts[name if status is None else f'{name}{{status="{status}"}}'] += count

    def observe(self, name: str, seconds: float) -> None:
        """One more value of a summary."""
        self.counts[f"{name}_sum"] += seconds
        self.counts[f"{name}_count"] += 1

    def text(self, gauges: Mapping[str, float]) -> str:
        """All of it, with what is so at the moment."""
        lines = []
        values = {**self.counts, **gauges}
        for name, (kind, meaning) in HELP.items():
            lines += [f"# HELP litlora_{name} {meaning}", f"# TYPE litlora_{name} {kind}"]
            found = [key for key in values if key.partition("{")[0] in (name, f"{name}_sum", f"{name}_count")]
            lines += [f"litlora_{key} {values[key]:g}" for key in sorted(found)]
        return "\n".join(lines) + "\n"
