"""The forms of records: what each holds, which one records have, and what is wrong with them."""

import json
import pickle
from dataclasses import replace
from typing import get_args

import pytest
import yaml
from conftest import succeeds
from hypothesis import given, settings
from hypothesis import strategies as st

from litlora.data.conversation import Message, Place
from litlora.data.examples import tokenize
from litlora.data.records import FORMS, RecordReader, choose_form
from litlora.data.records.fields import read_record
from litlora.data.sources import read_dataset
from litlora.errors import DataError, UserError
from litlora.prompts import STYLES
from litlora.settings import JSON
from litlora.settings.data import RecordFormat
from litlora.tokenizer import Tokenizer

ASKED, ANSWERED = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hi."}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
CALLED = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
SCHEMA = {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
TOOL = {"type": "function", "function": SCHEMA}
ALPACA = {"instruction": "Say hi.", "output": "Hi."}
place = Place("x.json", "record 0")


def read(form, record, **changes):
    """The one conversation that a record is."""
    (conversation,) = RecordReader(form, **changes).read([(place, record)])
    return conversation


def said(form, record, **changes):
    return [
        (message.role, message.content, message.train) for message in read(form, record, **changes).messages
    ]


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


# ---- random conversations come back from each form

contents = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
names = st.text("abc_", min_size=1, max_size=5)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | contents,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(names, inner, max_size=2),
    max_leaves=4,
)
exchanges = st.lists(st.tuples(contents, contents), min_size=1, max_size=4)
chats = st.builds(
    lambda system, turns: [
        *([Message("system", system)] if system else []),
        *(
            message
            for asked, answer in turns
            for message in (Message("user", asked), Message("assistant", answer, train=True))
        ),
    ],
    contents,
    exchanges,
)


@st.composite
def tool_chats(draw):
    """Chats in which the assistant thinks, calls functions, and is not always learned."""
    messages = []
    for _ in range(draw(st.integers(1, 3))):
        messages.append(Message("user", draw(contents)))
        if draw(st.booleans()):
            arguments = draw(st.dictionaries(names, values, max_size=2))
            call = {"type": "function", "function": {"name": draw(names), "arguments": arguments}}
            messages.append(Message("assistant", draw(contents), train=True, more={"tool_calls": [call]}))
            messages.append(Message("tool", draw(contents), more={"tool_call_id": "c", "name": "f"}))
        more = {"reasoning_content": draw(contents)} if draw(st.booleans()) else {}
        messages.append(Message("assistant", draw(contents), train=draw(st.booleans()), more=more))
    return [*messages, Message("assistant", draw(contents), train=True)]


def as_message(message: Message, role="role", content="content", called=json.dumps) -> dict:
    record = {role: message.role, content: message.content, **message.more}
    if "tool_calls" in message.more:
        record["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": called(call["function"]["arguments"])}}
            for call in message.more["tool_calls"]
        ]
    return record | ({"train": False} if message.role == "assistant" and not message.train else {})


@settings(deadline=None, max_examples=60)
@given(tool_chats(), st.booleans())
def test_chats_with_tools_come_back_from_messages_and_sharegpt(chat, as_text):
    called = json.dumps if as_text else lambda arguments: arguments
    record = {"messages": [as_message(message, called=called) for message in chat], "tools": [TOOL]}
    found = read("messages", json.loads(json.dumps(record)))
    assert list(found.messages) == chat and found.tools == (TOOL,)
    record = {"conversations": [as_message(message, "from", "value", called) for message in chat]}
    found = read("sharegpt", {**record, "tools": json.dumps([SCHEMA])})
    assert list(found.messages) == chat and found.tools == (TOOL,)


@settings(deadline=None, max_examples=60)
@given(chats)
def test_chats_come_back_from_every_form_of_conversations(chat):
    system = chat[0].content if chat[0].role == "system" else None
    *history, (asked, answer) = _pairs(chat)
    record = {
        "instruction": asked.content,
        "output": answer.content,
        "history": [[question.content, reply.content] for question, reply in history],
        "system": system,
    }
    assert list(read("alpaca", record).messages) == chat
    speakers = {"user": "human", "assistant": "gpt"}
    turns = [{"from": speakers[m.role], "value": m.content} for m in chat if m.role != "system"]
    assert list(read("sharegpt", {"conversations": turns, "system": system}).messages) == chat
    messages = [as_message(message) for message in chat]
    record = {"prompt": messages[:-1], "completion": messages[-1:]}
    last_learned = [replace(message, train=message is chat[-1]) for message in chat]
    assert list(read("prompt_completion", record).messages) == last_learned
    assert list(read("messages", {"messages": messages}, learn="last").messages) == last_learned


