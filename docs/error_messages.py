"""The directive ``{error-messages}``: every message of the package, read from its source."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import mamlpp_ext

PACKAGE = Path(mamlpp_ext.__file__).parent
# How the findings of check_setup begin that say what cannot work, or may go wrong.
FINDING = ("problem: ", "warning: ")


@dataclass(frozen=True)
class Message:
    """What may be said at one place of the source.

    Attributes:
        place: the function that says it, ``module.name``.
        kind: the exception, or ``finding``.
        text: the message, with ``{name}`` for what is filled in, ``{…}`` for longer expressions.
        pattern: a regular expression for the message filled in.
    """

    place: str
    kind: str
    text: str
    pattern: str

    def matches(self, said: str) -> bool:
        return re.fullmatch(self.pattern, said, re.DOTALL) is not None


def modules() -> dict[str, ast.Module]:
    """Returns the parsed modules of the package by name, ``integrations.higher`` for instance."""
    paths = sorted(PACKAGE.rglob("*.py"), key=lambda path: (len(path.parts), path))
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text())
        for path in paths
    }


def messages(module: str, tree: ast.Module) -> list[Message]:
    """Returns what a module may say, in the order of its source."""
    constants = {
        target.id: statement.value
        for statement in tree.body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name) and isinstance(statement.value, ast.Constant)
    }
    return [
        Message(
            f"{module}.{function}" if function else module,
            kind,
            _read(said, constants, str, "{{{}}}".format, "({})".format),
            _read(said, constants, re.escape, lambda _: ".*", "(?:{})".format),
        )
        for kind, said, function in _said(tree, "")
    ]


def _said(node: ast.AST, function: str) -> Iterator[tuple[str, ast.expr, str]]:
    """Yields the exception, the expression of its message, and the function around it."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        function = f"{function}.{node.name}".lstrip(".")
    match node:
        case ast.Raise(exc=ast.Call(func=ast.IfExp() as either, args=[said])):
            yield f"{ast.unparse(either.body)} or {ast.unparse(either.orelse)}", said, function
        case ast.Call(func=ast.Name(id=kind), args=[said]) if kind.endswith("Error"):
            yield kind, said, function  # raised here, or returned to who raises it
        case ast.Call(
            func=ast.Attribute(value=ast.Name(id="error_msgs"), attr="append"), args=[said]
        ):
            yield "RuntimeError of load_state_dict", said, function
        case ast.JoinedStr(values=[ast.Constant(value=str(start)), *_]) if start.startswith(
            FINDING
        ):
            yield "finding", node, function
            return
        case ast.Constant(value=str(start)) if start.startswith(FINDING):
            yield "finding", node, function
        case ast.BinOp(left=ast.Constant(value=str(start))) if start.startswith(FINDING):
            yield "finding", node, function
            return
    for child in ast.iter_child_nodes(node):
        yield from _said(child, function)


def _read(
    node: ast.expr,
    constants: dict[str, ast.expr],
    literal: Callable[[str], str],
    hole: Callable[[str], str],
    group: Callable[[str], str],
) -> str:
    """Writes the expression of a string, what is known of it by ``literal``, the rest ``hole``."""

    def read(part: ast.expr) -> str:
        return _read(part, constants, literal, hole, group)

    match node:
        case ast.Constant(value=str(text)):
            return literal(text)
        case ast.JoinedStr(values=parts):
            return "".join(map(read, parts))
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return read(left) + read(right)
        case ast.IfExp(body=body, orelse=other):
            return group(f"{read(body)}|{read(other)}")
        case ast.FormattedValue(value=ast.Name() | ast.IfExp() as value):
            return read(value)
        case ast.Name(id=name):
            return read(constants[name]) if name in constants else hole(name)
        case _:
            return hole("…")


class ErrorMessages(SphinxDirective):
    """A section for each module that says anything, an entry for each message."""

    def run(self) -> list[nodes.Node]:
        self.env.note_dependency(__file__)
        sections: list[nodes.Node] = []
        for module, tree in modules().items():
            self.env.note_dependency(str(PACKAGE.joinpath(*module.split(".")).with_suffix(".py")))
            if found := messages(module, tree):
                sections.append(self._section(module, ast.get_docstring(tree) or "", found))
        return sections

    def _section(self, module: str, about: str, found: list[Message]) -> nodes.section:
        section = nodes.section(names=[f"messages-{module}"])
        self.state.document.note_explicit_target(section)
        section += nodes.title(text=module)
        section += nodes.paragraph(text=about.partition("\n\n")[0].replace("`", ""))
        seen: dict[str, int] = {}
        for message in found:
            number = seen[message.place] = seen.get(message.place, 0) + 1
            name = f"{message.place}-{number}" if number > 1 else message.place
            entry = nodes.container(names=[name.lower()], classes=["error-message"])
            self.state.document.note_explicit_target(entry)
            head = nodes.paragraph()
            head += nodes.strong(text=message.kind)
            head += nodes.Text(" in ")
            head += nodes.literal(text=message.place.removeprefix(f"{module}."))
            entry += [head, nodes.paragraph("", "", nodes.literal(text=message.text))]
            section += entry
        return section


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("error-messages", ErrorMessages)
    return {"parallel_read_safe": True}
