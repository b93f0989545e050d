"""JSON and YAML that someone else wrote: one set of rules for both.

Only what JSON knows comes out: objects, lists, texts, numbers, true, false and null. What a text unfolds to is limited
before it is built, and a field that is there twice with two values is refused: readers differ in which one they take.
"""

import json
import reprlib
from typing import Any

import yaml

from .errors import DocumentError

MAX_VALUES = 2**21
MAX_FIELDS = 2**17
MAX_DEPTH = 100
MAX_YAML_BYTES = 4 * 2**20
_YAML: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml where PyYAML has it: ten times faster
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


def show(value: object) -> str:
    """A value in at most 60 printable characters, however large or deep it is."""
    shown = _SHORT.repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def parse_json(text: str, where: str) -> Any:
    """A JSON value; ``where`` names it in errors. Raises DocumentError."""
    values = sum(map(text.count, ",[{"))
    if values > MAX_VALUES:
        raise DocumentError(f"{where}: about {values:,} values, at most {MAX_VALUES:,} are read: divide it")

    def fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return _object(pairs, where)

    try:
        return json.loads(text, object_pairs_hook=fields)
    except (ValueError, RecursionError) as error:
        raise DocumentError(f"{where}: not JSON ({error})") from None


def parse_object(text: str, where: str) -> dict[str, Any]:
    """A JSON object; ``where`` names it in errors. Raises DocumentError."""
    body = parse_json(text, where)
    if not isinstance(body, dict):
        raise DocumentError(f"{where}: expected a JSON object, got {show(body)}")
    return body


def parse_yaml(text: str, where: str) -> Any:
    """A YAML document of at most ``MAX_YAML_BYTES`` as JSON values, but keys may be whole numbers; dates stay texts.

    Aliases and tags are refused: a few lines of them can unfold to any size, or to objects.
    Raises DocumentError.
    """
    if len(text) > MAX_YAML_BYTES:
        raise DocumentError(f"{where}: larger than {MAX_YAML_BYTES >> 20} MiB, refused")
    try:
        return _Yaml(where).read(text)
    except (yaml.YAMLError, RecursionError, ValueError, LookupError) as error:
        # The last two: what PyYAML lets through on a number of 5,000 digits or without any.
        raise DocumentError(f"{where}: not YAML ({' '.join(str(error).split())[:200]})") from None


def _object(pairs: list[tuple[Any, Any]], where: str) -> dict[Any, Any]:
    body = dict(pairs)
    if len(pairs) > MAX_FIELDS:
        raise DocumentError(f"{where}: an object of {len(pairs):,} fields, at most {MAX_FIELDS:,} are read")
    if len(body) < len(pairs):
        for name, value in pairs:
            if body[name] is not value and body[name] != value:
                raise DocumentError(
                    f"{where}: {show(name)} is there twice, as {show(value)} and as {show(body[name])}: delete one"
                )
    return body


class _Yaml:
    """Builds values from the events of one document, without recursion."""

    def __init__(self, where: str) -> None:
        self.where, self.values = where, 0
        self.scalars = yaml.constructor.SafeConstructor()
        self.kinds = yaml.resolver.Resolver()
        self.make = {
            "tag:yaml.org,2002:null": lambda node: None,
            "tag:yaml.org,2002:bool": self.scalars.construct_yaml_bool,
            "tag:yaml.org,2002:int": self.scalars.construct_yaml_int,
            "tag:yaml.org,2002:float": self.scalars.construct_yaml_float,
        }

    def read(self, text: str) -> Any:
        # Each level is a list of what it holds so far; a mapping's holds keys and values in turn.
        levels: list[list[Any]] = [[]]
        documents = 0
        for event in yaml.parse(text, Loader=_YAML):
            match event:
                case yaml.DocumentStartEvent():
                    documents += 1
                    if documents > 1:
                        raise DocumentError(f"{self.where}: more than one YAML document")
                case yaml.AliasEvent():
                    raise DocumentError(f"{self._line(event)}: an alias (*{event.anchor}): write its value out")
                case yaml.ScalarEvent():
                    self._check(event)
                    levels[-1].append(self._scalar(event))
                case yaml.SequenceStartEvent() | yaml.MappingStartEvent():
                    self._check(event)
                    levels.append([])
                    if len(levels) > MAX_DEPTH:
                        raise DocumentError(f"{self._line(event)}: nested too deeply")
                case yaml.SequenceEndEvent():
                    done = levels.pop()
                    levels[-1].append(done)
                case yaml.MappingEndEvent():
                    done = levels.pop()
                    levels[-1].append(self._mapping(done))
        return levels[0][0] if levels[0] else None

    def _mapping(self, held: list[Any]) -> dict[Any, Any]:
        keys = held[::2]
        for key in keys:
            if not isinstance(key, str | int):
                raise DocumentError(f"{self.where}: a field's name must be a text or a whole number, got {show(key)}")
        return _object(list(zip(keys, held[1::2], strict=True)), self.where)

    def _scalar(self, event: yaml.ScalarEvent) -> Any:
        tag = self.kinds.resolve(yaml.ScalarNode, event.value, event.implicit)
        make = self.make.get(tag)
        return make(yaml.ScalarNode(tag, event.value)) if make else event.value

    def _check(self, event: Any) -> None:
        self.values += 1
        if self.values > MAX_VALUES:
            raise DocumentError(f"{self.where}: more than {MAX_VALUES:,} values, refused")
        if event.tag not in (None, "!"):
            raise DocumentError(f"{self._line(event)}: a tag ({show(event.tag)}): write the value without it")

    def _line(self, event: Any) -> str:
        return f"{self.where}: not YAML that is read here, line {event.start_mark.line + 1}"