def _pairs(chat):
    turns = [message for message in chat if message.role != "system"]
    return list(zip(turns[::2], turns[1::2], strict=True))


FIELDS = sorted({name for form in FORMS.values() for name in form.fields})


@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from(list(FORMS)),
    st.dictionaries(
        st.sampled_from(sorted({name for form in FORMS.values() for name in form.fields})), values
    ),
    st.lists(
        st.dictionaries(st.sampled_from(["role", "from", "content", "value", "tool_calls", "train"]), values)
    ),
)
def test_no_record_is_a_crash(form, fields, messages):
    for record in (fields, {**fields, **{name: messages for name in FORMS[form].required}}):
        try:
            read(form, record)
        except DataError as error:
            assert str(error).startswith("x.json, record 0: ") and "\n" not in str(error)


# ---- what each form holds


def test_openais_messages():
    record = {
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "1 "}, {"type": "text", "text": "+ 1?"}]},
            {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None},
            {"role": "tool", "content": "2", "tool_call_id": "c1"},
            {"role": "assistant", "content": "2.", "reasoning_content": "Easy.", "weight": 1},
            {"role": "user", "content": "And?", "name": "Ann"},
            {"role": "assistant", "content": "No.", "weight": 0},
            {"role": "assistant", "content": "Nothing.", "train": False},
        ],
        "tools": [TOOL],
    }
    found = read("messages", record)
    assert found.messages == (
        Message("system", "Be brief."),
        Message("user", "1 + 1?"),
        Message("assistant", "", train=True, more={"tool_calls": [CALLED]}),
        Message("tool", "2", more={"tool_call_id": "c1"}),
        Message("assistant", "2.", train=True, more={"reasoning_content": "Easy."}),
        Message("user", "And?", more={"name": "Ann"}),
        Message("assistant", "No."),
        Message("assistant", "Nothing."),
    )
    assert found.tools == (TOOL,)


