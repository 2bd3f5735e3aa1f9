"""The styles that come with litlora, and a user's own: what they write, what training learns of it,
what chat asks, and what other programs are given."""

import functools
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_tokenizers import BEGIN, CONTROL, END, KINDS, write_tokenizer

from litlora.data.conversation import Conversation, Message, Place
from litlora.data.examples import tokenize
from litlora.errors import UserError
from litlora.formats.chat_template import add_template
from litlora.prompts import STYLES, PromptStyle, choose_style, control_tokens, load_style, write_style
from litlora.prompts.template import load_template
from litlora.serve.conversation import ChatSession
from litlora.serve.engine import Engine
from litlora.serve.sampling import Sampling
from litlora.settings.styles import BUILT_IN
from litlora.stop_tokens import taught_stops
from litlora.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "the quick"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "and two?"},
]
EXPECTED = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nthe quick<|im_end|>\n"
    "<|im_start|>assistant\nyes<|im_end|>\n<|im_start|>user\nand two?<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nthe quick<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nyes<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nand two?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "[INST] Be brief.\n\nthe quick[/INST] yes</s>[INST] and two?[/INST]",
    "gemma": "<start_of_turn>user\nBe brief.\n\nthe quick<end_of_turn>\n<start_of_turn>model\nyes"
    "<end_of_turn>\n<start_of_turn>user\nand two?<end_of_turn>\n<start_of_turn>model\n",
    "phi": "<|system|>\nBe brief.<|end|>\n<|user|>\nthe quick<|end|>\n<|assistant|>\nyes<|end|>\n"
    "<|user|>\nand two?<|end|>\n<|assistant|>\n",
}
ENDS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "mistral": END, "gemma": "<end_of_turn>"}
ENDS |= {"phi": "<|end|>", "alpaca": END, "plain": END}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
WITH_TOOLS = [
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "2", "name": "add"},
    {"role": "tool", "content": "3", "name": "add"},
    {"role": "assistant", "content": "2."},
]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """model("chatml", kind) -> (directory, tokenizer, style) of a model that has the control tokens of
    a style, as an export of what a run with that style leaves."""

    @functools.cache
    def make(name: str, kind: str = "byte-level") -> tuple:
        directory = write_tokenizer(tmp_path_factory.mktemp("model"), kind, CONTROL.get(name, []))
        tokenizer = Tokenizer(directory)
        style, _ = choose_style(name, None, None, "alpaca", tokenizer)
        write_style(directory, style)
        assert add_template(directory, [directory], tokenizer) == ""
        return directory, tokenizer, style

    return make


@functools.cache
def theirs_of(directory):
    return transformers.AutoTokenizer.from_pretrained(directory)


def conversation(turns: list[tuple[str, str]], system: str = "") -> Conversation:
    messages = [Message("system", system)] if system else []
    for question, answer in turns:
        messages += [Message("user", question), Message("assistant", answer, train=True)]
    return Conversation(tuple(messages), Place("x.json", "record 0"))


def dicts(talk: Conversation) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in talk.messages]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_template_is_its_makers_form_and_what_transformers_renders(name, kind, model):
    directory, tokenizer, style = model(name, kind)
    begin = "" if kind == "byte-level" else BEGIN
    assert style.template.render(TALK) == begin + EXPECTED[name]
    theirs = theirs_of(directory)
    asked = theirs.apply_chat_template(TALK, add_generation_prompt=True, return_dict=False)
    assert tokenizer.encode(begin + EXPECTED[name]) == asked
    assert (
        theirs.apply_chat_template(TALK, add_generation_prompt=True, tokenize=False) == begin + EXPECTED[name]
    )
    assert set(control_tokens(style.template)) == {*CONTROL[name]}
    assert tokenizer.cut_up(control_tokens(style.template)) == []
    assert [tokenizer.token(stop) for stop in taught_stops(tokenizer, style)][-1] == ENDS[name]


