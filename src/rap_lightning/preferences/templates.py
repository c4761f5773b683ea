"""What a chat template does with the text of turns, proved from its source.

Most templates write each turn's text as it is, or trimmed, between control tokens. Where that can be proved, a
conversation is rendered once for all texts, as a skeleton with gaps; where it can't, every conversation is rendered on
its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PassesThrough:
    """The conditions under which a template writes every text as it is, or trimmed.

    Attributes:
        without: texts must not contain any of these.
        stripped: texts must not begin or end with blanks.
    """

    without: tuple[str, ...]
    stripped: bool

    def holds(self, text: str) -> bool:
        """Whether a text meets them."""
        trimmed = text.strip()
        if not trimmed or (self.stripped and trimmed != text):
            return False
        return not any(part in text for part in self.without)


def passes_through(template: object) -> PassesThrough | None:
    """The conditions for a template; None where no conditions can be proved, or it is no single template."""
    import jinja2

    if not isinstance(template, str):
        return None
    try:
        tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except jinja2.TemplateError:
        return None
    proof = _Proof()
    known = -1
    try:
        while proof.size() > known:  # names may be set late and used early: until nothing new is learned
            known = proof.size()
            proof.statements(tree.body)
    except _NotProved:
        return None
    return PassesThrough(tuple(sorted(proof.without)), proof.stripped)


class _NotProved(Exception):
    pass


class _Proof:
    """Follows the texts through the template.

    ``carries`` says of an expression whether a text is in it; whatever could change with the text, other than by
    writing it, ends the proof.
    """

    def __init__(self) -> None:
        self.texts: set[str] = set()  # names that hold a text
        self.turns: set[str] = {"messages"}  # names that hold a list of turns
        self.ones: set[str] = set()  # names that hold one turn
        self.spaces: set[str] = set()  # namespaces
        self.without: set[str] = set()
        self.stripped = False

    def size(self) -> int:
        """How much is known."""
        return len(self.texts) + len(self.turns) + len(self.ones) + len(self.spaces)

    def learn(self, names: set[str], name: str | None) -> None:
        """A name holds one kind of thing only, or it can't be followed."""
        if name is None or any(name in other for other in (self.texts, self.turns, self.ones) if other is not names):
            raise _NotProved
        names.add(name)

    def statements(self, body: Any) -> None:
        for node in body:
            self.statement(node)

    def statement(self, node: Any) -> None:
        from jinja2 import nodes

        if isinstance(node, nodes.Output):
            for part in node.nodes:
                self.carries(part)
        elif isinstance(node, nodes.If):
            self.condition(node.test)
            if not self.always(node.test):
                for branch in node.elif_:
                    self.statement(branch)
                self.statements(node.else_)
            self.statements(node.body)
        elif isinstance(node, nodes.For):
            if self.kind(node.iter) == "turns":
                self.learn(self.ones, node.target.name if isinstance(node.target, nodes.Name) else None)
            elif self.kind(node.iter) == "one" or self.carries(node.iter):
                raise _NotProved
            if node.test is not None:
                self.condition(node.test)
            self.statements(node.body)
            self.statements(node.else_)
        elif isinstance(node, nodes.Assign):
            self.assign(node)
        elif isinstance(node, nodes.Macro):
            self.macro(node)
        elif isinstance(node, nodes.ExprStmt):
            if self.carries(node.node):
                raise _NotProved
        elif not isinstance(node, nodes.Continue | nodes.Break):
            raise _NotProved

    def assign(self, node: Any) -> None:
        from jinja2 import nodes

        target = node.target
        name = target.name if isinstance(target, nodes.Name) else None
        if isinstance(target, nodes.NSRef):
            name = f"{target.name}.{target.attr}"
        if any(isinstance(node.node, nodes.Name) and node.node.name == space for space in self.spaces):
            raise _NotProved  # another name for a namespace
        if isinstance(node.node, nodes.Call) and getattr(node.node.node, "name", None) == "namespace":
            self.spaces.add(name or "")
        kind = self.kind(node.node)
        if kind is not None:
            self.learn(self.turns if kind == "turns" else self.ones, name)
        elif self.carries(node.node):
            self.learn(self.texts, name)

    def macro(self, node: Any) -> None:
        """A macro may not touch the conversation at all; what it is given is looked at where it is called."""
        from jinja2 import nodes

        named = self.texts | self.turns | self.ones
        for part in node.find_all((nodes.Name, nodes.Getattr, nodes.Const)):
            touched = getattr(part, "name", None) in named or "content" in (
                getattr(part, "attr", None),
                getattr(part, "value", None),
            )
            if touched:
                raise _NotProved

    def always(self, test: Any) -> bool:
        """Conditions that hold for every text: it is a string."""
        from jinja2 import nodes

        return isinstance(test, nodes.Test) and test.name == "string" and self.carries(test.node)

    def condition(self, node: Any) -> None:
        """A condition may ask whether a text is there, is a string, or holds certain words, and nothing else."""
        from jinja2 import nodes

        if self.is_turns(node) or (isinstance(node, nodes.Test) and self.is_turns(node.node)):
            return  # turns are there or not, whatever their texts
        if isinstance(node, nodes.And | nodes.Or):
            self.condition(node.left)
            self.condition(node.right)
        elif isinstance(node, nodes.Not):
            self.condition(node.node)
        elif isinstance(node, nodes.Test):
            if self.carries(node.node) and node.name not in ("string", "defined", "none", "mapping", "undefined"):
                raise _NotProved
        elif isinstance(node, nodes.Compare):
            self.comparison(node)
        elif isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr) and self.carries(node.node.node):
            if node.node.attr not in ("startswith", "endswith"):
                raise _NotProved
            self.keep_out(node.args)
        else:
            self.carries(node)  # truth of a text: texts are never empty

    def comparison(self, node: Any) -> None:
        from jinja2 import nodes

        sides = [node.expr, *(operand.expr for operand in node.ops)]
        if not self.some_carry(sides):
            return
        inside = len(node.ops) == 1 and node.ops[0].op in ("in", "notin")
        if inside and not self.carries(node.expr):
            self.keep_out([node.expr])
        elif len(sides) != 2 or not any(isinstance(side, nodes.Const) and side.value is None for side in sides):
            raise _NotProved

    def keep_out(self, args: Any) -> None:
        from jinja2 import nodes

        if (
            len(args) != 1
            or not isinstance(args[0], nodes.Const)
            or not isinstance(args[0].value, str)
            or not args[0].value
        ):
            raise _NotProved
        self.without.add(args[0].value)

    def is_turns(self, node: Any) -> bool:
        """Whether an expression is the conversation, a part of it, or one turn."""
        return self.kind(node) is not None

    def kind(self, node: Any) -> str | None:
        """``turns`` for a list of turns, ``one`` for a turn, None for anything else."""
        from jinja2 import nodes

        name = node.name if isinstance(node, nodes.Name) else None
        if isinstance(node, nodes.Getattr) and isinstance(node.node, nodes.Name):
            name = f"{node.node.name}.{node.attr}"
        if name is not None:
            return "turns" if name in self.turns else "one" if name in self.ones else None
        if isinstance(node, nodes.Getitem):
            base = self.kind(node.node)
            text = isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str)
            if base == "one" and not text:
                raise _NotProved  # a part of a turn that can't be named
            if base != "turns" or text:
                return None
            return "turns" if isinstance(node.arg, nodes.Slice) else "one"
        if isinstance(node, nodes.Filter) and node.name in ("list", "reverse"):
            return self.kind(node.node)
        if isinstance(node, nodes.CondExpr):
            kinds = {self.kind(part) for part in (node.expr1, node.expr2)}
            if len(kinds) > 1 and kinds != {None}:
                raise _NotProved
            return kinds.pop()
        return None

    def carries(self, node: Any) -> bool:
        """Whether an expression holds a text as it is, or trimmed; raises where it holds one in any other way."""
        from jinja2 import nodes

        if node is None or isinstance(node, nodes.Const | nodes.TemplateData):
            return False
        if isinstance(node, nodes.Name):
            if node.name in self.turns | self.ones:
                raise _NotProved  # a whole turn goes somewhere
            return node.name in self.texts
        if isinstance(node, nodes.Getattr | nodes.Getitem):
            return self.part(node)
        if isinstance(node, nodes.Filter):
            return self.filter(node)
        if isinstance(node, nodes.Call):
            return self.call(node)
        if isinstance(node, nodes.Test | nodes.Compare | nodes.Not | nodes.And | nodes.Or):
            self.condition(node)
            return False
        if isinstance(node, nodes.CondExpr):
            self.condition(node.test)
            return self.some_carry([node.expr1, node.expr2])
        if isinstance(node, nodes.Add | nodes.Concat):
            return self.some_carry(node.iter_child_nodes())
        if self.some_carry(child for child in node.iter_child_nodes() if not self.is_turns(child)):
            raise _NotProved
        return False

    def some_carry(self, parts: Any) -> bool:
        """Whether any of the expressions carries a text; all are looked at, since each may end the proof."""
        return True in [self.carries(part) for part in parts]

    def part(self, node: Any) -> bool:
        from jinja2 import nodes

        key = node.attr if isinstance(node, nodes.Getattr) else getattr(node.arg, "value", None)
        unknown = key == "content" and not self.is_turns(node.node)
        if unknown or key in ("previtem", "nextitem"):  # turns by a way that isn't followed here
            raise _NotProved
        if isinstance(node.node, nodes.Name) and f"{node.node.name}.{key}" in self.texts:
            return True
        if self.is_turns(node.node):
            if not isinstance(key, str):
                raise _NotProved
            return key == "content"
        if self.carries(node.node):
            # the first or last part of a text that was split at words it must not hold
            parts = isinstance(node.node, nodes.Call) and getattr(node.node.node, "attr", None) == "split"
            negative = isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Neg)
            last = negative and getattr(node.arg.node, "value", None) == 1
            if isinstance(node, nodes.Getitem) and parts and (key in (0, -1) or last):
                return True
            raise _NotProved
        return False

    def filter(self, node: Any) -> bool:
        if node.node is not None and self.is_turns(node.node):
            if node.name in ("length", "count"):
                return False
            raise _NotProved
        inner = self.carries(node.node)
        options = bool(node.args or node.kwargs or node.dyn_args or node.dyn_kwargs)
        if self.some_carry([*node.args, *(keyword.value for keyword in node.kwargs)]):
            raise _NotProved
        if inner and node.name == "trim" and not options:
            return True
        if inner and node.name != "safe":
            raise _NotProved
        return inner

    def call(self, node: Any) -> bool:
        from jinja2 import nodes

        given = [*node.args, *(keyword.value for keyword in node.kwargs)]
        if any(map(self.is_turns, given)) or self.some_carry(given):
            raise _NotProved  # a function or macro gets a text
        if not isinstance(node.node, nodes.Getattr):
            return False
        if self.is_turns(node.node.node):
            if node.node.attr == "get" and node.args and isinstance(node.args[0], nodes.Const):
                return bool(node.args[0].value == "content")
            raise _NotProved
        if not self.carries(node.node.node):
            return False
        if node.node.attr == "split":
            self.keep_out(node.args)
            return True
        if node.node.attr in ("strip", "lstrip", "rstrip"):
            blanks = all(isinstance(arg, nodes.Const) and not str(arg.value).strip() for arg in node.args)
            if not blanks or node.kwargs:
                raise _NotProved
            self.stripped = self.stripped or node.node.attr != "strip" or bool(node.args)
            return True
        raise _NotProved