def test_functions_of_old():
    record = {
        "messages": [
            ASKED,
            {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": "{}"}},
            {"role": "function", "name": "add", "content": "2"},
            ANSWERED,
        ],
        "functions": [SCHEMA],
    }
    call = {"type": "function", "function": {"name": "add", "arguments": {}}}
    found = read("messages", record)
    assert found.tools == (TOOL,)
    assert found.messages[1] == Message("assistant", "", train=True, more={"tool_calls": [call]})
    assert found.messages[2] == Message("tool", "2", more={"name": "add"})


def test_sharegpt_as_llama_factory_has_it():
    record = {
        "conversations": [
            {"from": "human", "value": "1 + 1?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "2."},
        ],
        "system": "Be brief.",
        "tools": json.dumps([SCHEMA]),
    }
    found = read("sharegpt", record)
    assert [message.role for message in found.messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert found.messages[2].more["tool_calls"][0]["function"] == CALLED["function"]
    assert found.messages[2].train and found.tools == (TOOL,)
    first = [{"from": "system", "value": "Be brief."}, *record["conversations"]]
    assert read("sharegpt", {**record, "conversations": first}) == found, "the same words twice are one"


@pytest.mark.parametrize(
    "names",
    [
        *(("human", "gpt"), ("user", "assistant"), ("user", "chatgpt"), ("human", "bard"), ("User", "bot")),
        *(("USER", "ASSISTANT"), ("Human", "AI"), ("user", "model"), ("human", "bing")),
    ],
)
def test_sharegpt_has_many_names_for_two_speakers(names):
    texts = ["a", "b", "c", "d"]
    expected = [
        ("user", "a", False),
        ("assistant", "b", True),
        ("user", "c", False),
        ("assistant", "d", True),
    ]
    for role, content in (("from", "value"), ("role", "content"), ("role", "value")):
        turns = [{role: names[n % 2], content: text} for n, text in enumerate(texts)]
        assert said("sharegpt", {"conversations": turns}) == expected
        assert said("messages", {"messages": turns}, columns={"role": role, "content": content}) == expected
    assert said("sharegpt", {"conversations": texts}) == expected, "LIMA's"


def test_messages_with_names_of_their_own():
    """LLaMA-Factory's tags, and axolotl's message_property_mappings and roles."""
    talk = [
        {"who": "SHOP", "text": "Be brief."},
        {"who": "customer", "text": "1 + 1?"},
        {"who": "Agent", "calls": [CALL], "why": "Adding."},
        {"who": "CALLS", "text": '{"name": "add", "arguments": {"a": 1}}', "learn": False},
        {"who": "TILL", "text": [{"type": "text", "text": "2"}], "id": 5},
        {"who": "AI", "text": "2."},
    ]
    columns = {"role": "who", "content": "text", "tool_calls": "calls", "thinking": "why", "train": "learn"}
    roles = {"SHOP": "system", "CUSTOMER": "user", "agent": "assistant", "TILL": "tool"}
    changes = {"roles": {**roles, "CALLS": "function_call"}, "ignore": ("talk.id",)}
    for form, name in (("messages", "messages"), ("sharegpt", "conversations")):
        found = read(form, {"talk": talk, "who": None}, columns={**columns, name: "talk"}, **changes)
        roles_found = [message.role for message in found.messages]
        assert roles_found == ["system", "user", "assistant", "assistant", "tool", "assistant"]
        assert [message.train for message in found.messages] == [False, False, True, False, False, True]
        assert [message.content for message in found.messages] == ["Be brief.", "1 + 1?", "", "", "2", "2."]
        assert found.messages[2].more == {"tool_calls": [CALLED], "thinking": "Adding."}
        assert found.messages[3].more["tool_calls"][0]["function"] == CALLED["function"]
    pair = {"prompt": talk[:2], "chosen": talk[-1:], "rejected": talk[-1:]}
    record = read_record(pair, place, columns, (), (), roles)
    assert [message.role for message in FORMS["preference"].pair(record).chosen.messages] == [
        *("system", "user", "assistant"),
    ]


def test_a_role_that_is_set_comes_before_a_known_one():
    turns = [{"role": "assistant", "content": "a"}, {"role": "User", "content": "b"}]
    swapped = {"Assistant": "user", "user": "assistant"}
    expected = [("user", "a", False), ("assistant", "b", True)]
    assert said("messages", {"messages": turns}, roles=swapped) == expected


def test_a_field_of_a_message_whose_name_another_took_is_not_used_silently():
    turns = [{**ASKED, "speaker": "human"}, {"role": "x", "speaker": "bot", "content": "Hi."}]
    with pytest.raises(DataError, match='training would not use: "messages.role"; used are speaker, '):
        read("messages", {"messages": turns}, columns={"role": "speaker"})
    changes = {"columns": {"role": "speaker"}, "ignore": ("messages.role",)}
    assert said("messages", {"messages": turns}, **changes)[1] == ("assistant", "Hi.", True)


@pytest.mark.parametrize(
    ("message", "names"),
    [
        ({"speaker": "EVE", "text": "Hi?"}, "role: speaker, content: text"),
        ({"mood": "calm", "is": "USER", "utterance": "Hi?"}, "role: is, content: utterance"),
        ({"from": "human", "said it": "Hi?"}, 'role: from, content: "said it"'),
        ({"role": "user", "content": "Hi?"}, ""),
    ],
)
def test_the_refusal_of_other_names_says_which_setting_reads_them(message, names):
    record = {"id": 3, "talk": [message, message]}
    columns = f"{{messages: talk{', ' if names else ''}{names}}}"
    with pytest.raises(DataError) as refused:
        choose_form([(place, record)], None, {}, ())
    assert str(refused.value).endswith(f"if \"talk\" are its messages: columns '{columns}'")
    columns, roles = yaml.safe_load(columns), {"EVE": "assistant", "human": "assistant"}
    assert choose_form([(place, record)], None, columns, ()) == "messages"
    roles |= {"USER": "assistant", "user": "assistant"}
    found = said("messages", record, columns=columns, roles=roles, ignore=("id", "talk.mood"))
    assert found == [("assistant", "Hi?", True)] * 2


def test_prompts_and_completions():
    expected = [("user", "Hi?", False), ("assistant", "Hi.", True)]
    for prompt in ("Hi?", [ASKED]):
        for completion in ("Hi.", [ANSWERED]):
            assert said("prompt_completion", {"prompt": prompt, "completion": completion}) == expected
    record = {"q": "Hi?", "a": "Hi.", "prompt": None}
    assert said("prompt_completion", record, columns={"prompt": "q", "completion": "a"}) == expected
    record = {"prompt": [ASKED, ANSWERED, ASKED], "completion": [ANSWERED], "system": "Be brief."}
    assert [train for _, _, train in said("prompt_completion", record)] == [False] * 4 + [True]


def test_a_document_is_learned_whole():
    assert read("text", {"text": "Once."}).messages == (Message("text", "Once.", train=True),)


def test_pairs_share_their_prompt_and_only_the_answers_are_learned():
    worse = {"role": "assistant", "content": "No."}
    records = (
        {"prompt": "Hi?", "chosen": "Hi.", "rejected": "No."},
        {"prompt": [ASKED], "chosen": [ANSWERED], "rejected": [worse]},
        {"chosen": [ASKED, ANSWERED], "rejected": [ASKED, worse]},
    )
    for record in records:
        chosen, rejected = FORMS["preference"].pair(read_record(record, place, {}, (), ()))
        assert chosen.messages == (Message("user", "Hi?"), Message("assistant", "Hi.", train=True))
        assert rejected.messages == (Message("user", "Hi?"), Message("assistant", "No.", train=True))
    earlier = [ASKED, ANSWERED, ASKED]
    record = {"chosen": [*earlier, ANSWERED], "rejected": [*earlier, worse]}
    chosen, _ = FORMS["preference"].pair(read_record(record, place, {}, (), ()))
    assert [message.train for message in chosen.messages] == [False, False, False, True]
    whole = {"chosen": "Human: Hi? Assistant: Hi.", "rejected": "Human: Hi? Assistant: No."}
    chosen, _ = FORMS["preference"].pair(read_record(whole, place, {}, (), ()))
    assert chosen.messages == (Message("text", whole["chosen"], train=True),)


# ---- which form records have

SAMPLES = {
    "alpaca": ALPACA,
    "messages": {"messages": [ASKED, ANSWERED]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hi."}]},
    "prompt_completion": {"prompt": "Hi?", "completion": "Hi."},
    "text": {"text": "Once."},
}


def test_every_form_can_be_set_by_hand():
    assert set(get_args(RecordFormat)) == set(FORMS)


@pytest.mark.parametrize("form", SAMPLES)
def test_the_form_is_found_and_said(form, tmp_path):
    path = write(tmp_path / "x.jsonl", SAMPLES[form], SAMPLES[form])
    found = read_dataset(JSON(path=path))
    assert len(found.conversations) == 2 and found.notices[0] == f"the records are of the form {form}"
    given = read_dataset(JSON(path=path, format=form))
    assert given.conversations == found.conversations and given.notices == found.notices[1:]


@pytest.mark.parametrize("other", [name for name in SAMPLES if name != "alpaca"])
def test_mixed_forms_are_refused(other, tmp_path):
    records = [ALPACA, SAMPLES[other], ALPACA]
    says = rf"x\.jsonl, line 2: is of the form {other}, but \S*x\.jsonl, line 1 is of the form alpaca"
    for on_bad in ("error", "skip"):
        with pytest.raises(DataError, match=says):
            read_dataset(JSON(path=write(tmp_path / "x.jsonl", *records), on_bad=on_bad))
    late = [ALPACA] * 150 + [SAMPLES[other]]
    with pytest.raises(
        DataError, match=rf"line 151: is of the form {other}, and the data of the form alpaca"
    ):
        read_dataset(JSON(path=write(tmp_path / "x.jsonl", *late)))
    write(tmp_path / "x.jsonl", *[ALPACA] * 150)
    with pytest.raises(DataError, match=rf"y\.jsonl, line 1: is of the form {other}, and"):
        write(tmp_path / "y.jsonl", SAMPLES[other])
        read_dataset(JSON(path=str(tmp_path)))


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"q": "a", "a": "b"}, r'no known form; it has "q", "a"; known are alpaca \(instruction and .*'
         r"columns '\{prompt: NAME, completion: NAME\}'"),
        ({}, "of no known form; it has nothing"),
        ({"id": "0", "data": ["a", "b"]}, r"if \"data\" are questions and .* '\{conversations: data\}'$"),
        ({"instruction": "a", "out": "b"}, r"has no \"output\", which records of the form alpaca have; it "
         r"has \"instruction\", \"out\"; .* columns '\{output: NAME\}'"),
        ({**ALPACA, "text": "x"}, r"several forms, those of alpaca \(instruction, output\) and those of text"
         r".*choose one: format alpaca"),
        (7, "must be an object of fields, not int"),
    ],
)  # fmt: skip
def test_what_does_not_tell_its_form_is_refused(record, says):
    with pytest.raises(DataError, match=rf"^x\.json, record 0: .*{says}"):
        choose_form([(place, record)], None, {}, ())


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        (
            {"question": "prompt"},
            r"question: no .*; the form's name stands first: '{prompt: question}'",
        ),
        ({"promt": "q"}, "columns promt: no form has a field of this name$"),
        (
            {"prompt": "q", "completion": "b"},
            r'no "b", which columns gives .* of completion; it has "q", "a"',
        ),
    ],
)
def test_columns_that_name_nothing_are_refused(columns, says):
    with pytest.raises(UserError, match=says):
        choose_form([(place, {"q": "x", "a": "y"})], None, columns, ())