@pytest.mark.parametrize("name", BUILT_IN)
def test_what_a_style_cannot_say_is_refused(name, model):
    render = model(name)[2].template.render
    user, assistant = TALK[1:3]
    refused = {
        "a role": [{"role": "critic", "content": "a"}],
        "no text": [{"role": "user", "content": None}],
        "a thought": [user, {**assistant, "reasoning_content": "hm"}],
    }
    if name != "chatml":
        refused["tools"] = WITH_TOOLS
    if name in ("mistral", "gemma"):
        refused |= {
            "two questions": [user, user],
            "an answer first": [assistant],
            "two systems": TALK[:1] * 2,
        }
    for what, messages in refused.items():
        with pytest.raises(UserError, match=f"^prompt style {name}: the chat template refuses"):
            pytest.fail(f"{what}: {render(messages)}")


def test_chatml_writes_tools_as_transformers_renders_them(model):
    directory, _, _ = model("chatml")
    text = theirs_of(directory).apply_chat_template(WITH_TOOLS, tools=[TOOL], tokenize=False)
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    assert f"<tools>\n{json.dumps(TOOL)}\n</tools>" in text
    assert text.endswith(
        f"<|im_start|>assistant\n{call}\n{call}<|im_end|>\n<|im_start|>user\n<tool_response>\n2\n</tool_response>"
        "\n<tool_response>\n3\n</tool_response><|im_end|>\n<|im_start|>assistant\n2.<|im_end|>\n"
    )


words = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="<[|"), max_size=16)
talks = st.lists(st.tuples(words.filter(str.strip), words.filter(str.strip)), min_size=1, max_size=3)
each = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


class Scripted(Engine):
    """Gives the answers of a conversation, and keeps the prompts that ask for them."""

    context, device = 10_000, "cpu"

    def __init__(self, tokenizer: Tokenizer, answers: list[str]) -> None:
        self.tokenizer, self.answers, self.prompts = tokenizer, answers, []

    def generate(self, prompt_ids, sampling, *, stop_ids, generator=None, way=None):
        self.prompts.append(prompt_ids)
        yield from self.tokenizer.encode(self.answers[len(self.prompts) - 1])


@each
@given(st.sampled_from([*BUILT_IN, *STYLES]), st.sampled_from(KINDS), talks)
def test_training_chat_and_transformers_have_the_same_ids(model, name, kind, turns):
    """Of random conversations in every style."""
    directory, tokenizer, style = model(name, kind)
    said = "Be brief." if style.template else ""
    made = tokenize([conversation(turns, said)], tokenizer, style, 10_000)
    (example,) = made.examples
    spans = [list(example.ids[start:stop]) for start, stop in example.learned]
    assert {tokenizer.token(span[-1]) for span in spans} == {ENDS[name]}
    learned = [tokenizer.decode(span[:-1]).strip() for span in spans]
    assert learned == [answer.strip() for _, answer in turns]

    engine = Scripted(tokenizer, [tokenizer.decode(tokenizer.encode(answer)) for _, answer in turns])
    session = ChatSession(engine, style, Sampling(max_new_tokens=64), said or None)
    for question, _ in turns:
        "".join(session.ask(question))
    if engine.answers == [answer for _, answer in turns]:  # a decoder drops a leading space
        assert engine.prompts == [list(example.ids[:start]) for start, _ in example.learned]

    found = theirs_of(directory).apply_chat_template(dicts(conversation(turns, said)), return_dict=False)
    if not made.num_apart:  # those were encoded as chat asks, which no text can express
        assert found[: len(example.ids)] == list(example.ids)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", STYLES)
def test_a_style_without_a_template_is_exported_with_the_ids_of_training(name, kind, model):
    directory, tokenizer, style = model(name, kind)
    turns = [("the fox?", "the dog"), (" one?", "two"), ("three?", "four")]
    (example,) = tokenize([conversation(turns)], tokenizer, style, 10_000).examples
    found = theirs_of(directory).apply_chat_template(dicts(conversation(turns)), return_dict=False)
    assert found == list(example.ids)


