"""What is learned with the templates of well-known models, against what transformers renders.

The files in templates/ have the features of those models' templates, in words of our own.
"""

import functools
import json
import re
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import TEXT
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from litlora.data.conversation import Conversation, Message, Place
from litlora.data.encode import Encoded, Encoder
from litlora.errors import DataError
from litlora.prompts import ChatTemplate, PromptStyle, load_template
from litlora.prompts.template import template_message
from litlora.stop_tokens import taught_stops
from litlora.tokenizer import Tokenizer

FILES = {file.stem: file for file in sorted(Path(__file__).with_name("templates").glob("*.jinja"))}
PLACE = Place("x.json", "record 0")
NOT_SPECIAL = ("think", "tool_call", "tool_response", "tool_sep")
"""Marks that models have among their added tokens, but that decoding keeps."""
NEXT = ("glm4", "glm4_5")
"""Those whose turns end with the mark of the next one."""
STOPS = dict.fromkeys(NEXT, ["<|user|>", "<|observation|>", "<|endoftext|>"])
"""What the generation_config.json of a model names, where it matters."""
EOS = {"gpt_oss": "<|return|>", "deepseek_r1": "<｜end▁of▁sentence｜>", "kimi_k2": "[EOS]"}
EOS |= dict.fromkeys(NEXT, "<|endoftext|>")


class Model(NamedTuple):
    """A template with a tokenizer that has its marks as tokens."""

    tokenizer: Tokenizer
    style: PromptStyle
    encoder: Encoder
    directory: Path

    @property
    def template(self) -> ChatTemplate:
        return self.style.template

    def text(self, ids: list[int]) -> str:
        """The ids as text, special tokens included."""
        return backend().decode(ids, skip_special_tokens=False)

    def encode(self, messages: list[Message], *tools: dict) -> Encoded:
        (encoded,) = self.encoder.encode([Conversation(tuple(messages), PLACE, tools)])
        return encoded

    def learned(self, messages: list[Message], *tools: dict) -> list[str]:
        """The texts that are learned, in order."""
        drafts = self.encode(messages, *tools).drafts
        return [self.text(draft.ids[turn.start : turn.stop]) for draft in drafts for turn in draft.turns]

    def asked(self, messages: list[Message], *tools: dict) -> list[int]:
        """The ids that chat asks with after these messages."""
        return self.tokenizer.encode(self.template.render(dicts_of(messages), tools=list(tools) or None))