def test_a_table_has_a_null_for_each_field_that_a_record_lacks():
    rows = [{"messages": None, "text": "a"}, {"messages": None, "text": "b"}]
    assert choose_form([(place, row) for row in rows], None, {}, ()) == "text"


def test_pairs_are_refused_with_the_way_to_learn_what_was_chosen(tmp_path):
    whole = [ASKED, ANSWERED]
    for record, columns, ignore in (
        ({"prompt": "Hi?", "chosen": "Hi.", "rejected": "No."}, {"completion": "chosen"}, ("rejected",)),
        ({"instruction": "a", "chosen": "Hi.", "rejected": "No."}, {"output": "chosen"}, ("rejected",)),
        ({"chosen": "Hi.", "rejected": "No."}, {"text": "chosen"}, ("rejected",)),
        ({"chosen": whole, "rejected": whole}, {"messages": "chosen"}, ("rejected",)),
        (
            {"prompt": "Hi?", "chosen": whole, "rejected": whole},
            {"messages": "chosen"},
            ("rejected", "prompt"),
        ),
        (
            {"prompt": [ASKED], "chosen": [ANSWERED], "rejected": whole},
            {"completion": "chosen"},
            ("rejected",),
        ),
    ):
        path = write(tmp_path / "x.jsonl", record)
        [(ours, theirs)], left_out = columns.items(), ", ".join(ignore)
        says = rf"preference, .*finetune/dpo.py .*: columns '{{{ours}: {theirs}}}' ignore '\[{left_out}\]'$"
        for format in (None, "preference"):
            with pytest.raises(DataError, match=says):
                read_dataset(JSON(path=path, on_bad="skip", format=format))
        (found,) = read_dataset(JSON(path=path, columns=columns, ignore=ignore)).conversations
        assert found.messages[-1].train and found.messages[-1].content == "Hi."


