"""Conversations in token ids: what transformers makes of them, and what chat asks, turn by turn."""

import functools
import json
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import TEXT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from litlora.data.conversation import Conversation, Message, Place
from litlora.data.encode import Encoder
from litlora.data.examples import tokenize
from litlora.data.records import RecordReader
from litlora.data.skipped import Skipped
from litlora.errors import CheckpointError, DataError
from litlora.load import load
from litlora.prompts import STYLES, load_template
from litlora.serve.conversation import ChatSession
from litlora.serve.engine import Engine
from litlora.serve.sampling import Sampling
from litlora.tokenizer import Tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_2 = (
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<s>[INST] ' }}"
    "{% if system and loop.index0 == 1 %}{{ '<<SYS>>\n' + system + '\n<</SYS>>\n\n' }}{% endif %}"
    "{{ m.content + ' [/INST]' }}{% elif m.role == 'assistant' %}{{ ' ' + m.content.strip() + ' </s>' }}"
    "{% endif %}{% endfor %}"
)
TIGHT = (  # no space between the mark and the answer
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
THOUGHTFUL = (  # earlier answers lose their thoughts, the last one gets one
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CLOSES_THE_THOUGHT = (  # what it asks with is not the begin of what it shows
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{{ (m.content if '<think>' in m.content else '<think></think>' + m.content) + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from(["\n\n", " a", "e "])
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


@functools.cache
def byte_level() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT, trainer)
    return backend


@functools.cache
def sentencepiece(scheme: str) -> Backend:
    """As `tokenizers` reads a SentencePiece model: ▁ for a space, and one before the text."""
    backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)  # no piece spans words
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=390, special_tokens=pieces, show_progress=False, max_token_length=8
    )
    backend.train_from_iterator([*TEXT, "yes no Be brief. [INST] <|user|>"], trainer)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    file = json.loads(backend.to_str())
    file["added_tokens"] = [token for token in file["added_tokens"] if token["content"] in SPECIAL]
    return Backend.from_str(json.dumps(file))


TOKENIZERS = {
    "byte-level": byte_level,
    "metaspace first": lambda: sentencepiece("first"),
    "metaspace always": lambda: sentencepiece("always"),
}
TEMPLATES = {"chatml": CHATML, "llama 2": LLAMA_2, "tight": TIGHT, "thoughtful": THOUGHTFUL}


def conversation(*turns: tuple[str, str], system: str = "") -> Conversation:
    messages = [Message("system", system)] if system else []
    for question, answer in turns:
        messages += [Message("user", question), Message("assistant", answer, train=True)]
    return Conversation(tuple(messages), Place("x.json", "record 0"))


TALK = conversation(("the quick", "yes"), ("and two?", "one two three"), ("dog", "no"), system="Be brief.")


@pytest.fixture
def place(tmp_path):
    """place("byte-level", "chatml") writes a tokenizer and its template."""
    return writer(tmp_path)


def writer(directory: Path):
    def write(kind: str, template: str | None = None):
        TOKENIZERS[kind]().save(str(directory / "tokenizer.json"))
        settings = {
            "eos_token": "</s>",
            "bos_token": "<s>",
            "unk_token": "<unk>",
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
        if template is not None:
            settings["chat_template"] = TEMPLATES.get(template, template)
        (directory / "tokenizer_config.json").write_text(json.dumps(settings))
        found = load_template({file.name: file for file in directory.iterdir()})
        return Tokenizer(directory), found and found.style

    write.directory = directory
    return write


def dicts(talk: Conversation) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in talk.messages]


@pytest.mark.parametrize("template", ["chatml", "llama 2", "tight"])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_whole_conversation_has_the_ids_of_apply_chat_template(kind, template, place):
    transformers = pytest.importorskip("transformers")
    tokenizer, style = place(kind, template)
    theirs = transformers.AutoTokenizer.from_pretrained(place.directory)
    made = tokenize([TALK], tokenizer, style, 500)
    (example,) = made.examples
    assert made.num_apart == made.num_split == 0
    expected = theirs.apply_chat_template(dicts(TALK), return_dict=False)
    assert list(example.ids) == expected[: len(example.ids)]
    assert theirs.decode(expected[len(example.ids) :]).strip() == ""
    end = {"chatml": "<|im_end|>"}.get(template, "</s>")
    said = [message.content for message in TALK.messages if message.role == "assistant"]
    assert len(example.learned) == len(said)
    for number, ((start, stop), answer) in enumerate(zip(example.learned, said, strict=True)):
        assert tokenizer.token(example.ids[stop - 1]) == end
        assert tokenizer.decode(list(example.ids[start : stop - 1])).strip() == answer
        asked = theirs.apply_chat_template(
            dicts(TALK)[: 2 * number + 2], add_generation_prompt=True, return_dict=False
        )
        assert list(example.ids[:start]) == asked, "training learns what follows chat's prompt"


def test_a_sentencepiece_answer_gets_no_space_of_its_own(place):
    tokenizer, style = place("metaspace first", "tight")
    (example,) = tokenize([conversation(("dog", "yes"))], tokenizer, style, 500).examples
    ((start, stop),) = example.learned
    pieces = [tokenizer.token(index) for index in example.ids[start:stop]]
    assert "".join(pieces) == "yes</s>", pieces
    (example,) = tokenize([conversation(("dog", "yes"))], tokenizer, STYLES["alpaca"], 500).examples
    ((start, stop),) = example.learned
    assert "".join(tokenizer.token(index) for index in example.ids[start:stop]) == "yes</s>"


@pytest.mark.parametrize(
    "style",
    [
        *("alpaca", "chatml", "thoughtful"),
        *(pytest.param(style, marks=pytest.mark.slow) for style in ("plain", "llama 2", "tight")),
    ],
)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_chat_asks_with_the_ids_after_which_the_answers_were_learned(kind, style, place, base):
    tokenizer, template = place(kind, style if style in TEMPLATES else None)
    talk = conversation(("the quick", "yes"), ("and two?", "one two three"), ("dog", "no"))
    style = template or STYLES[style]
    examples = tokenize([talk], tokenizer, style, 500).examples
    learned = [(list(e.ids[:start]), list(e.ids[start:stop])) for e in examples for start, stop in e.learned]
    asked = []

    class Scripted(Engine):
        context = 10_000

        def generate(self, prompt_ids, sampling, *, stop_ids, generator=None, way=None):
            asked.append(prompt_ids)
            answer = learned[len(asked) - 1][1]
            assert answer[-1] in stop_ids
            yield from answer[:-1]

    session = ChatSession(Scripted(load(base).model, tokenizer), style, Sampling(max_new_tokens=1))
    for message in talk.messages[::2]:
        list(session.ask(message.content))
    assert asked == [prompt for prompt, _ in learned]


def test_turns_that_a_template_rewrites_are_learned_one_by_one_as_they_are_asked_for(place):
    tokenizer, style = place("byte-level", "thoughtful")
    made = tokenize([conversation(("dog", "yes"), ("fox", "no"))], tokenizer, style, 500)
    texts = ["".join(map(tokenizer.token, e.ids)).replace("Ċ", "\n") for e in made.examples]
    thought = "<think>\n\n</think>\n\n"
    first, second = "<|im_start|>user\ndog<|im_end|>\n", "<|im_start|>user\nfox<|im_end|>\n"
    assert texts == [
        f"{first}<|im_start|>assistant\n{thought}yes<|im_end|>",
        f"{first}<|im_start|>assistant\nyes<|im_end|>\n{second}<|im_start|>assistant\n{thought}no<|im_end|>",
    ]
    assert [len(example.learned) for example in made.examples] == [1, 1]
    assert made.num_split == 1
    assert made.notices(500) == [
        "1 conversations became an example for each answer: "
        "the chat template shows earlier turns otherwise than it asks for them"
    ]


def test_an_answer_that_shares_a_token_with_its_prompt_is_encoded_as_chat_asks(place):
    tokenizer, _ = place("byte-level")
    assert len(tokenizer.encode("the")) == 1
    made = tokenize([conversation(("th", "e"))], tokenizer, STYLES["plain"], 500)
    (example,) = made.examples
    assert list(example.ids) == [*tokenizer.encode("th"), *tokenizer.encode("e"), tokenizer.eos_id]
    assert "1 answers share a token with their prompts" in made.notices(500)[0]


def test_turns_of_a_style_without_a_template_follow_each_other(tokenizer_dir):
    tokenizer, alpaca = Tokenizer(tokenizer_dir), STYLES["alpaca"]
    turns = [("Count.", "one two"), ("More.", "three")]
    (example,) = tokenize([conversation(*turns)], tokenizer, alpaca, 500).examples
    ids, spans = [], []
    for question, answer in turns:
        ids += tokenizer.encode(alpaca.render(question, ""), begin=True)
        start = len(ids)
        ids += [*tokenizer.encode(answer), tokenizer.eos_id]
        spans.append((start, len(ids)))
    assert (list(example.ids), list(example.learned)) == (ids, spans)


def test_a_message_that_is_not_for_training_stands_in_the_text_unlearned(tokenizer_dir):
    talk = conversation(("Count.", "one"), ("More.", "two"))
    told = [*talk.messages[:1], Message("assistant", "one"), *talk.messages[2:]]
    tokenizer = Tokenizer(tokenizer_dir)
    (whole,) = tokenize([talk], tokenizer, STYLES["alpaca"], 500).examples
    told = Conversation(tuple(told), talk.place)
    (part,) = tokenize([told], tokenizer, STYLES["alpaca"], 500).examples
    assert part.ids == whole.ids and part.learned == whole.learned[1:]


def test_a_long_conversation_loses_its_last_turns_and_says_so(tokenizer_dir):
    tokenizer, plain = Tokenizer(tokenizer_dir), STYLES["plain"]
    talk = conversation(("one?", "two"), ("three?", "four five six"), ("seven?", "eight"))
    (whole,) = tokenize([talk], tokenizer, plain, 500).examples
    ends = [stop for _, stop in whole.learned]
    fits = tokenize([talk], tokenizer, plain, ends[1])
    assert fits.examples[0].ids == whole.ids[: ends[1]] and fits.examples[0].learned == whole.learned[:2]
    assert (fits.num_cut, fits.num_shortened, fits.num_left_out) == (0, 1, 0)
    cut = tokenize([talk], tokenizer, plain, ends[1] - 1)
    (example,) = cut.examples
    assert list(example.ids) == [*whole.ids[: ends[1] - 2], tokenizer.eos_id]
    assert example.learned == (whole.learned[0], (whole.learned[1][0], ends[1] - 1))
    assert (cut.num_cut, cut.num_shortened) == (1, 1)
    first = tokenize([talk], tokenizer, plain, whole.learned[1][0] + 1)
    assert first.examples[0].learned == whole.learned[:1], "no room for a token and the end of the second"
    assert [line.split(":")[1] for line in first.notices(9)] == [" their last turns were left out"]


def test_empty_answers_are_counted(tokenizer_dir):
    talks = [conversation(("a", "")), conversation(("a", "b"), ("c", " "))]
    made = tokenize(talks, Tokenizer(tokenizer_dir), STYLES["alpaca"], 500)
    assert made.num_empty == 2
    assert made.notices(500) == ["2 answers are empty: only their end is learned"]


@pytest.mark.parametrize("name", ["alpaca", "plain"])
def test_a_system_message_needs_a_style_that_has_one(name, tokenizer_dir):
    with pytest.raises(
        DataError, match=rf"x.json, record 0: has a system message.*style {name} .*ignore '\[system\]'"
    ):
        tokenize([TALK], Tokenizer(tokenizer_dir), STYLES[name], 500)


THOUGHT = conversation(("dog", "<think>why</think>yes"), system="Be brief.")
LEFT_OUT = CHATML.replace("m.content", "m.content.split('</think>')[-1]")
OPENS_A_THOUGHT = LEFT_OUT.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'")
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
DROPS_SYSTEM = CHATML.replace("in messages", "in messages if m.role != 'system'")
NO_ANSWER = CHATML.replace("m.content", "(m.content if m.role == 'user' else '')")


@pytest.mark.parametrize(
    ("template", "talk", "says"),
    [
        (LEFT_OUT, THOUGHT, "leaves out the answer '<think>.*such as a thought .* prompt_style alpaca$"),
        (NO_ANSWER, conversation(("dog", "yes")), "leaves out the answer 'yes'.* prompt_style alpaca"),
        (NO_SYSTEM, TALK, r"refuses the conversation: no system role; without .* ignore '\[system\]' if"),
        (DROPS_SYSTEM, TALK, r"leaves out the system message; without .* ignore '\[system\]' if"),
        (CHATML, conversation(("dog", "y" * 10_000_001)), "has 10,000,004 characters.*split the record"),
        (CHATML.replace("m.content", "m.content * 9"), conversation(("dog", "y" * 2_000_000)), "split it"),
    ],
    ids=["thought", "no answer", "no system", "drops system", "long", "long as written"],
)
def test_a_record_that_the_template_cannot_show_is_named_with_the_remedy(template, talk, says, place):
    tokenizer, style = place("byte-level", template)
    with pytest.raises(DataError, match=f"^x.json, record 0: .*{says}"):
        tokenize([talk], tokenizer, style, 500)


def test_the_end_of_a_short_answer_is_not_searched_for_in_the_mark(place):
    """An answer that is also part of the template's own words, in a template that rewrites it."""
    tokenizer, style = place("byte-level", OPENS_A_THOUGHT)
    (example,) = tokenize([conversation(("dog", "e"))], tokenizer, style, 500).examples
    ((start, stop),) = example.learned
    assert list(map(tokenizer.token, example.ids[start:stop])) == ["e", "<|im_end|>"]


def test_an_answer_may_have_spaces_around_it_where_a_template_drops_the_thought_it_asks_with(place):
    tokenizer, style = place("byte-level", OPENS_A_THOUGHT.replace("m.content.strip()", "m.content"))
    (example,) = tokenize([conversation(("dog", " fox \n\n"))], tokenizer, style, 500).examples
    ((start, stop),) = example.learned
    asked = style.template.render([{"role": "user", "content": "dog"}])
    assert asked.endswith("<think>\n") and list(example.ids[:start]) == tokenizer.encode(asked)
    assert tokenizer.decode(list(example.ids[start:stop])) == " fox \n\n"


@pytest.mark.parametrize(
    ("answer", "learned"),
    [
        ("fox", "</think>fox<|im_end|>"),
        ("", "</think><|im_end|>"),
        ("<think>\nwhy\n</think>\nfox", "why\n</think>\nfox<|im_end|>"),
        ("<think>why</think>fox", "why</think>fox<|im_end|>"),
    ],
)
def test_an_answer_ends_the_thought_that_its_prompt_begins_as_the_template_does(answer, learned, place):
    """Nemotron 3 asks with <think> and a line end, and writes an answer without a thought after
    <think></think>."""
    tokenizer, style = place("byte-level", CLOSES_THE_THOUGHT)
    (encoded,) = Encoder(tokenizer, style).encode([conversation(("dog", answer))])
    (draft,) = encoded.drafts
    (turn,) = draft.turns
    asked = style.template.render([{"role": "user", "content": "dog"}])
    assert asked.endswith("assistant\n<think>\n") and draft.ids[: turn.start] == tokenizer.encode(asked)
    assert draft.ids[turn.start : turn.stop] == tokenizer.encode(learned)


@pytest.mark.parametrize(
    ("marks", "at_the_end", "end"),
    [
        ("<|im_end|></s>", "", ["<|im_end|>", "</s>"]),  # as Command A does
        ("<|im_end|>", "</s>", ["<|im_end|>"]),  # as Phi 4 mini does
    ],
)
def test_a_turn_ends_with_the_mark_at_which_generation_stops_if_every_turn_has_it(
    marks, at_the_end, end, place
):
    template = CHATML.replace("<|im_end|>", marks) + (
        f"{{% if not add_generation_prompt %}}{{{{ '{at_the_end}' }}}}{{% endif %}}"
    )
    template = template.replace("'\n' }}{% endfor", "' }}{% endfor").replace(f"{marks}\n", marks)
    tokenizer, style = place("byte-level", template)
    (encoded,) = Encoder(tokenizer, style).encode([TALK])
    (draft,) = encoded.drafts
    assert len(draft.turns) == 3
    for turn in draft.turns:
        assert list(map(tokenizer.token, draft.ids[turn.start : turn.stop]))[-len(end) :] == end
        assert draft.ids[turn.start : turn.stop].count(draft.ids[turn.stop - 1]) == 1


def test_a_thought_that_the_prompt_begins_is_learned_from_there(place):
    tokenizer, style = place("byte-level", OPENS_A_THOUGHT)
    (example,) = tokenize([conversation(("dog", "<think>\nwhy</think>e"))], tokenizer, style, 500).examples
    ((start, stop),) = example.learned
    asked = style.template.render([{"role": "user", "content": "dog"}])
    assert asked.endswith("<think>\n") and list(example.ids[:start]) == tokenizer.encode(asked)
    assert list(example.ids[start:stop]) == tokenizer.encode("why</think>e<|im_end|>")


def test_records_with_system_and_history_are_learned_as_what_they_mean(place):
    record = {
        "instruction": "dog",
        "input": "fox",
        "output": "no",
        "system": "Be brief.",
        "history": [["the quick", "yes"], ["and two?", "one two three"]],
    }
    (talk,) = RecordReader("alpaca").read([(Place("x.json", "record 0"), record)])
    tokenizer, style = place("byte-level", "chatml")
    (example,) = tokenize([talk], tokenizer, style, 500).examples
    said = [("system", "Be brief."), ("user", "the quick"), ("assistant", "yes"), ("user", "and two?")]
    said += [("assistant", "one two three"), ("user", "dog\n\nfox"), ("assistant", "no")]
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in said)
    assert list(example.ids) == tokenizer.encode(text.removesuffix("\n"))
    answers = [tokenizer.decode(list(example.ids[start:stop])) for start, stop in example.learned]
    assert answers == ["yes", "one two three", "no"]


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.sampled_from(["alpaca", "plain", "chatml", "tight"]),
    st.lists(st.tuples(texts.filter(len), texts), min_size=1, max_size=4),
)
def test_what_is_learned_is_what_the_assistant_said(place, style, turns):
    """For byte-level tokenizers, whose decoding is exact."""
    tokenizer, template = written(place, "byte-level", style if style in TEMPLATES else None)
    talk = conversation(*turns)
    examples = tokenize([talk], tokenizer, template or STYLES[style], 100_000).examples
    spans = [example.ids[start:stop] for example in examples for start, stop in example.learned]
    assert [tokenizer.decode(list(span[:-1])) for span in spans] == [answer for _, answer in turns]
    ends = {tokenizer.token(span[-1]) for span in spans}
    assert ends == {"<|im_end|>" if style == "chatml" else "</s>"}


