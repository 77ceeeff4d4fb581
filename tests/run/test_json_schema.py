"""JSON schemas as grammars: what they allow is what the schema allows, or it is told."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from core_session import edge

from coreinfer_edge.binding.load import llama_cpp
from coreinfer_edge.errors import ArgumentError
from coreinfer_edge.run.json_schema import schema_grammar
from coreinfer_edge.run.llm import EdgeLLM

RandomModel = Callable[..., Path]
PERSON = {"type": "object", "properties": {"name": {"enum": ["Ada"]}}, "required": ["name"]}


@pytest.fixture(scope="module")
def llm(random_model: RandomModel) -> Any:
    with edge(random_model("llama"), n_ctx=512, density=1.0) as llm:
        yield llm


def accepts(llm: EdgeLLM, grammar: str, text: str) -> bool:
    """Whether the grammar allows the text, token by token, to its end."""
    llama = llm.llama
    sampler = llama_cpp.llama_sampler_init_grammar(llama._model.vocab, grammar.encode(), b"root")
    assert sampler
    tokens = [*llama.tokenize(text.encode(), add_bos=False), llama.token_eos()]
    try:
        for token in tokens:
            data = (llama_cpp.llama_token_data * 1)(llama_cpp.llama_token_data(token, 0.0, 0.0))
            array = llama_cpp.llama_token_data_array(data, 1, -1, False)
            llama_cpp.llama_sampler_apply(sampler, array)
            if data[0].logit != 0:
                return False
            llama_cpp.llama_sampler_accept(sampler, token)
        return True
    finally:
        llama_cpp.llama_sampler_free(sampler)


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": ["string", "null"], "maxLength": 2}, ["null", '"ab"'], ['"abc"', "1"]),
        (
            {"type": ["object", "null"], "properties": {"a": {"const": 1}}, "required": ["a"]},
            ["null", '{"a": 1}'],
            ["{}", '{"a": 2}'],
        ),
        ({"required": ["a"]}, ['{"a": [1]}'], ["{}", "1"]),
        ({"type": "object", "properties": {"a": True}, "required": ["a"]}, ['{"a": 5}'], ["{}"]),
        ({"type": "array", "items": {}, "minItems": 1}, ["[1]", "[{}]"], ["[]"]),
        ({"type": "array", "maxItems": 1}, ["[]", "[true]"], ["[1, 2]"]),
        ({"minLength": 1}, ['"a"'], ['""']),
        ({"allOf": [{"$ref": "#/$defs/c"}], "$defs": {"c": {"enum": ["x"]}}}, ['"x"'], ["{}"]),
        (
            {
                "type": "object",
                "properties": {"a": {"$ref": "#/$defs/string"}, "b": {"$ref": "#/defs/string"}},
                "required": ["a", "b"],
                "$defs": {"string": {"const": 1}},
                "defs": {"string": {"const": 2}},
            },
            ['{"a": 1, "b": 2}'],
            ['{"a": 1, "b": 1}', '{"a": "x", "b": 2}'],
        ),
        (
            {
                "type": "object",
                "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
                "required": ["next"],
            },
            ['{"next": {"next": null}}'],
            ['{"next": {}}', "{}"],
        ),
        ({"$ref": "#/$defs/a~1b%20c", "$defs": {"a/b c": {"const": 3}}}, ["3"], ["4"]),
        ({"prefixItems": [{"const": 1}, {}], "minItems": 2}, ["[1, 2]"], ["[1]", "[2, 1]"]),
        (
            {"type": "object", "additionalProperties": {"type": "boolean"}},
            ["{}", '{"x": true}'],
            ['{"x": 1}'],
        ),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_a_grammar_allows_what_its_schema_allows_and_nothing_else(
    schema: dict[str, Any], good: list[str], bad: list[str], llm: EdgeLLM
) -> None:
    grammar = schema_grammar(schema, "the schema")
    for text in good:
        assert accepts(llm, grammar, text), text
    for text in bad:
        assert not accepts(llm, grammar, text), text


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "integer", "anyOf": [{"minimum": 0}, True]}, ["5"], ['"a"', "5.5", "null"]),
        (
            {"type": ["object", "null"], "oneOf": [{"required": ["a"]}]},
            ['{"a": 1}', "null"],
            ["{}", "1"],
        ),
        ({"type": "number", "anyOf": [{"type": "integer"}, {"type": "null"}]}, ["5"], ["null"]),
        ({"type": "string", "anyOf": [{"type": ["null", "string"]}]}, ['"a"'], ["null"]),
        (
            {"type": "string", "anyOf": [{"anyOf": [{"maxLength": 2}, {"const": "abc"}]}]},
            ['"ab"', '"abc"'],
            ['"abd"', "1"],
        ),
        (
            {
                "type": "object",
                "anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}],
                "$defs": {
                    "a": {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]},
                    "b": {"type": "string"},
                },
            },
            ['{"a": 1}'],
            ['"a"'],
        ),
        *(
            (
                {
                    "allOf": [
                        {"properties": {"a": one}, "required": ["a"]},
                        {"properties": {"a": two}},
                    ]
                },
                ['{"a": 1}'],
                ['{"a": "x"}', '{"a": null}'],
            )
            for one, two in (
                ({"type": "integer"}, {"description": "a number"}),
                ({"description": "a number"}, {"type": "integer"}),
                ({"type": "integer"}, {"title": "A", "minimum": 0}),
                ({"type": "integer"}, True),
                ({"$ref": "#/$defs/n"}, {"description": "a number"}),
            )
        ),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_stands_beside_alternatives_and_in_several_parts_holds(
    schema: dict[str, Any], good: list[str], bad: list[str], llm: EdgeLLM
) -> None:
    schema = {"$defs": {"n": {"type": "integer"}}, **schema}
    grammar = schema_grammar(schema, "the schema")
    for text in good:
        assert accepts(llm, grammar, text), text
    for text in bad:
        assert not accepts(llm, grammar, text), text


def test_a_type_that_a_reference_does_not_keep_to_is_told() -> None:
    schema = {"type": "string", "anyOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {}}}
    with pytest.warns(RuntimeWarning, match="#/type"):
        schema_grammar(schema, "the schema")


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        ({"$ref": "#/$defs/none"}, "'#/$defs/none', which is not there"),
        ({"$ref": "https://example.com/x.json"}, "only #/... in the same schema"),
        ({"$ref": 5}, "refers to 5"),
        ({"properties": {"a": {"$ref": "#/x"}}}, "#/properties/a refers to '#/x'"),
        ({"type": "text"}, "#/type is 'text'"),
        ({"properties": {"a": {"type": "int"}}}, "#/properties/a/type is 'int'"),
        ({"properties": {"a": False}}, "#/properties/a is False"),
        ({"properties": ["a"]}, "#/properties must be"),
        ({"properties": {}, "required": "a"}, "#/required must be"),
        ({"enum": []}, "#/enum must be"),
        ({"anyOf": []}, "#/anyOf must be"),
        ({"type": "string", "pattern": "a+"}, "grammar"),
        ({"type": "string", "maxLength": -1}, "#/maxLength is -1"),
        ({"allOf": [{"type": "string"}, {"type": "number"}]}, "combined as objects"),
        ({"type": "string", "anyOf": [{"type": "number"}]}, "#/anyOf allows no value of the type"),
        (
            {
                "allOf": [
                    {"properties": {"a": {"type": "string"}}},
                    {"properties": {"a": {"type": "null"}}},
                ]
            },
            "#/properties/a/allOf/0 can only be combined",
        ),
        ({"allOf": [{"$ref": "#/allOf/0"}, {}]}, "combined as objects"),
        ({"prefixItems": [{}], "minItems": 2}, "#/minItems is 2"),
        ({"type": "array", "items": {}, "minItems": 10**8}, "#/minItems is 100000000"),
        ({"type": "string", "minLength": 10**8}, "#/minLength is 100000000"),
        ({"type": "string", "pattern": "^a{1,100000000}$"}, "#/pattern repeats more than 1000"),
        ("x", "must be a JSON schema"),
        ({"const": {1, 2}}, "cannot be written as JSON"),
    ],
    ids=str,
)
def test_a_schema_that_cannot_be_translated_is_refused_with_its_place(
    schema: Any, told: str
) -> None:
    with pytest.raises(ArgumentError, match=re.escape(told)):
        schema_grammar(schema, "the schema")


@pytest.mark.parametrize(
    ("schema", "where"),
    [
        ({"type": "integer", "minimum": 0}, "#/minimum"),
        ({"properties": {"a": {"type": "number", "multipleOf": 2}}}, "#/properties/a/multipleOf"),
        ({"type": "array", "items": {}, "uniqueItems": True}, "#/uniqueItems"),
        ({"not": {"type": "string"}}, "#/not"),
        ({"anyOf": [PERSON], "minProperties": 2}, "#/minProperties"),
        ({"type": "string", "pattern": "^a*$", "maxLength": 3}, "#/maxLength"),
        ({"type": "string", "maxLength": 10**9}, "#/maxLength"),
    ],
    ids=str,
)
def test_what_a_grammar_cannot_hold_the_model_to_is_warned_of(
    schema: dict[str, Any], where: str
) -> None:
    with pytest.warns(RuntimeWarning, match=re.escape(where)):
        schema_grammar(schema, "the schema")


def test_a_schema_as_pydantic_writes_it_is_translated_without_a_warning() -> None:
    schema = {
        "title": "Order",
        "description": "An order",
        "type": "object",
        "properties": {
            "id": {"type": "string", "format": "uuid", "title": "Id"},
            "day": {"type": "string", "format": "date"},
            "mail": {"anyOf": [{"type": "string", "format": "email"}, {"type": "null"}]},
            "who": {"allOf": [{"$ref": "#/$defs/Person"}], "description": "whose"},
            "tags": {"type": "array", "items": {"type": "string"}, "default": []},
        },
        "required": ["id", "day", "mail", "who"],
        "additionalProperties": False,
        "$defs": {"Person": PERSON},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "Ada" in schema_grammar(schema, "the schema")