# ---- what is wrong with a record


def assistant(**fields):
    return {"messages": [ASKED, {"role": "assistant", **fields}]}


def calling(**function):
    return assistant(tool_calls=[{"id": "c", "type": "function", "function": function}])


BAD_MESSAGES = [
    ({"messages": []}, '"messages" holds no message'),
    ({"messages": "Hi?"}, '"messages" must be a list of messages, not str'),
    ({"messages": None}, '"messages" must be a list of messages, not NoneType'),
    ({"messages": ["Hi?"]}, r"messages\[0\] must be an object, not str"),
    ({"messages": [ASKED]}, "has no assistant's message"),
    ({"messages": [ASKED, {"content": "Hi."}]}, r'messages\[1\] has no role; it has "content"'),
    ({"messages": [{"role": "elf", "content": ""}]},
     r'messages\[0\]\.role is "elf"; known are system, .*; if it is .* roles \'{elf: ROLE}\'$'),
    ({"messages": [{"from": "human", "value": ""}]},
     r'has no role; it has "from", "value"; if .* columns \'{role: from, content: value}\'$'),
    ({"messages": [{"role": "user", "say": "a", "to": "b"}]}, r"content is missing; .* '{content: NAME}'$"),
    ({"messages": [{"role": 5, "content": ""}]}, r"messages\[0\]\.role is int; known are"),
    (assistant(content=None), r"messages\[1\]\.content is null"),
    (assistant(), r"messages\[1\]\.content is missing"),
    (assistant(content=5), r"messages\[1\]\.content must be text, not int"),
    (assistant(content="\ud800"), r"messages\[1\]\.content holds half a character"),
    (assistant(content=[{"type": "image_url", "image_url": {"url": "x"}}]),
     r'messages\[1\]\.content\[0\] is of type "image_url"; only text can be trained on'),
    (assistant(content=[{"type": "text"}]), r"content\[0\]\.text must be text, not NoneType"),
    (assistant(content="", audio={"id": "x"}), r'"messages\.audio"; .*ignore \'\[messages\.audio\]\''),
    (assistant(content="", train="no"), r"messages\[1\]\.train must be true or false, not str"),
    (assistant(content="", weight=0.5), r"messages\[1\]\.weight must be 0 or 1"),
    (assistant(content="", weight=0), "has no message that is learned"),
    ({"messages": [{**ASKED, "train": True}, ANSWERED]}, r"messages\[0\] is to be learned, but its role"),
    ({"messages": [{**ASKED, "tool_calls": [CALL]}, ANSWERED]}, r"messages\[0\] has tool_calls, which"),
    ({"messages": [{**ASKED, "reasoning_content": "?"}, ANSWERED]}, "has reasoning_content, which only"),
    (assistant(tool_calls=5), r"messages\[1\]\.tool_calls must be a list of calls, not int"),
    (assistant(tool_calls=[CALL], function_call=CALL), "has both tool_calls and function_call"),
    (calling(arguments="{}"), r"tool_calls\[0\]\.function has no name"),
    (calling(name="", arguments="{}"), r"tool_calls\[0\]\.function has no name"),
    (calling(name="f", arguments="{'a'"), r"function\.arguments must be JSON, and is not: Expecting"),
    (calling(name="f", arguments='{"a": NaN}'), "must be JSON, and is not: it has NaN"),
    (calling(name="f", arguments={"a": [float("inf")]}), r"arguments\.a\[0\] is inf, which JSON has no"),
    (calling(name="f", arguments='{"a": 1, "a": 2}'), 'is not: it has "a" twice'),
    (calling(name="f", arguments="[1]"), r"function\.arguments must be an object, not list"),
    (calling(name="f", arguments="[" * 5000), "must be JSON, and is not"),
    (calling(name="f", arguments={"a": [{"b": "\udfff"}]}), r"arguments\.a\[0\]\.b holds half a char"),
    (calling(name="f", arguments={"\udfff": 1}), r"a key of .*arguments holds half a character"),
    (calling(name="f", arguments='{"a": "\\ud800"}'), r"arguments\.a holds half a character"),
    (calling(name="f", index=3), r'"messages\.tool_calls\.function\.index"'),
    (assistant(tool_calls=[{"type": "custom", "function": {}}]), r'type is "custom"; only "function"'),
    ({**assistant(content=""), "tools": [{"parameters": {}}]}, r"tools\[0\] has no name"),
    ({**assistant(content=""), "tools": "[{]"}, "tools must be JSON, and is not"),
    ({**assistant(content=""), "tools": {}}, "tools must be a list of functions, not dict"),
    ({**assistant(content=""), "tools": [{"type": "web_search"}]}, r'tools\[0\]\.type is "web_search"'),
    ({**assistant(content=""), "tools": [{"name": "f", "description": "\ud800"}]}, "holds half a char"),
    ({**assistant(content=""), "tools": [TOOL], "functions": [SCHEMA]}, "has both tools and functions"),
]  # fmt: skip
BAD = [
    *(("messages", record, says) for record, says in BAD_MESSAGES),
    ("sharegpt", {"conversations": [{"from": "human", "value": None}]}, r"conversations\[0\]\.value is null"),
    ("sharegpt", {"conversations": [{"from": "alien", "value": ""}]}, r'conversations\[0\]\.from is "alien"'),
    ("sharegpt", {"conversations": [{"from": "human", "role": "user", "value": ""}]}, "has no assistant"),
    ("sharegpt", {"conversations": [{"from": "function_call", "value": "f()"}]}, "value must be JSON"),
    ("sharegpt", {"conversations": [{"from": "system", "value": "a"}], "system": "b"}, "message twice"),
    ("prompt_completion", {"prompt": None, "completion": "a"}, '"prompt" must be text, not NoneType'),
    ("prompt_completion", {"prompt": "a", "completion": [ASKED]}, "must begin with the assistant's"),
    ("prompt_completion", {"prompt": "a"}, 'has no "completion"; it has "prompt"'),
    ("text", {"text": ""}, '"text" is empty'),
    ("text", {"text": ["a"]}, '"text" must be text, not list'),
]  # fmt: skip