def said(role: str, content: str, train: bool = False, **more) -> Message:
    return Message(role, content, train=train, more=more)


def learned_texts(tokenizer, style, messages, tools=()) -> list[str]:
    talk = Conversation(tuple(messages), Place("x.json", "record 0"), tuple(tools))
    (encoded,) = Encoder(tokenizer, style).encode([talk])
    turns = [(draft.ids, turn) for draft in encoded.drafts for turn in draft.turns]
    return ["".join(map(tokenizer.token, ids[turn.start : turn.stop])) for ids, turn in turns if turn.learned]


@pytest.mark.parametrize("style", ["alpaca", "plain", "chatml"])
def test_a_document_is_learned_whole_whatever_the_style(style, place):
    tokenizer, template = place("byte-level", style if style in TEMPLATES else None)
    document = Conversation((Message("text", "one two three", train=True),), Place("x.txt", "record 0"))
    (example,) = tokenize([document], tokenizer, template or STYLES[style], 500).examples
    ids = tokenizer.encode("one two three", begin=True)
    assert list(example.ids) == [*ids, tokenizer.eos_id]
    assert example.learned_spans() == [(1, len(ids) + 1)]


def test_a_document_begins_with_the_begin_of_text(place):
    place("byte-level")
    config = json.loads((place.directory / "tokenizer_config.json").read_text())
    (place.directory / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": True}))
    tokenizer = Tokenizer(place.directory)
    document = Conversation((Message("text", "one", train=True),), Place("x.txt", "record 0"))
    (example,) = tokenize([document], tokenizer, STYLES["plain"], 500).examples
    assert list(map(tokenizer.token, example.ids)) == [
        "<s>",
        *map(tokenizer.token, tokenizer.encode("one")),
        "</s>",
    ]
    assert example.learned_spans() == [(1, len(example.ids))]


def test_a_long_document_is_learned_in_pieces_and_each_token_once(tokenizer_dir):
    tokenizer = Tokenizer(tokenizer_dir)
    document = Conversation((Message("text", "one two three " * 20, train=True),), Place("x.txt", "record 0"))
    (whole,) = tokenize([document], tokenizer, STYLES["plain"], 1000).examples
    for length in (2, 7, len(whole.ids) - 1):
        made = tokenize([document], tokenizer, STYLES["plain"], length)
        assert made.notices(length) == [
            f"1 documents are longer than {length} tokens: they are learned in pieces"
        ]
        learned = [id for e in made.examples for start, stop in e.learned_spans() for id in e.ids[start:stop]]
        assert learned == list(whole.ids[1:]) and max(len(e.ids) for e in made.examples) == length
    assert tokenize([document], tokenizer, STYLES["plain"], len(whole.ids)).examples == [whole]


@pytest.mark.parametrize("style", ["alpaca", "chatml"])
def test_messages_after_the_last_learned_answer_are_left_out_and_counted(style, place):
    tokenizer, template = place("byte-level", style if style in TEMPLATES else None)
    style = template or STYLES[style]
    talk = conversation(("dog", "yes"))
    more = Conversation((*talk.messages, Message("user", "fox")), talk.place)
    whole, longer = (tokenize([one], tokenizer, style, 500) for one in (talk, more))
    assert longer.examples == whole.examples
    assert longer.notices(500) == [
        "1 conversations go on after the last answer that is learned: "
        "what follows it teaches nothing and was left out"
    ]
    if template is not None:
        (encoded,) = Encoder(tokenizer, style).encode(
            [Conversation((*more.messages, said("assistant", "no")), talk.place)]
        )
        assert encoded.num_trailing == 2, "an answer that is not for training teaches nothing either"


def test_without_an_answer_that_is_learned_the_last_one_ends_the_text(place):
    tokenizer, style = place("byte-level", "chatml")
    talk = Conversation((Message("user", "dog"), Message("assistant", "yes")), Place("x.json", "record 0"))
    (encoded,) = Encoder(tokenizer, style).encode([talk])
    ((draft,), turns) = encoded.drafts, encoded.drafts[0].turns
    assert tokenizer.token(draft.ids[-1]) == "<|im_end|>" and [turn.learned for turn in turns] == [False]


CALL = {"id": "call00001", "type": "function", "function": {"name": "look", "arguments": '{"at": "Rome"}'}}
LOOK = {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {}}}
WITH_CALLS = (
    "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ASKS_FIRST = "{{ messages[0].content }}" + CHATML
ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + CHATML
)
ROLES = "{% for m in messages if m.role in ['user', 'assistant'] %}" + CHATML.split("%}", 1)[1]
HALF = CHATML.replace("m.content", "m.content.replace('quick', '')")
NO_TOOLS = WITH_CALLS.replace("t.function.name", "''")
dog, fox = said("user", "dog"), said("assistant", "fox", train=True)
called = said("assistant", "", train=True, tool_calls=[CALL])
thought = said("assistant", "fox", train=True, reasoning_content="why")