@functools.cache
def backend() -> Backend:
    found = Backend(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    found.train_from_iterator(TEXT, trainer)
    sources = "".join(file.read_text(encoding="utf-8") for file in FILES.values())
    marks = set(re.findall(r"<\|?[\w▁/]+\|?>|<｜[\w▁]+｜>|\[/?[A-Z_]+\]|\[gMASK\]|<\|\"\|>", sources))
    marks |= {"<s>", "</s>", "<|user|>", "<|observation|>", "<|system|>", "<|assistant|>", *EOS.values()}
    plain = {mark for mark in marks if mark.strip("</>") in NOT_SPECIAL}
    found.add_special_tokens(sorted(marks - plain))
    found.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in sorted(plain)])
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """model("qwen3")"""

    @functools.cache
    def load(name: str) -> Model:
        directory = tmp_path_factory.mktemp(name)
        backend().save(str(directory / "tokenizer.json"))
        settings = {
            "eos_token": EOS.get(name, "</s>"),
            "bos_token": "<s>",
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
        (directory / "tokenizer_config.json").write_text(json.dumps(settings))
        (directory / "chat_template.jinja").write_bytes(FILES[name].read_bytes())
        if name in STOPS:
            ids = [backend().token_to_id(token) for token in STOPS[name]]
            (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
        tokenizer = Tokenizer(directory)
        style = load_template({file.name: file for file in directory.iterdir()}).style
        return Model(tokenizer, style, Encoder(tokenizer, style), directory)

    return load


def system(text: str) -> Message:
    return Message("system", text)


def user(text: str, **more) -> Message:
    return Message("user", text, more=more)


def assistant(text: str, **more) -> Message:
    return Message("assistant", text, train=True, more=more)


def call(number: int = 1, **arguments) -> dict:
    """As OpenAI's form has it: the arguments are JSON text."""
    function = {"name": "look", "arguments": json.dumps(arguments)}
    return {"id": f"call{number:05}", "type": "function", "function": function}


def result(text: str, number: int = 1) -> Message:
    return Message("tool", text, more={"tool_call_id": f"call{number:05}", "name": "look"})


def dicts_of(messages: list[Message]) -> list[dict]:
    return [template_message(m.role, m.content, m.input, m.more) for m in messages]


LOOK = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks out of the window.",
        "parameters": {"type": "object", "properties": {"at": {"type": "string", "description": "Where."}}},
    },
}
TALKS = {
    "plain": [user("the quick"), assistant("yes"), user("and two?"), assistant("one\n\ntwo three")],
    "system": [system("Be brief."), user("dog"), assistant("fox"), user("the"), assistant("quick")],
    "tool": [
        user("weather?"),
        assistant("", tool_calls=[call(at="Rome")]),
        result("sun"),
        assistant("It is sunny."),
        user("thanks"),
        assistant("bye"),
    ],
    "two calls": [
        user("weather?"),
        assistant("", tool_calls=[call(at="Rome"), call(2, at="Oslo")]),
        result("sun"),
        result("rain", 2),
        assistant("Both."),
    ],
    "thought": [
        user("dog"),
        assistant("fox", reasoning_content="why"),
        user("the"),
        assistant("quick", reasoning_content="how"),
    ],
    "thought and tool": [
        user("weather?"),
        assistant("", reasoning_content="look", tool_calls=[call(at="Rome")]),
        result("sun"),
        assistant("sunny", reasoning_content="now I see"),
    ],
    "thought in the content": [user("dog"), assistant("<think>\nwhy\n</think>\n\nfox")],
    "assistant twice": [user("a"), assistant("b"), assistant("c"), user("d"), user("e"), assistant("f")],
    "assistant first": [assistant("hello"), user("dog"), assistant("fox")],
    "name": [user("dog", name="Ada"), assistant("fox")],
}
ENDS = {
    **dict.fromkeys(FILES, ("<|im_end|>", "<|im_end|>")),
    "deepseek_r1": (EOS["deepseek_r1"], EOS["deepseek_r1"]),
    "gemma3": ("<end_of_turn>", "<end_of_turn>"),
    "gemma4": ("<turn|>", "<|tool_response>"),
    **dict.fromkeys(NEXT, (None, None)),
    "gpt_oss": ("<|return|>", "<|call|>"),
    "llama3": ("<|eot_id|>", "<|eom_id|>"),
    **dict.fromkeys(["mistral_tekken", "mistral_v3", "zephyr"], ("</s>", "</s>")),
    "phi4_mini": ("<|end|>", "<|end|>"),
}
"""What answers and calls end with."""
TOOLS, THOUGHTS = {"tool", "two calls", "thought and tool"}, {"thought", "thought and tool"}
REFUSED = {
    **dict.fromkeys(["chatml", "phi4", "phi4_mini", "zephyr"], TOOLS | THOUGHTS),
    "deepseek_r1": {"thought"},
    "gemma3": {*TOOLS, *THOUGHTS, "assistant twice", "assistant first"},
    "gemma4": {"assistant first"},
    **dict.fromkeys(NEXT, set()),
    "gpt_oss": {"two calls", "assistant first"},
    "kimi_k2": {*TOOLS, *THOUGHTS},  # of a call it shows the id, which names the function if it is Kimi's
    "llama3": {"two calls", "assistant first", *THOUGHTS},
    "mistral_tekken": {*THOUGHTS, "assistant first"},
    "mistral_v3": {*THOUGHTS, "assistant twice", "assistant first"},
    "qwen2_5": {*THOUGHTS, "assistant first"},
    "qwen3": {"assistant first"},
    "qwen3_5": {"assistant first"},
    "smollm3": {*TOOLS, *THOUGHTS, "assistant first"},
}
"""What a template has no place for."""
WITH_NAMES = ("kimi_k2",)
"""Those that have one for the names of people."""
WITHOUT_TOOLS = ("deepseek_r1",)
"""Those that show calls, but not the tools themselves."""
REWRITTEN = {("gpt_oss", "thought and tool"), ("qwen3", "assistant twice")}
REWRITTEN |= {("deepseek_r1", talk) for talk in TALKS} | {("kimi_k2", "assistant first")}
"""Where the finished turn, as the template shows it, does not begin with the prompt for it."""


def tools_of(name: str, talk: str) -> list[dict]:
    return [LOOK] if talk in TOOLS and name not in WITHOUT_TOOLS else []


