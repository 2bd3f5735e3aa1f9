"""Chat templates: the text is the one that transformers renders, in chat and in training alike."""

import json
from pathlib import Path

import pytest

from litlora.data.conversation import Conversation, Message, Place
from litlora.data.examples import tokenize
from litlora.errors import CheckpointError, UserError
from litlora.load import load
from litlora.prompts import STYLES, ChatTemplate, choose_style, load_style, load_template
from litlora.prompts.exchange import passages
from litlora.prompts.shown import Asked
from litlora.prompts.template import TurnEnds
from litlora.serve.conversation import ChatSession
from litlora.serve.engine import Engine
from litlora.serve.sampling import Sampling
from litlora.tokenizer import Tokenizer

QUESTION = [{"role": "user", "content": "  What is 2 + 2?\n"}]
EXCHANGE = [*QUESTION, {"role": "assistant", "content": "4 <&> 'four' é 😀 "}]
WITH_SYSTEM = [
    {"role": "system", "content": "Be brief."},
    *EXCHANGE,
    {"role": "user", "content": "And 3 + 3?"},
]
CONVERSATIONS = {
    "question": QUESTION,
    "exchange": EXCHANGE,
    "three turns": WITH_SYSTEM,
    "two users": QUESTION * 2,
    "assistant first": EXCHANGE[1:],
}

# Each uses what the templates of well-known models use.
TEMPLATES = {
    "loop and generation prompt": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + "
        "'<|im_end|>' + '\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "roles must alternate": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not "
        "supported') }}{% endif %}"
        "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% "
        "endif %}"
        "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
        "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
    ),
    "system inside the first question": (
        "{% if messages[0].role == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message "
        "= messages[0].content %}"
        "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
        "{% for message in loop_messages %}{% if loop.first and system_message %}"
        "{% set content = '<<SYS>>\\n' ~ system_message ~ '\\n<</SYS>>\\n\\n' ~ message.content %}{% else %}"
        "{% set content = message.content %}{% endif %}"
        "{% if message.role == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% elif message.role == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% "
        "endfor %}"
    ),
    "the date": (
        "{%- if strftime_now is defined %}{%- set date = strftime_now('%d %b %Y') %}"
        "{%- else %}{%- set date = '26 Jul 2024' %}{%- endif %}\n"
        "{{- bos_token + 'Today: ' + date + '\\n' }}\n"
        "{%- for message in messages %}\n"
        "    {{- '<|' + message.role + '|>\\n' + message['content'] | trim + '<|end|>' }}\n"
        "{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|assistant|>\\n' }}\n{%- endif %}\n"
    ),
    "blocks on lines of their own": (
        "{# Comments, too,\n   may be long. #}\n"
        "{% for message in messages %}\n"
        "    {% if message.role == 'user' %}\n"
        "Human: {{ message.content }}\n"
        "    {% elif message.role == 'assistant' %}\n"
        "\tBot: {{ message.content }}\n"
        "    {% else %}\n"
        "  Note: {{ message.content }}\n"
        "    {% endif %}\n"
        "{% endfor %}\n"
        "{% if add_generation_prompt %}\n"
        "\tBot: \n"
        "{% endif %}\n"
    ),
    "no tools": (
        "{%- if tools is not none and tools %}{{ '# Tools\\n' }}{%- for tool in tools %}{{ tool | tojson }}"
        "{%- endfor %}{%- endif %}"
        "{%- if documents %}{{ documents | length }}{%- endif %}{%- if not tools is defined %}{{ "
        "'undefined' }}{%- endif %}"
        "{%- if custom_setting is defined %}{{ custom_setting }}{%- endif %}{{ never_given_token }}"
        "{%- for message in messages %}{%- if message.tool_calls %}{{ 'calls' }}{%- endif %}"
        "{{ message.role | upper ~ ': ' ~ message.content ~ eos_token }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{%- endif %}"
    ),
    "loop controls and a namespace": (
        "{%- set ns = namespace(last=-1, count=0) %}{%- for message in messages %}{%- if message.role == "
        "'user' %}"
        "{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
        "{%- for message in messages[::-1] %}{%- if message.role == 'system' %}{%- continue %}{%- endif %}"
        "{%- set ns.count = ns.count + 1 %}{%- if ns.count > 5 %}{%- break %}{%- endif %}{%- endfor %}"
        "{%- for message in messages %}{%- if loop.index0 == ns.last %}{{ '>>' }}{%- endif %}"
        "{{ '[' ~ message.role ~ '|' ~ ns.count ~ ']' ~ message.content ~ '[/]' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{ '[assistant|' ~ ns.count ~ ']' }}{%- endif %}"
    ),
    "an empty thought": (
        "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
        "{%- if message.role == 'assistant' and loop.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
        "{{- message.content.split('</think>')[-1].lstrip('\\n') + '<|im_end|>\\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
        "{%- if enable_thinking is defined and enable_thinking is false %}{{- "
        "'<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
    ),
    "tojson and dict": (
        "{%- set names = dict(user='U', assistant='A', system='S') %}"
        "{%- for message in messages %}{{ names[message.role] }}{{ message | tojson }}{{ [1, 2.5, none, "
        "true] | tojson(indent=2) }}"
        "{{ '\\n' }}{%- endfor %}{%- if add_generation_prompt %}{{ 'A' }}{%- endif %}"
    ),
    "macro, generation and filters": (
        "{%- macro turn(role, text) -%}\n<|{{ role | replace('assistant', 'bot') }}|>{{ text | trim }}"
        "\n{%- endmacro -%}"
        "{%- for message in messages | rejectattr('role', 'equalto', 'system') | list -%}"
        "{%- if message.role == 'assistant' -%}{%- generation -%}"
        "{{ turn(message.role, message.content) }}{{ eos_token }}{%- endgeneration -%}"
        "{%- else -%}{{ turn(message.role, message.content) }}{%- endif -%}"
        "{%- endfor -%}{%- if add_generation_prompt -%}<|bot|>{%- endif -%}"
    ),
}


