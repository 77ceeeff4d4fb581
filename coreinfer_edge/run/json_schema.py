"""JSON schemas as grammars: what the binding's converter drops or mistakes is mended or told."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from coreinfer_edge.binding.load import llama_cpp
from coreinfer_edge.errors import ArgumentError

TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")

# Any value. The converter would take {} for any object.
ANY: dict[str, Any] = {"anyOf": [{"type": type_} for type_ in TYPES if type_ != "integer"]}

# The converter writes a repetition out, with one level of brackets for each time, and
# ``checked_grammar`` allows twice this many levels.
MOST_REPEATED = 1000

# What the converter passes over, and what else a schema may demand.
# fmt: off
_NOT_ENFORCED = frozenset({
    "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "uniqueItems",
    "contains", "minContains", "maxContains", "patternProperties", "propertyNames",
    "minProperties", "maxProperties", "not", "if", "then", "else", "dependentRequired",
    "dependentSchemas", "dependencies", "unevaluatedItems", "unevaluatedProperties",
    "additionalItems",
})
# fmt: on
_OF_TYPE = {
    "properties": "object",
    "required": "object",
    "additionalProperties": "object",
    "items": "array",
    "prefixItems": "array",
    "minItems": "array",
    "maxItems": "array",
    "pattern": "string",
    "minLength": "string",
    "maxLength": "string",
}
_IN_BRACES = re.compile(r"(?<=[{,])\d+(?=[,}])")
# All that demand something of the value; other keys describe it.
_DEMANDS = _NOT_ENFORCED | _OF_TYPE.keys() | {"$ref", "anyOf", "oneOf", "allOf", "enum", "const"}


def schema_grammar(schema: object, what: str, warn: bool = True) -> str:
    """The grammar (GBNF) of the JSON texts that a schema allows.

    Keywords that a grammar cannot hold the model to are warned of, once a schema.

    Args:
        schema: a JSON schema, as Python has it.
        what: what to call it in an error.
        warn: of keywords that the answer is not held to.

    Raises:
        ArgumentError: it is no schema, or uses what cannot be translated; says where.
    """
    if not isinstance(schema, Mapping):
        raise ArgumentError(f"{what} is {schema!r:.80}: it must be a JSON schema, a dict")
    try:
        document = json.loads(json.dumps(schema))
    except (TypeError, ValueError, RecursionError) as error:
        raise ArgumentError(f"{what} cannot be written as JSON: {error}") from error
    normal = _Normal(document, what)
    try:
        grammar = llama_cpp.llama_grammar.json_schema_to_gbnf(json.dumps(normal.document()))
    except ArgumentError:
        raise
    except Exception as error:
        raise ArgumentError(
            f"{what} cannot be made into a grammar: {str(error)[:300] or type(error).__name__}"
        ) from error
    if warn and normal.not_enforced:
        warnings.warn(
            f"{what}: the answer is not held to {', '.join(sorted(normal.not_enforced))}: check it"
            " yourself, or describe it in the prompt",
            RuntimeWarning,
            stacklevel=3,
        )
    return str(grammar)


class _Normal:
    """A schema in the words that the converter understands."""

    def __init__(self, document: Any, what: str) -> None:
        self._root = document
        self._what = what
        self._names: dict[str, str] = {}
        self._definitions: dict[str, Any] = {}
        self.not_enforced: set[str] = set()

    def document(self) -> dict[str, Any]:
        result = self._schema(self._root, "#")
        return {"$defs": self._definitions, **result}

    def _error(self, where: str, problem: str) -> ArgumentError:
        return ArgumentError(f"{self._what}: {where} {problem}")

    def _ignored(self, schema: Mapping[str, Any], where: str, used: set[str]) -> None:
        for key in (schema.keys() & _DEMANDS) - used:
            self.not_enforced.add(f"{where}/{key}")

    def _schema(self, schema: Any, where: str) -> dict[str, Any]:
        if schema is True:
            return ANY
        if not isinstance(schema, dict):
            raise self._error(where, f"is {schema!r:.80}, and no schema")
        if "$ref" in schema:
            self._ignored(schema, where, {"$ref"})
            return {"$ref": self._reference(schema["$ref"], where)}
        for key in ("anyOf", "oneOf"):
            if key in schema:
                self._ignored(schema, where, {key, "type"})
                return {"anyOf": self._alternatives(schema, key, where)}
        types = schema.get("type")
        if isinstance(types, list):
            each = [{**schema, "type": type_} for type_ in types]
            return {"anyOf": self._schemas(each, where)}
        if types is not None and types not in TYPES:
            raise self._error(
                f"{where}/type", f"is {types!r}: it must be one of {', '.join(TYPES)}"
            )
        if "const" in schema:
            return {"const": schema["const"]}
        if "enum" in schema:
            if not isinstance(schema["enum"], list) or not schema["enum"]:
                raise self._error(f"{where}/enum", "must be a list of values")
            return {"enum": schema["enum"]}
        if "allOf" in schema:
            return self._all_of(schema, where)
        implied = [type_ for key, type_ in _OF_TYPE.items() if key in schema]
        type_ = types or (implied[0] if implied else None)
        if type_ is None:
            self._ignored(schema, where, set())
            return ANY if not schema.get("format") else {"type": "string", **schema}
        return self._typed(schema, str(type_), where)

    def _schemas(self, schemas: Any, where: str) -> list[dict[str, Any]]:
        if not isinstance(schemas, list) or not schemas:
            raise self._error(where, "must be a list of schemas")
        return [self._schema(item, f"{where}/{i}") for i, item in enumerate(schemas)]

    def _alternatives(
        self, schema: Mapping[str, Any], key: str, where: str
    ) -> list[dict[str, Any]]:
        """Those of anyOf or oneOf, held to the type beside it."""
        items, types = schema[key], schema.get("type")
        if types is None or not isinstance(items, list) or not items:
            return self._schemas(items, f"{where}/{key}")
        allowed = _listed(types)
        held = []
        for i, item in enumerate(items):
            is_reference = isinstance(item, dict) and "$ref" in item
            described = self._target(item["$ref"], where) if is_reference else item
            own = allowed
            if isinstance(described, dict):
                implied = [type_ for name, type_ in _OF_TYPE.items() if name in described][:1]
                own = implied or list(TYPES) if is_reference else allowed
                own = _listed(described.get("type", own))
            both = _common_types(own, allowed)
            if not both:
                continue  # no value is of both types
            if is_reference:
                if both != own:
                    self.not_enforced.add(f"{where}/type")
            elif item is True or isinstance(item, dict):
                item = {**(item if item is not True else {}), "type": both}
            held.append(self._schema(item, f"{where}/{key}/{i}"))
        if not held:
            raise self._error(f"{where}/{key}", f"allows no value of the type {types!r}")
        return held

    def _typed(self, schema: Mapping[str, Any], type_: str, where: str) -> dict[str, Any]:
        used = {"type"} | {key for key, of in _OF_TYPE.items() if of == type_}
        # keys of other types say nothing about a value of this one
        self._ignored(schema, where, used | (_OF_TYPE.keys() - _NOT_ENFORCED))
        if type_ == "object":
            return self._object(schema, where)
        if type_ == "array":
            return self._array(schema, where)
        if type_ != "string":
            return {"type": type_}
        result: dict[str, Any] = {"type": "string"}
        keys = [key for key in ("pattern", "minLength", "maxLength", "format") if key in schema]
        if "pattern" in keys:
            # the converter takes a pattern alone
            self.not_enforced |= {f"{where}/{key}" for key in keys if key.endswith("Length")}
        for key in keys:
            if key.endswith("Length"):
                self._repeat(result, schema, key, where)
            elif not isinstance(schema[key], str):
                raise self._error(f"{where}/{key}", "must be a text")
            elif any(int(n[:9]) > MOST_REPEATED for n in _IN_BRACES.findall(schema[key])):
                raise self._error(f"{where}/{key}", f"repeats more than {MOST_REPEATED} times")
            else:
                result[key] = schema[key]
        return result

    def _repeat(
        self, result: dict[str, Any], schema: Mapping[str, Any], key: str, where: str
    ) -> None:
        """Take over the least or the most of something, as far as a grammar can hold to it."""
        n = self._count(schema[key], f"{where}/{key}")
        if n <= MOST_REPEATED:
            result[key] = n
        elif key.startswith("max"):
            self.not_enforced.add(f"{where}/{key}")
        else:
            raise self._error(
                f"{where}/{key}", f"is {n}: a grammar can demand {MOST_REPEATED} at most"
            )

    def _count(self, value: Any, where: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self._error(where, f"is {value!r}: it must be a number from 0")
        return value

    def _object(self, schema: Mapping[str, Any], where: str) -> dict[str, Any]:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(properties, dict):
            raise self._error(f"{where}/properties", "must be a dict from names to schemas")
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise self._error(f"{where}/required", "must be a list of names")
        more = schema.get("additionalProperties", True)
        result: dict[str, Any] = {"type": "object"}
        if properties or required or more is not True:
            # a required property that is not described would be left out
            described = {**properties, **{n: True for n in required if n not in properties}}
            result["properties"] = {
                name: self._schema(item, f"{where}/properties/{name}")
                for name, item in described.items()
            }
            result["required"] = required
        if more is not True and more is not False:
            result["additionalProperties"] = self._schema(more, f"{where}/additionalProperties")
        elif "additionalProperties" in schema and (properties or required or more is False):
            result["additionalProperties"] = more
        return result

    def _array(self, schema: Mapping[str, Any], where: str) -> dict[str, Any]:
        items = schema.get("prefixItems", schema.get("items", True))
        if isinstance(items, list):
            result: dict[str, Any] = {"prefixItems": self._schemas(items, f"{where}/items")}
            # as many as are described, whatever the counts say
            for key in ("minItems", "maxItems"):
                n = self._count(schema.get(key, len(items)), f"{where}/{key}")
                if (n > len(items)) if key == "minItems" else (n < len(items)):
                    raise self._error(
                        f"{where}/{key}", f"is {n}, with {len(items)} items described"
                    )
            return {"type": "array", **result}
        result = {"type": "array", "items": self._schema(items, f"{where}/items")}
        for key in ("minItems", "maxItems"):
            if key in schema:
                self._repeat(result, schema, key, where)
        return result

    def _all_of(self, schema: Mapping[str, Any], where: str) -> dict[str, Any]:
        parts = schema["allOf"]
        if not isinstance(parts, list) or not parts:
            raise self._error(f"{where}/allOf", "must be a list of schemas")
        own = {key: value for key, value in schema.items() if key != "allOf"}
        if own.keys() & _DEMANDS:
            parts = [*parts, own]
        if len(parts) == 1:
            return self._schema(parts[0], f"{where}/allOf/0")
        merged: dict[str, Any] = {"type": "object", "properties": {}, "required": []}
        for i, part in enumerate(parts):
            for _ in range(len(self._names) + 64):  # a reference to a reference
                if not (isinstance(part, dict) and "$ref" in part):
                    break
                part = self._target(part["$ref"], where)
            is_object = isinstance(part, dict) and part.get("type", "object") == "object"
            if not is_object or "$ref" in part:
                raise self._error(f"{where}/allOf/{i}", "can only be combined as objects")
            known = {"type", "properties", "required", "additionalProperties"}
            self._ignored(part, f"{where}/allOf/{i}", known)
            for name, item in part.get("properties", {}).items():
                known_item = merged["properties"].get(name, True)
                merged["properties"][name] = _both(known_item, item)
            merged["required"] += part.get("required", [])
        return self._object(merged, where)

    def _reference(self, ref: Any, where: str) -> str:
        """The same definition under a name of its own: the converter goes by the last word."""
        if ref not in self._names:
            target = self._target(ref, where)
            name = self._names[ref] = f"definition{len(self._names)}"
            self._definitions[name] = self._schema(target, ref)
        return f"#/$defs/{self._names[ref]}"

    def _target(self, ref: Any, where: str) -> Any:
        if not isinstance(ref, str) or not (ref == "#" or ref.startswith("#/")):
            raise self._error(where, f"refers to {ref!r}: only #/... in the same schema is known")
        target = self._root
        for part in ref.split("/")[1:]:
            key = unquote(part).replace("~1", "/").replace("~0", "~")
            if isinstance(target, list) and key.isdecimal() and int(key) < len(target):
                target = target[int(key)]
            elif isinstance(target, dict) and key in target:
                target = target[key]
            else:
                raise self._error(where, f"refers to {ref!r}, which is not there")
        return target


def _listed(types: Any) -> list[Any]:
    return types if isinstance(types, list) else [types]


def _common_types(some: list[Any], others: list[Any]) -> list[Any]:
    """The types of the first that values of the second can have; integers are numbers."""
    both = [type_ for type_ in some if type_ in others]
    if "number" in some and "number" not in others and "integer" in others:
        both.append("integer")
    if "integer" in some and "integer" not in others and "number" in others:
        both.append("integer")
    return both


def _both(one: Any, other: Any) -> Any:
    """A schema that holds to two."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        return other if one is True else one if other is True else {"allOf": [one, other]}
    demands = _DEMANDS | {"type", "format"}
    for some, more in ((one, other), (other, one)):
        if not some.keys() & demands:
            return {**some, **more}
    if "$ref" in one or "$ref" in other:
        return one if one == other else {"allOf": [one, other]}
    if any(one[key] != other[key] for key in one.keys() & other.keys() & demands):
        return {"allOf": [one, other]}
    return {**one, **other}


def format_grammar(response_format: Any) -> str | None:
    """The grammar of OpenAI's ``response_format``; None for any text.

    ``{"type": "json_object"}``, with ``"schema"`` as llama-cpp-python has it, or
    ``{"type": "json_schema", "json_schema": {"name": ..., "schema": ...}}``.
    """
    if response_format is None:
        return None
    type_ = response_format.get("type") if isinstance(response_format, dict) else None
    if type_ == "text":
        return None
    if type_ == "json_object":
        if "schema" not in response_format:
            return str(llama_cpp.llama_grammar.JSON_GBNF)
        return schema_grammar(response_format["schema"], "the schema of response_format")
    if type_ == "json_schema":
        inner = response_format.get("json_schema")
        if not isinstance(inner, dict) or "schema" not in inner:
            raise ArgumentError(
                'response_format has no schema: give {"type": "json_schema", "json_schema":'
                ' {"name": ..., "schema": {...}}}'
            )
        return schema_grammar(inner["schema"], "the schema of response_format")
    raise ArgumentError(
        f"response_format is {response_format!r:.120}: its type must be text, json_object or"
        " json_schema"
    )