@pytest.mark.parametrize(
    ("template", "messages", "tools", "says"),
    [
        (CHATML, [dog], [], "the assistant says nothing in it; it has user$"),
        (CHATML, [], [], "the assistant says nothing in it; it has no message$"),
        (
            ALTERNATE,
            [dog, dog, fox],
            [],
            "messages 0 and 1 are both of the user: join them$",
        ),
        (ALTERNATE, [dog, fox, fox], [], "roles must alternate; messages 1 and 2 are both of the assistant"),
        (ALTERNATE, [fox, dog], [], "roles must alternate; the roles are assistant$"),
        (
            ASKS_FIRST,
            [fox, dog, fox],
            [],
            "cannot ask for an assistant's message .* train: false$",
        ),
        (ROLES, [dog, said("critic", "bad"), fox], [], "leaves out message 1, of the role 'critic': rename"),
        (ROLES, [dog, called, said("tool", "sun"), fox], [], "leaves out a tool call of message 1"),
        (
            WITH_CALLS.replace("t.function.name", "''"),
            [dog, called],
            [LOOK],
            r"leaves out the tools.*'\[tools\]'$",
        ),
        (CHATML, [dog, called], [], "leaves out a tool call of message 1"),
        (
            CHATML,
            [dog, thought],
            [],
            "the thought of message 1",
        ),
        (
            CHATML,
            [said("user", "dog", name="Ada"), fox],
            [],
            "leaves out the name in message 0: take it out",
        ),
        (HALF, [said("user", "the quick fox"), fox], [], "leaves out message 0, of the user"),
        (
            HALF,
            [dog, said("assistant", "the quick fox", train=True)],
            [],
            "leaves out the answer 'the quick fox'",
        ),
        (
            None,
            [dog, called, said("tool", "sun"), fox],
            [],
            "has a message of a tool, .* template has",
        ),
        (
            None,
            [dog, fox],
            [LOOK],
            "has tools, for which .* alpaca has no place: prompt_style template",
        ),
        (
            None,
            [dog, called],
            [],
            "has tool_calls in a message, for which .* alpaca has no place",
        ),
        (
            None,
            [Message("text", "a"), Message("text", "b")],
            [],
            "must have turns .* text, text; prompt_style chatml",
        ),
    ],
)
def test_what_cannot_be_shown_is_refused_in_one_line_with_the_remedy(template, messages, tools, says, place):
    tokenizer, style = place("byte-level", template)
    talk = Conversation(tuple(messages), Place("x.json", "record 0"), tuple(tools))
    encoder = Encoder(tokenizer, style or STYLES["alpaca"])
    with pytest.raises(DataError, match=f"^x.json, record 0: .*{says}") as error:
        encoder.encode([talk])
    assert "\n" not in str(error.value)