def write(directory: Path, tokenizer_dir: Path, **settings: object) -> Path:
    (directory / "tokenizer.json").write_bytes((tokenizer_dir / "tokenizer.json").read_bytes())
    settings = {
        "eos_token": "<|endoftext|>",
        "bos_token": {"__type": "AddedToken", "content": "<|endoftext|>"},
    } | settings
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def template_in(directory: Path) -> ChatTemplate | None:
    return load_template({file.name: file for file in directory.iterdir()})


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_the_one_that_transformers_renders(name, tmp_path, tokenizer_dir):
    transformers = pytest.importorskip("transformers")
    write(tmp_path, tokenizer_dir, chat_template=TEMPLATES[name], tokenizer_class="PreTrainedTokenizerFast")
    ours, theirs = template_in(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    rendered, tokenizer = 0, Tokenizer(tmp_path)
    for conversation in CONVERSATIONS.values():
        for add_generation_prompt in (True, False):
            try:
                expected = theirs.apply_chat_template(
                    conversation, tokenize=False, add_generation_prompt=add_generation_prompt
                )
            except Exception as error:  # the template refuses: so must ours, with its words
                with pytest.raises(UserError, match=str(error)[:40].replace("/", ".")):
                    ours.render(conversation, add_generation_prompt=add_generation_prompt)
                continue
            assert ours.render(conversation, add_generation_prompt=add_generation_prompt) == expected
            ids = theirs.apply_chat_template(
                conversation, add_generation_prompt=add_generation_prompt, return_dict=False
            )
            assert tokenizer.encode(expected) == ids
            rendered += 1
    assert rendered >= 4


def test_a_template_file_goes_before_the_one_in_the_settings(tmp_path, tokenizer_dir):
    write(tmp_path, tokenizer_dir)
    assert template_in(tmp_path) is None
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "several"}]
    write(tmp_path, tokenizer_dir, chat_template=several)
    assert template_in(tmp_path).render(QUESTION) == "several"
    write(tmp_path, tokenizer_dir, chat_template="settings")
    assert template_in(tmp_path).render(QUESTION) == "settings"
    (tmp_path / "chat_template.jinja").write_text("file\n")
    assert template_in(tmp_path).render(QUESTION) == "file"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for x in %}", "broken at its line 1"),
        ("{{ messages[7].content.nothing }}", "refuses the conversation"),
        ("{{ 1 // 0 }}", "fails: ZeroDivisionError"),
        ("{{ ''.__class__.__mro__ }}", "forbidden"),
        ("{% set ns = namespace(a=1) %}{% set ns.__x = 2 %}", "forbidden"),
        ("{{ messages.append(1) }}", "forbidden"),
    ],
)
def test_a_template_that_cannot_be_used_is_named(source, message, tmp_path):
    with pytest.raises(UserError, match=f"somewhere.jinja: the chat template .*{message}"):
        ChatTemplate(source, Path("somewhere.jinja"), {}).render(QUESTION)


def test_the_style_named_goes_first_then_the_one_trained_with_then_the_template():
    template = ChatTemplate("x", Path("t"), {}).style
    alpaca, plain = STYLES["alpaca"], STYLES["plain"]
    assert choose_style("plain", alpaca, template, "alpaca")[0] is plain
    assert choose_style("template", alpaca, template, "alpaca")[0] is template
    assert choose_style(None, alpaca, template, "plain") == (alpaca, "the model was trained with it")
    assert choose_style(None, None, template, "plain") == (template, "the model's own")
    assert choose_style(None, None, None, "plain") == (plain, "the model names none")
    with pytest.raises(UserError, match="has no chat template"):
        choose_style("template", alpaca, None, "plain")