def their_dicts_of(messages: list[Message]) -> list[dict]:
    """The messages as transformers wants them: with an object for the arguments of a call."""
    found = json.loads(json.dumps(dicts_of(messages)))
    for message in found:
        for one in message.get("tool_calls", ()):
            one["function"]["arguments"] = json.loads(one["function"]["arguments"])
    return found


@pytest.mark.parametrize("name", FILES)
def test_each_answer_is_learned_after_the_ids_that_transformers_asks_with(name, model):
    transformers = pytest.importorskip("transformers")
    ours = model(name)
    theirs = transformers.AutoTokenizer.from_pretrained(ours.directory)
    stops = ours.tokenizer.stop_ids | {*taught_stops(ours.tokenizer, ours.style)}
    refused = set()
    for talk, messages in TALKS.items():
        if name == "deepseek_r1" and talk in TOOLS:  # of which transformers drops the content that is null
            continue
        dicts, tools = their_dicts_of(messages), tools_of(name, talk)
        try:
            drafts = ours.encode(messages, *tools).drafts
        except DataError:
            refused.add(talk)
            continue
        turns = [(draft.ids, turn) for draft in drafts for turn in draft.turns]
        answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
        for index, (ids, turn) in zip(answers, turns, strict=True):
            answer = ours.text(ids[turn.start : turn.stop])
            if index > 0:  # transformers takes no conversation without messages
                asked = theirs.apply_chat_template(
                    dicts[:index], tools=tools or None, add_generation_prompt=True, return_dict=False
                )
                assert ids[: turn.start] == asked
            assert ids[turn.stop - 1] in stops
            said = messages[index]
            for text in (
                said.content.partition("<think>")[2] or said.content,
                said.more.get("reasoning_content", ""),
            ):
                assert "".join(text.split()) in "".join(answer.split())
            for one in said.more.get("tool_calls", ()):
                assert "look" in answer and json.loads(one["function"]["arguments"])["at"] in answer
            finished = theirs.apply_chat_template(dicts[: index + 1], tools=tools or None, tokenize=False)
            # What GLM's answers end with is the beginning of the next turn, which is not there yet.
            stop = turn.stop - (name in NEXT)
            if (name, talk) not in REWRITTEN:
                whole = ours.text(ids[:stop])
                assert finished.startswith(whole)
                assert finished.removeprefix(whole) in ("", "\n", "</s>"), "only what follows the end"
            else:
                shown = answer.rpartition("</think>")[2] if name == "deepseek_r1" else answer
                assert finished.removesuffix("\n").endswith(shown), "R1's takes out the thought at once"
    assert refused == REFUSED[name] | (set() if name in WITH_NAMES else {"name"})


@pytest.mark.parametrize("name", FILES)
def test_a_turn_ends_with_the_token_at_which_generation_stops(name, model):
    ours = model(name)
    assert tuple(end and end.name for end in ours.template.turn_ends(ours.tokenizer)) == ENDS[name]
    named = {ours.tokenizer.token(stop) for stop in taught_stops(ours.tokenizer, ours.style)}
    assert named == {EOS.get(name, "</s>"), *ENDS[name]} - {None}