@pytest.mark.parametrize(("form", "record", "says"), BAD)
def test_a_bad_record_is_one_line_with_its_place_or_is_left_out(form, record, says, tmp_path):
    with pytest.raises(DataError, match=rf"^x\.json, record 0: .*{says}"):
        read(form, record)
    skipped = []
    reader = RecordReader(form, on_bad="skip")
    good = [(Place("x.json", f"record {number}"), SAMPLES[form]) for number in range(1, 1002)]
    found = list(reader.read([*good, (place, record)], skipped))
    assert len(found) == 1001 and [str(error).partition(": ")[0] for error in skipped] == [str(place)]


def test_keys_that_come_twice_are_refused_wherever_they_are(tmp_path):
    for text, where in (
        (
            '{"messages": [{"role": "user", "content": "a", "content": "b"}]}',
            r"messages\[0\] has \"content\"",
        ),
        ('{"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "name": "g"}]}]}', r'has "name"'),
        (
            '{"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": 1, "a": 2}'
            "}]}]}",
            r"messages\[0\]\.tool_calls\[0\]\.arguments has \"a\"",
        ),
        (
            '{"messages": [{"role": "assistant", "content": ""}], "tools": [{"name": "f", "x": ['
            '{"a": 1, "a": 2}]}]}',
            r"tools\[0\]\S*\.x\[0\] has \"a\"",
        ),
    ):
        (tmp_path / "x.jsonl").write_text(text)
        with pytest.raises(DataError, match=rf"x\.jsonl, line 1: .*{where} twice"):
            read_dataset(JSON(path=str(tmp_path / "x.jsonl")))