def test_an_answer_that_begins_the_conversation_can_be_context(place):
    tokenizer, style = place("byte-level", ASKS_FIRST)
    assert learned_texts(tokenizer, style, [said("assistant", "hello"), dog, fox]) == ["fox<|im_end|>"]


def test_a_result_that_is_dropped_is_missed_although_its_words_stand_elsewhere(place):
    tokenizer, style = place(
        "byte-level", WITH_CALLS.replace("in messages", "in messages if m.role != 'tool'")
    )
    talk = Conversation((said("user", "4"), called, said("tool", "4"), fox), Place("x.json", "record 0"))
    with pytest.raises(DataError, match="leaves out message 2, of the role 'tool'"):
        Encoder(tokenizer, style).encode([talk])


CLOCK = "{{ strftime_now('%H:%M:%S.%f') }}" + CHATML


def test_a_template_that_writes_the_time_writes_one_time_for_a_whole_conversation(place):
    tokenizer, style = place("byte-level", CLOCK)
    (encoded,) = Encoder(tokenizer, style).encode(
        [conversation(("dog", "yes"), ("fox", "no"), ("the", "quick"))]
    )
    (draft,) = encoded.drafts
    assert len(draft.turns) == 3
    first, second = (style.template.render([{"role": "user", "content": "dog"}]) for _ in range(2))
    assert first != second, "but chat is told the time that it is"