def test_a_style_file_may_name_the_template(tmp_path):
    template = ChatTemplate("x", Path("t"), {}).style
    (tmp_path / "prompt_style.yaml").write_text("style: template\n")
    assert load_style(tmp_path, template) is template
    with pytest.raises(CheckpointError, match="there is no chat template beside it"):
        load_style(tmp_path, None)
    (tmp_path / "prompt_style.yaml").write_text("class_path: litgpt.prompts.Alpaca\n")
    assert load_style(tmp_path, None) is STYLES["alpaca"]
    (tmp_path / "prompt_style.yaml").write_text("class_path: litgpt.prompts.Llama3\n")
    assert load_style(tmp_path, None) is None


def conversation(instruction: str, input: str, output: str) -> Conversation:
    messages = Message("user", instruction, input=input), Message("assistant", output, train=True)
    return Conversation(messages, Place("x", "record 0"))


def template_base(make_checkpoint, name: str) -> Path:
    """A model with a chat template whose turns end in a special token that is not the end of the
    text."""
    directory = make_checkpoint("base")
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    marks = ["<|im_start|>", "<|im_end|>"]
    first = 1 + max(tokenizer["model"]["vocab"].values())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer["added_tokens"] += [{"id": first + n, "content": mark, **flags} for n, mark in enumerate(marks)]
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    (directory / "chat_template.jinja").write_text(TEMPLATES[name])
    return directory


@pytest.mark.parametrize("name", ["loop and generation prompt", "an empty thought"])
def test_training_learns_the_answer_up_to_the_templates_mark(name, make_checkpoint):
    loaded = load(template_base(make_checkpoint, name))
    style, reason = choose_style(None, loaded.prompt_style, loaded.template, "alpaca")
    assert (style.name, reason) == ("template", "the model's own")
    (example,) = tokenize(
        [conversation("Name it.", "the fox", "quick brown")], loaded.tokenizer, style, 200
    ).examples
    prompt = style.template.render([{"role": "user", "content": "Name it.\n\nthe fox"}])
    assert list(example.ids[: example.learned[0][0]]) == loaded.tokenizer.encode(prompt)
    finished = style.template.render(
        [{"role": "user", "content": "Name it.\n\nthe fox"}, {"role": "assistant", "content": "quick brown"}],
        add_generation_prompt=False,
    )
    assert list(example.ids) == loaded.tokenizer.encode(finished.removesuffix("\n"))
    assert (
        loaded.tokenizer.token(example.ids[-1])
        == "<|im_end|>"
        != loaded.tokenizer.token(loaded.tokenizer.eos_id)
    )
    long = conversation("Name it.", "", "quick brown " * 40)
    (cut,) = tokenize([long], loaded.tokenizer, style, 60).examples
    assert len(cut.ids) == 60 and cut.ids[-1] == example.ids[-1]


def test_a_template_that_drops_the_thought_it_asks_for_still_teaches_what_chat_asks(make_checkpoint):
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant: <think>{% endif %}"
    )
    template = ChatTemplate(source, Path("t"), {})
    for said, answer in (("Because.", "Because.<|im_end|>"), ("", "<|im_end|>")):
        talk = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": said}]
        (passage,) = passages(template, Asked(talk, [1]), TurnEnds(None, None))
        ((_, start, stop, _),) = passage.turns
        assert passage.text[:start].endswith("<|im_start|>assistant: <think>")
        assert passage.text[start:stop] == answer


def test_a_conversation_is_rendered_whole_and_stops_at_the_templates_mark(make_checkpoint):
    loaded = load(template_base(make_checkpoint, "loop and generation prompt"))
    tokenizer, seen = loaded.tokenizer, []

    class Scripted(Engine):
        def generate(self, prompt_ids, sampling, *, stop_ids, generator=None, way=None):
            seen.append(prompt_ids)
            assert stop_ids == {tokenizer.eos_id, *tokenizer.encode("<|im_end|>")}
            yield from tokenizer.encode(f"answer {len(seen)}")

    engine = Scripted(loaded.model, tokenizer)
    session = ChatSession(engine, loaded.template, Sampling(max_new_tokens=8))
    assert "".join(session.ask("first?")) == "answer 1"
    assert "".join(session.ask("second?")) == "answer 2"
    said = [("user", "first?"), ("assistant", "answer 1"), ("user", "second?")]
    text = (
        "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in said)
        + "<|im_start|>assistant\n"
    )
    assert seen[1] == tokenizer.encode(text)
    for _ in range(4):
        "".join(session.ask("again " * 6))
    assert "forgotten" in session.notice and max(map(len, seen)) < 128