def test_what_is_left_out_is_counted_with_places_and_reasons(tmp_path):
    bad = [{"instruction": "a"}, 5, {**ALPACA, "output": None}, {**ALPACA, "output": 1}]
    path = write(tmp_path / "x.jsonl", ALPACA, *bad, ALPACA)
    found = read_dataset(JSON(path=path, on_bad="skip"))
    assert len(found.conversations) == 2
    (_, notice, *_) = found.notices
    assert notice.startswith("4 records were left out: ") and notice.endswith(" | and 1 more")
    assert [f"line {number}: " in notice for number in range(1, 7)] == [False, True, True, True, False, False]
    with pytest.raises(DataError, match=r"line 2: has no \"output\""):
        read_dataset(JSON(path=path))
    with pytest.raises(DataError, match="must be text, not int; and no other record can be trained on"):
        read_dataset(JSON(path=write(tmp_path / "y.jsonl", bad[3]), on_bad="skip"))


def test_unknown_fields_of_messages_are_told_together_and_can_be_ignored(tmp_path):
    record = {"id": 1, "messages": [{**ASKED, "id": 2}, {**ANSWERED, "at": "x"}]}
    path = write(tmp_path / "x.jsonl", {"messages": [ASKED, ANSWERED]}, record)
    fields = ("messages.id", "messages.at", "id")
    with pytest.raises(DataError) as refused:
        read_dataset(JSON(path=path))
    named = str(refused.value).rpartition("ignore '[")[2].removesuffix("]'").split(", ")
    assert sorted(named) == sorted(fields)
    assert len(read_dataset(JSON(path=path, ignore=fields)).conversations) == 2
    late = write(tmp_path / "y.jsonl", *[ALPACA] * 1200, {**ALPACA, "id": 5}, {**ALPACA, "other": 5})
    with pytest.raises(DataError, match=r"line 1201: has a field .* \"id\""):
        read_dataset(JSON(path=late))
    skipping = read_dataset(JSON(path=late, on_bad="skip"))
    assert len(skipping.conversations) == 1200 and skipping.notices[1].startswith("2 records were left out")
    early = write(tmp_path / "z.jsonl", ALPACA, {**ALPACA, "id": 5}, ALPACA)
    skipping = read_dataset(JSON(path=early, on_bad="skip"))
    assert len(skipping.conversations) == 2 and "line 2: has a field" in skipping.notices[1]


# ---- settings