@pytest.mark.parametrize("template", ["chatml", "thoughtful"])
def test_a_conversation_of_two_hundred_turns_costs_little(template, place):
    tokenizer, style = place("byte-level", template)
    turns = [(f"the quick {n}", f"one two {n}") for n in range(100)]
    encoder = Encoder(tokenizer, style)
    began = time.process_time()
    (encoded,) = encoder.encode([conversation(*turns)])
    assert time.process_time() - began < 1
    assert len(encoded.drafts) == (1 if template == "chatml" else 100)
    assert sum(len(draft.turns) for draft in encoded.drafts) == 100


pieces = st.sampled_from([*SPECIAL, "\n", " ", "  ", "the", "quick", "é", "😀", "a", "th", "e"]) | texts


@settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.lists(st.lists(pieces, max_size=8), min_size=1, max_size=4),
    st.lists(st.integers(0, 60), max_size=4),
    st.sampled_from(sorted(TOKENIZERS)),
)
def test_the_ids_up_to_a_place_are_those_of_the_text_up_to_there(place, parts, places, kind):
    tokenizer, _ = written(place, kind)
    lines = ["".join("".join(part) for part in parts[: number + 1]) for number in range(len(parts))]
    asked = [(line, sorted(min(place, len(line)) for place in places)) for line in lines]
    for (line, places), (ids, cuts) in zip(asked, tokenizer.encode_cut(asked), strict=True):
        assert ids == tokenizer.encode(line)
        for place, cut in zip(places, cuts, strict=True):
            found = ids[: cut.number] if cut.kept is None else ids[: cut.kept] + cut.others
            assert found == tokenizer.encode(line[:place])