def test_a_tokenizer_without_the_control_tokens_is_told(tmp_path):
    directory = write_tokenizer(tmp_path / "bare", "byte-level", ["<|im_start|>"])
    tokenizer = Tokenizer(directory)
    style, reason = choose_style("chatml", None, None, "alpaca", tokenizer)
    assert reason == "as set" and tokenizer.cut_up(control_tokens(style.template)) == ["<|im_end|>"]
    (example,) = tokenize([conversation([("the fox", "yes")])], tokenizer, style, 500).examples
    assert example.ids[-1] == tokenizer.eos_id, "the end-of-text token ends such an answer"
    assert taught_stops(tokenizer, style) == [tokenizer.eos_id]


def test_a_chosen_template_becomes_the_models_own(tmp_path):
    """For every version of litlora and for other programs: the file says `template`, as it always
    could, and the template stands beside it."""
    own = {"chat_template": "the base's own"}
    directory = write_tokenizer(tmp_path / "model", "byte-level", CONTROL["chatml"], **own)
    (directory / "chat_template.json").write_text(json.dumps(own))
    file = tmp_path / "mine.jinja"
    file.write_text("{{ bos_token }}{% for m in messages %}{{ m.content + eos_token }}\n{% endfor %}")
    tokenizer = Tokenizer(directory)
    style, _ = choose_style(str(file), None, None, "alpaca", tokenizer)
    assert (style.name, style.title) == (str(file), "mine.jinja")
    write_style(directory, style)
    file.unlink()
    found = load_template({path.name: path for path in directory.iterdir()})
    stored = load_style(directory, found.style)
    assert (stored.name, stored.title) == ("template", "mine.jinja")
    assert (directory / "prompt_style.yaml").read_text() == "name: mine.jinja\nstyle: template\n"
    assert stored.template.render(TALK[:1]) == style.template.render(TALK[:1]) == "Be brief.</s>\n"
    assert "chat_template" not in json.loads((directory / "tokenizer_config.json").read_text())
    assert not (directory / "chat_template.json").exists()
    assert theirs_of(directory).apply_chat_template(TALK[:1], tokenize=False) == "Be brief.</s>\n"


def test_a_system_message_stays_when_old_turns_are_dropped(model):
    _, tokenizer, style = model("chatml")
    engine = Scripted(tokenizer, ["yes"] * 9)
    engine.context = 120
    session = ChatSession(engine, style, Sampling(max_new_tokens=8), "Be brief.")
    for number in range(6):
        "".join(session.ask(f"question {number}"))
    assert "forgotten" in session.notice
    first = tokenizer.encode("<|im_start|>system\nBe brief.<|im_end|>\n")
    assert all(prompt[: len(first)] == first for prompt in engine.prompts)
    assert max(map(len, engine.prompts)) <= 120 - 8
    with pytest.raises(UserError, match="the question with the system message has .* holds 120"):
        "".join(session.ask("the fox " * 60))


def test_a_system_message_without_a_place_is_refused(model):
    _, tokenizer, style = model("chatml")
    silent, _ = choose_style("phi", None, None, "alpaca", tokenizer)

    def start(style: PromptStyle, system: str) -> None:
        ChatSession(Scripted(tokenizer, []), style, Sampling(max_new_tokens=8), system)

    start(silent, "Be brief.")
    for name in STYLES:
        with pytest.raises(
            UserError, match=f"^system: the prompt style {name} has no place .* chatml, llama3"
        ):
            start(STYLES[name], "Be brief.")
    with pytest.raises(UserError, match="^system: is empty"):
        start(style, " ")
    with pytest.raises(UserError, match="^the system message is not UTF-8"):
        start(style, "\udc80")


def test_calls_of_tools_are_learned_in_chatml(model):
    directory, tokenizer, style = model("chatml")
    call = {"tool_calls": [{"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]}
    messages = (
        Message("user", "1 + 1?"),
        Message("assistant", "", train=True, more=call),
        Message("tool", "2", more={"name": "add"}),
        Message("assistant", "2.", train=True),
    )
    talk = Conversation(messages, Place("x.json", "record 0"), (TOOL,))
    (example,) = tokenize([talk], tokenizer, style, 10_000).examples
    learned = [tokenizer.decode(list(example.ids[start:stop])) for start, stop in example.learned]
    assert learned == ['<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>', "2."]
