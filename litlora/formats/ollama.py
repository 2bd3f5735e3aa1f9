"""An Ollama Modelfile. Torch-free.

Ollama asks by templates of its own, in the language of Go's text/template. One is composed of what
the model's chat template puts around messages, and compared with it on conversations: what cannot
be composed is not written.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from litlora.formats.gguf_text import Text
from litlora.prompts.template import ChatTemplate, Message, Refusal, template_message

MODELFILE = "Modelfile"
_USER, _ANSWER, _SYSTEM = "USERTEXT", "ANSWERTEXT", "SYSTEMTEXT"


@dataclass(frozen=True)
class Turns:
    """What a chat template writes around the messages of a conversation."""

    first: str
    """Before the first question, if there is no system message."""
    system: str | None
    """Before the system message; None: the template takes none."""
    after_system: str
    """Between it and the first question."""
    answer: str
    """Between a question and its answer."""
    question: str
    """Between an answer and the next question."""
    asking: str
    """After the last question."""

    def text(self, messages: list[Message]) -> str:
        """A conversation that ends with a question."""
        found, before = "", None
        for message in messages:
            found += self._before(message["role"], before) + message["content"]
            before = message["role"]
        return found + self.asking

    def _before(self, role: str, before: str | None) -> str:
        if role == "system":
            return self.system or ""
        if role == "assistant":
            return self.answer
        return {None: self.first, "system": self.after_system}.get(before, self.question)


def turns_of(template: ChatTemplate) -> Turns | None:
    """What a template writes around messages; None if that depends on more than the roles before."""
    user, answer = template_message("user", _USER), template_message("assistant", _ANSWER)
    system = template_message("system", _SYSTEM)
    try:
        first, asking = template.render([user]).split(_USER)
        _, between, _ = template.render([user, answer, user]).split(_USER)
        to_answer, question = between.split(_ANSWER)
    except (ValueError, Refusal):
        return None
    before, after = None, ""
    try:
        before, rest = template.render([system, user]).split(_SYSTEM)
        after, _ = rest.split(_USER)
    except (ValueError, Refusal):
        before, after = None, ""
    found = Turns(first, before, after, to_answer, question, asking)
    talks = [[user], [user, answer, user], [user, answer, user, answer, user]]
    if before is not None:
        talks += [[system, *talk] for talk in talks]
    try:
        same = all(found.text(talk) == template.render(talk) for talk in talks)
    except Refusal:
        return None
    return found if same else None


def go_template(turns: Turns, begin: str) -> str:
    """The template in Ollama's language, without the begin-of-text token, which Ollama adds itself."""
    first, system = turns.first.removeprefix(begin), turns.system
    lines = ['{{ $before := "" }}{{ range .Messages }}']
    if system is not None:
        lines += [f'{{{{ if eq .Role "system" }}}}{_literal(system.removeprefix(begin))}{{{{ .Content }}}}']
        lines += [f'{{{{ else if eq .Role "assistant" }}}}{_literal(turns.answer)}{{{{ .Content }}}}']
    else:
        lines += [f'{{{{ if eq .Role "assistant" }}}}{_literal(turns.answer)}{{{{ .Content }}}}']
    lines += [f'{{{{ else if eq .Role "user" }}}}{{{{ if eq $before "" }}}}{_literal(first)}']
    lines += (
        [f'{{{{ else if eq $before "system" }}}}{_literal(turns.after_system)}'] if system is not None else []
    )
    lines += [f"{{{{ else }}}}{_literal(turns.question)}{{{{ end }}}}{{{{ .Content }}}}{{{{ end }}}}"]
    lines += [
        "{{ $before = .Role }}{{ end }}"
        + f'{{{{ if eq $before "user" }}}}{_literal(turns.asking)}{{{{ end }}}}'
    ]
    return "".join(lines)


def _literal(text: str) -> str:
    """Text that Go's template writes as it is."""
    if any(mark in text for mark in ("{{", "}}", '"""')):
        return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}"
    return text


def write_modelfile(directory: Path, model: str, adapter: str | None, text: Text) -> list[str]:
    """Write a Modelfile for `model`, a file or a model of Ollama's; returns lines for people."""
    turns = turns_of(text.asking.template)
    lines = [f"FROM {model}"]
    if adapter is not None:
        lines.append(f"ADAPTER {adapter}")
    if turns is None:
        return [
            f"note: no {MODELFILE}: what the chat template writes around messages depends on more than their "
            "roles, and Ollama's templates cannot say that; use llama-server of llama.cpp with jinja"
        ]
    begin = text.tokenizer.begin_text if text.asking.begins else ""
    lines.append(f'TEMPLATE """{go_template(turns, begin)}"""')
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in text.stops]
    (directory / MODELFILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    ignored = [] if turns.system is not None else ["note: the chat template takes no system message"]
    return [*ignored, f"next: ollama create NAME -f {MODELFILE}, in the directory"]