@functools.cache
def known(directory: Path, kind: str, template: str | None):
    directory.mkdir()
    return writer(directory)(kind, template)


def written(place, kind: str, template: str | None = None):
    """As `place`, but one tokenizer for all examples of a test."""
    return known(place.directory / f"{kind}, {template}", kind, template)


@pytest.fixture
def swelling(place) -> Tokenizer:
    """A normalizer makes a text of many z larger than the memory that a tokenizer may have, at once."""
    place("byte-level")
    file = place.directory / "tokenizer.json"
    source = json.loads(file.read_text())
    source["normalizer"] = {"type": "Replace", "pattern": {"String": "z"}, "content": "z" * 10_000}
    file.write_text(json.dumps(source))
    return Tokenizer(place.directory)


def talks_of(*questions: str) -> list[Conversation]:
    return [
        replace(conversation((question, "no")), place=Place("x.jsonl", f"line {number}"))
        for number, question in enumerate(questions)
    ]


TOO_LONG = "has 1,1.*, which is too long for the tokenizer: split the record, or remove it"


@pytest.mark.slow
def test_a_record_that_is_too_long_for_the_tokenizer_is_named_and_left_out(swelling):
    talks, skipped = talks_of("one", "y" * 1_100_000, "z" * 1_100_000, "two"), Skipped()
    found = tokenize(talks, swelling, STYLES["plain"], 100, skipped)
    assert skipped.number == 1 and re.search(f"x.jsonl, line 2: {TOO_LONG}", str(skipped.first[0]))
    assert len(found.examples) == 2 and found.num_left_out == 1  # the y fill the length


@pytest.mark.slow
def test_a_record_that_is_too_long_is_an_error_and_one_that_is_not_is_the_tokenizers_fault(swelling):
    with pytest.raises(DataError, match=f"x.jsonl, line 1: {TOO_LONG}"):
        tokenize(talks_of("one", "z" * 1_100_000), swelling, STYLES["plain"], 100)
    with pytest.raises(CheckpointError, match="tokenizer.json: cannot encode this text"):
        tokenize(talks_of("z" * 500_000), swelling, STYLES["plain"], 100)