def test_the_system_message_is_for_records_that_have_none():
    own = {"messages": [{"role": "system", "content": "Own."}, ASKED, ANSWERED]}
    assert said("messages", own, system="Be kind.")[0] == ("system", "Own.", False)
    for form in ("alpaca", "messages", "sharegpt", "prompt_completion"):
        found = said(form, SAMPLES[form], system="Be kind.")
        assert found == [("system", "Be kind.", False), *said(form, SAMPLES[form])]


def test_what_a_record_says_of_a_message_wins_over_learn():
    talk = {"messages": [ASKED, {**ANSWERED, "weight": 0}, ASKED, ANSWERED, ASKED, ANSWERED]}
    assert [train for _, _, train in said("messages", talk)] == [False, False, False, True, False, True]
    assert [train for _, _, train in said("messages", talk, learn="last")] == [False] * 5 + [True]
    with pytest.raises(DataError, match="has no message that is learned"):
        read("messages", {"messages": [ASKED, ANSWERED, ASKED, {**ANSWERED, "train": False}]}, learn="last")


@pytest.mark.parametrize(
    ("form", "changes", "says"),
    [
        (
            "alpaca",
            {"columns": {"prompt": "q"}},
            "columns prompt: records of the form alpaca have instruction, input",
        ),
        ("alpaca", {"ignore": ("output",)}, "ignore output: a record cannot be trained on without it"),
        ("prompt_completion", {"columns": {"prompt": "q"}, "ignore": ("q",)}, "ignore q: a record cannot"),
        ("alpaca", {"columns": {"role": "q"}}, "columns role: records of the form alpaca have instruction"),
        ("text", {"roles": {"BOT": "assistant"}}, "roles: records of the form text have no messages"),
        (
            "messages",
            {"roles": {"assistant": "BOT"}},
            "roles '{assistant: BOT}': BOT is no role; those are system, .*: '{BOT: assistant}'$",
        ),
        ("text", {"system": "Be kind."}, "system: records of the form text are not conversations"),
        ("text", {"learn": "last"}, "learn: records of the form text are not conversations"),
    ],
)
def test_settings_that_do_not_fit_the_form_are_refused(form, changes, says):
    with pytest.raises(UserError, match=f"^{says}"):
        RecordReader(form, **changes)


def test_a_field_whose_name_another_took_is_not_used_silently():
    record = {"prompt": "template", "question": "Hi?", "completion": "Hi."}
    with pytest.raises(DataError, match='a field that training would not use: "prompt"'):
        read("prompt_completion", record, columns={"prompt": "question"})
    found = said("prompt_completion", record, columns={"prompt": "question"}, ignore=("prompt",))
    assert found[0] == ("user", "Hi?", False)
    swapped = {"prompt": "completion", "completion": "prompt"}
    assert said("prompt_completion", {"prompt": "b", "completion": "a"}, columns=swapped)[0][1] == "a"


def test_a_reader_can_be_sent_to_another_process():
    settings = ({"prompt": "q"}, "skip", "last", "Be kind.", {"BOT": "assistant"})
    reader = RecordReader("prompt_completion", ("id",), *settings)
    sent = pickle.loads(pickle.dumps(reader))
    record = [(place, {"q": "a", "completion": "b", "id": 1})]
    assert sent == reader and list(sent.read(record)) == list(reader.read(record))


@pytest.mark.parametrize("form", ["messages", "sharegpt", "prompt_completion"])
def test_the_same_talk_in_another_form_is_the_same_example(form, tmp_path, tokenizer_dir):
    as_alpaca = {"instruction": "Hi?", "output": "Hi."}
    examples = []
    for record in (as_alpaca, SAMPLES[form]):
        conversations = read_dataset(JSON(path=write(tmp_path / "x.jsonl", record))).conversations
        examples.append(tokenize(conversations, Tokenizer(tokenizer_dir), STYLES["alpaca"], 512).examples)
    assert examples[0] == examples[1]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["alpaca", "messages", "sharegpt", "prompt_completion"])
def test_every_form_reaches_training(form, tmp_path):
    path = write(tmp_path / "my.jsonl", *[SAMPLES[form]] * 8)
    words = ["--data", path, "--out_dir", tmp_path / "out", "--train.max_steps", "1"]
    printed = succeeds("finetune/lora.py", *words).stdout
    assert f"data: the records are of the form {form}" in printed
    assert "format:" not in (tmp_path / "out/hyperparameters.yaml").read_text(), "what is detected is not set"