CALLS = {
    "deepseek_r1": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>look\n```json\n"
    '{"at": "Rome"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>',
    "gemma4": '<|tool_call>call:look{at:<|"|>Rome<|"|>}<tool_call|><|tool_response>',
    "glm4": "\n<think></think>\n<tool_call>look\n<arg_key>at</arg_key>\n<arg_value>Rome</arg_value>\n"
    "</tool_call><|observation|>",
    "glm4_5": "\n<think></think>\n<tool_call>look\n<arg_key>at</arg_key>\n<arg_value>Rome</arg_value>\n"
    "</tool_call><|observation|>",
    "gpt_oss": ' to=functions.look<|channel|>commentary json<|message|>{"at": "Rome"}<|call|>',
    "llama3": '{"name": "look", "parameters": {"at": "Rome"}}<|eom_id|>',
    "mistral_tekken": '[TOOL_CALLS]look[ARGS]{"at": "Rome"}</s>',
    "mistral_v3": '[TOOL_CALLS] [{"name": "look", "arguments": {"at": "Rome"}, "id": "call00001"}]</s>',
    "qwen2_5": '<tool_call>\n{"name": "look", "arguments": {"at": "Rome"}}\n</tool_call><|im_end|>',
    "qwen3": "<think>\n\n</think>\n\n"
    '<tool_call>\n{"name": "look", "arguments": {"at": "Rome"}}\n</tool_call><|im_end|>',
    "qwen3_5": "\n</think>\n\n<tool_call>\n<function=look>\n<parameter=at>\nRome\n</parameter>\n</function>\n"
    "</tool_call><|im_end|>",
}


@pytest.mark.parametrize("name", CALLS)
def test_the_call_is_learned_and_the_result_is_not(name, model):
    ours, tools = model(name), tools_of(name, "tool")
    learned = ours.learned(TALKS["tool"], *tools)
    assert learned[0] == CALLS[name] and len(learned) == 3
    ends = ["<|user|>", "<|endoftext|>"] if name in NEXT else [ENDS[name][0]] * 2
    for text, answer, end in zip(learned[1:], ["It is sunny.", "bye"], ends, strict=True):
        assert text.endswith(answer + end)
    assert "sun<" not in "".join(learned) and "weather" not in "".join(learned)
    ids = ours.encode(TALKS["tool"], *tools).drafts[-1].ids
    for part in ("weather?", "sun", "thanks", *(["Looks out of the window."] if tools else [])):
        assert part in ours.text(ids)


@pytest.mark.parametrize(
    ("name", "talk", "learned"),
    [
        ("qwen3", "thought", ["<think>\nwhy\n</think>\n\nfox", "<think>\nhow\n</think>\n\nquick"]),
        ("qwen3_5", "thought", ["why\n</think>\n\nfox", "how\n</think>\n\nquick"]),
        ("qwen3_5", "thought in the content", ["why\n</think>\n\nfox"]),
        ("deepseek_r1", "thought in the content", ["why\n</think>\n\nfox"]),
        ("glm4_5", "thought", ["\n<think>why</think>\nfox", "\n<think>how</think>\nquick"]),
        ("glm4_5", "thought in the content", ["\n<think>why</think>\nfox"]),
        ("glm4", "thought", ["\n<think>why</think>\nfox", "\n<think>how</think>\nquick"]),
        (
            "gemma4",
            "thought",
            ["<|channel>thought\nwhy\n<channel|>fox", "<|channel>thought\nhow\n<channel|>quick"],
        ),
        (
            "gpt_oss",
            "thought",
            [
                f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant<|channel|>final<|message|>{text}"
                for thought, text in (("why", "fox"), ("how", "quick"))
            ],
        ),
    ],
)
def test_a_thought_is_learned_in_the_turn_that_has_it_and_left_out_later(name, talk, learned, model):
    ours = model(name)
    end = ENDS[name][0] or "<|endoftext|>"
    assert ours.learned(TALKS[talk]) == [text + end for text in learned]
    drafts = ours.encode(TALKS[talk]).drafts
    assert len(drafts) == len(learned) and all("why" not in ours.text(draft.ids) for draft in drafts[1:])


def test_gpt_oss_learns_an_answer_after_the_thought_that_its_call_is_asked_with(model):
    ours = model("gpt_oss")
    (draft,) = ours.encode(TALKS["thought and tool"], LOOK).drafts
    text = ours.text(draft.ids).partition("<|start|>user")[2]
    thought, call_end = "<|channel|>analysis<|message|>look<|end|>", '{"at": "Rome"}<|call|>'
    assert text.count(thought) == text.count(call_end) == 1
    assert text.endswith("<|channel|>final<|message|>sunny<|return|>")


def test_kimi_k2_learns_calls_whose_ids_name_the_function(model):
    transformers = pytest.importorskip("transformers")
    ours = model("kimi_k2")
    theirs = transformers.AutoTokenizer.from_pretrained(ours.directory)
    calls = [{**call(at=at), "id": f"functions.look:{n}"} for n, at in enumerate(("Rome", "Oslo"))]
    answers = [user("weather?"), assistant("Wait.", tool_calls=calls)]
    answers += [Message("tool", "sun", more={"tool_call_id": one["id"], "name": "look"}) for one in calls]
    talk = [*answers, assistant("Both.")]
    (draft,) = ours.encode(talk, LOOK).drafts
    shown = [
        f'<|tool_call_begin|>functions.look:{n}<|tool_call_argument_begin|>{{"at": "{at}"}}<|tool_call_end|>'
        for n, at in enumerate(("Rome", "Oslo"))
    ]
    section = f"Wait.<|tool_calls_section_begin|>{''.join(shown)}<|tool_calls_section_end|><|im_end|>"
    assert ours.learned(talk, LOOK) == [section, "Both.<|im_end|>"]
    for index, turn in zip((1, 4), draft.turns, strict=True):
        asked = theirs.apply_chat_template(
            their_dicts_of(talk[:index]), tools=[LOOK], add_generation_prompt=True, return_dict=False
        )
        assert draft.ids[: turn.start] == asked
    finished = theirs.apply_chat_template(their_dicts_of(talk), tools=[LOOK], tokenize=False)
    assert ours.text(draft.ids) == finished


def test_smollm_3_learns_after_the_empty_thought_that_no_think_asks_with(model):
    transformers = pytest.importorskip("transformers")
    ours = model("smollm3")
    theirs = transformers.AutoTokenizer.from_pretrained(ours.directory)
    talk = [system("Be brief. /no_think"), user("dog"), assistant("fox"), user("the"), assistant("quick")]
    (draft,) = ours.encode(talk).drafts
    assert ours.learned(talk) == ["fox<|im_end|>", "quick<|im_end|>"]
    for index, turn in zip((2, 4), draft.turns, strict=True):
        assert ours.text(draft.ids[: turn.start]).endswith("assistant\n<think>\n\n</think>\n")
        asked, finished = dicts_of(talk[:index]), dicts_of(talk[: index + 1])
        asked = theirs.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        assert draft.ids[: turn.start] == asked
        finished = theirs.apply_chat_template(finished, tokenize=False)
        assert finished == ours.text(draft.ids[: turn.stop]) + "\n"


@pytest.mark.parametrize("name", ["chatml", "phi4", "zephyr"])
def test_what_is_learned_is_what_a_template_marks_as_generation(name, model):
    transformers = pytest.importorskip("transformers")
    ours = model(name)
    theirs = transformers.AutoTokenizer.from_pretrained(ours.directory)
    for talk in ("plain", "system", "assistant twice", "assistant first"):
        found = theirs.apply_chat_template(
            dicts_of(TALKS[talk]), return_dict=True, return_assistant_tokens_mask=True
        )
        (draft,) = ours.encode(TALKS[talk]).drafts
        assert draft.ids == found["input_ids"][: len(draft.ids)]
        learned = [number for number, is_said in enumerate(found["assistant_masks"]) if is_said]
        assert learned == [n for turn in draft.turns for n in range(turn.start, turn.stop)]


words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<>"), min_size=1, max_size=8)
answers = st.builds(assistant, words) | st.builds(lambda text: Message("assistant", text), words)
calls = st.builds(lambda text, at: assistant(text, tool_calls=[call(at=at)]), st.just("") | words, words)
thoughts = st.builds(lambda text, why: assistant(text, reasoning_content=why), words, words)
rounds = st.one_of(
    st.tuples(st.builds(user, words), answers),
    st.tuples(st.builds(user, words), calls, st.builds(result, words), answers),
    st.tuples(st.builds(user, words), thoughts),
    st.tuples(answers),
    st.tuples(st.builds(user, words)),
)
talks = st.builds(
    lambda first, rest: [*first, *(message for one in rest for message in one)],
    st.just(()) | st.tuples(st.builds(system, words)),
    st.lists(rounds, min_size=1, max_size=4),
)


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(messages=talks)
def test_any_conversation_is_learned_as_it_is_asked_for_or_refused(model, name, messages):
    ours = model(name)
    tools = [LOOK] if name not in WITHOUT_TOOLS and any(m.role == "tool" for m in messages) else []
    try:
        encoded = ours.encode(messages, *tools)
    except DataError as error:
        assert str(error).startswith("x.json, record 0: ")
        return
    turns = [(draft.ids, turn) for draft in encoded.drafts for turn in draft.turns]
    said = [index for index, message in enumerate(messages) if message.role == "assistant"]
    expected = [index for index in said if messages[index].train] or said[-1:]
    stops = ours.tokenizer.stop_ids | {*taught_stops(ours.tokenizer, ours.style)}
    for index, (ids, turn) in zip(expected, turns, strict=True):
        message = messages[index]
        assert turn.learned == message.train
        assert ids[: turn.start] == ours.asked(messages[:index], *tools)
        *answer, end = ids[turn.start : turn.stop]
        assert end in stops and not {*answer} & {stop for stop in stops if stop != end}
        text = ours.text(answer)
        for part in (message.content, message.more.get("reasoning_content", "")):
            assert "".join(part.split()) in "".join(text.split())
    assert encoded.num_trailing == len(messages) - 1 - expected[-1]
