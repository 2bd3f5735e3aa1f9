"""Answers that are held to a JSON schema follow it, whatever the model; those beside them are what they
would be alone."""

import json

import pytest
import torch
from conftest import QUICKSTART, tiny_config
from jsonschema import validate

from litlora.errors import UserError
from litlora.model import GPT
from litlora.serve.answer import Request
from litlora.serve.engine import Engine
from litlora.serve.sampling import Sampling
from litlora.serve.schema import Shapes, grammar_of
from litlora.tokenizer import Tokenizer

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "age": {"type": "integer", "minimum": 3, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 1},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
COLOUR = {"enum": ["red", "green", "blue"]}


@pytest.fixture(scope="module")
def engine():
    """A model that knows nothing, with rows that no token has."""
    tokenizer = Tokenizer(QUICKSTART)
    torch.manual_seed(0)
    config = tiny_config(vocab_size=tokenizer.vocab_size + 64, max_position_embeddings=512)
    return Engine(GPT(config).eval(), tokenizer)


@pytest.fixture(scope="module")
def shapes(engine):
    return Shapes(engine.tokenizer, engine.tokenizer.stop_ids)


def answered(engine, requests):
    answers = [engine.submit(request) for request in requests]
    while engine.step():
        pass
    return [("".join(token.text for token in answer), answer.finish) for answer in answers]


def asked(engine, shape, **sampling):
    sampling = Sampling(**{"max_new_tokens": 450, "temperature": 1.0, "seed": 0, **sampling})
    stops = engine.tokenizer.stop_ids
    return Request(prompt=[5, 6, 7], sampling=sampling, stop_ids=stops, shape=shape and shape.another())


def test_every_answer_follows_its_schema_and_changes_no_other(engine, shapes):
    person, colour = (shapes.shape(grammar_of(schema)) for schema in (PERSON, COLOUR))
    wants = [(person, {"seed": seed}) for seed in range(5)]
    wants += [(colour, {"seed": 3, "top_k": 1}), (colour, {"temperature": 0.0, "repetition_penalty": 1.5})]
    wants += [
        (person, {"temperature": 0.0, "max_new_tokens": 4, "logprobs": 2}),
        (None, {"max_new_tokens": 40}),
    ]
    together = answered(engine, [asked(engine, shape, **sampling) for shape, sampling in wants])
    alone = [answered(engine, [asked(engine, shape, **sampling)])[0] for shape, sampling in wants]
    assert together == alone
    assert [finish for _, finish in together] == ["stop"] * 7 + ["length"] * 2
    for (text, _), (shape, _) in zip(together[:7], wants[:7], strict=True):
        validate(json.loads(text), PERSON if shape is person else COLOUR)
    assert len({text for text, _ in together[:5]}) == 5


def test_spaces_between_the_parts_are_bounded_and_free(engine, shapes):
    shape = shapes.shape(grammar_of(PERSON))
    person = {"name": "Ann", "age": 40, "tags": ["red"]}
    for spaces in ({}, {"indent": 2}, {"indent": "\t"}, {"separators": (",", ":")}):
        written = shape.another()
        for token in engine.tokenizer.encode(json.dumps(person, **spaces)):
            written.masked(engine.model.like.new_zeros(engine.model.config.vocab_size))
            written.add(token)
        assert written.is_complete
    for flood in (" " * 8, "\n" * 8, "\n" + " " * 60):
        with pytest.raises(UserError, match="cannot be held to the JSON schema"):
            written = shape.another()
            for token in engine.tokenizer.encode("{" + flood + '"name"'):
                written.add(token)


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "person"}, "person"),
        ({"not": {"type": "string"}}, 'Unimplemented keys: \\["not"\\]'),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"oneOf": [{"type": "string"}, {"maxLength": 3}]}, "oneOf is not known; write anyOf"),
        ({"$ref": "#/$defs/nowhere"}, "nowhere"),
        ({"type": "integer", "minimum": 3, "maximum": 1}, "unsatisfiable|greater"),
    ],
)
def test_a_schema_that_cannot_be_followed_is_refused(schema, reason):
    with pytest.raises(UserError, match=f"the JSON schema cannot be used: .*({reason})"):
        grammar_of(schema)
