"""Binding times: the pass over a rule that splits it into `decide` and `update` (see `staging`)."""

from __future__ import annotations

import ast
import copy
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, NoReturn

from . import primitives
from .language import After, Before, RuleError, Source, parse


class Time(IntEnum):
    """When a value is known."""

    STATIC = 0
    UNIFORM = 1
    ELEMENT = 2


@dataclass(frozen=True)
class Value:
    """What staging knows of an expression: when it is known, and its residual code."""

    time: Time
    node: ast.expr  # in terms of `decide` if uniform, of `update` if element, a constant if static
    integer: bool = False
    truth: bool = False  # a condition rather than a number

    @property
    def constant(self) -> Any:
        """The value of a static expression."""
        assert isinstance(self.node, ast.Constant)
        return self.node.value


def _static(value: Any) -> Value:
    return Value(Time.STATIC, ast.Constant(value), isinstance(value, int), isinstance(value, bool))


@dataclass
class _Sum:
    """A sum over elements while a rule is staged: what is added, and the names that `decide` reads it by."""

    kind: str
    element: str  # the name in `update` of what is added up
    round: int  # the measuring pass in which it can be taken: those of earlier rounds are known then
    names: dict[str, str]  # scope -> name in `decide`
    column: str  # the argument of `update` that it is, as it stands, or ""


@dataclass(frozen=True)
class Measure:
    """A reading pass before the update: `source` defines `measure(p, g, *states, *inputs, h) -> a value per sum`."""

    source: str
    kinds: tuple[str, ...]  # "norm" or "total", for each value
    columns: tuple[str, ...]  # the argument that each value is as it stands, or ""


def _names(node: ast.AST) -> set[str]:
    """The variables in a piece of code, without the functions that it calls."""
    called = {id(n.func) for n in ast.walk(node) if isinstance(n, ast.Call)}
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and id(n) not in called}


@dataclass(frozen=True)
class Staged:
    """A rule staged for given static values: the text of `decide`, `measure` and `update`, what they read and return.

    Attributes:
        name: the rule's name.
        uniforms: the arguments of `decide` after `t`, in order.
        states: the states that exist, in order, averages among them; `update` takes and returns them after `p`.
        inputs: what else `update` reads of an element, after the states.
        scalars: state of a group rather than of an element: `decide` takes and returns it.
        shared: for each of them, over what it is one, since it follows from such sums: "all", "group", or "leaf".
        common: the uniforms that what is one for all follows from: they must be the same in all groups.
        sums: for each sum that `decide` takes, the number of what is added (counted over all measures) and the scope.
        reports: what `decide` returns for people, such as the norm of the gradient.
        emitted: what `update` returns after the states, to be summed up as norms.
        slots: how many numbers `decide` returns for the other functions.
        exact: whether every operation is correctly rounded everywhere, so that every backend gives the same bits.
        decide: source of `decide(t, *uniforms, *scalars, *sums) -> *h, *scalars, *reports`.
        measures: the reading passes, in order. `decide` runs before the first and after each.
        update: source of `update(p, g, *states, *inputs, h) -> p, *states, *emitted`.
        average: source of `average(p, g, *states, *inputs, h) -> *averages`, for leaves that are not updated; "" if no
            averages are kept.
    """

    name: str
    uniforms: tuple[str, ...]
    states: tuple[str, ...]
    inputs: tuple[str, ...]
    scalars: tuple[str, ...]
    shared: tuple[str, ...]
    common: tuple[str, ...]
    sums: tuple[tuple[int, str], ...]
    reports: tuple[str, ...]
    emitted: tuple[str, ...]
    slots: int
    exact: bool
    decide: str
    measures: tuple[Measure, ...]
    update: str
    average: str

    @property
    def quantities(self) -> int:
        """How many things are added up over elements, by the measures and the update together."""
        return sum(len(m.kinds) for m in self.measures) + len(self.emitted)

    @property
    def asides(self) -> bool:
        """Whether something is done for rows that are not updated: they share state with others, or are averaged."""
        return bool(self.average) or any(scope != "leaf" for scope in self.shared)

    def show(self) -> None:
        """Print the staged code."""
        print(self)

    def __str__(self) -> str:
        """The staged code."""
        return "\n\n".join([self.decide, *(m.source for m in self.measures), self.update, self.average]).rstrip()


class Stager:
    """One pass over a rule's statements that splits them into those of `decide` and those of `update`."""

    def __init__(self, rule: Source, static: Mapping[str, Any], on: frozenset[str]) -> None:
        self.rule = rule
        self.static = static
        self.on = on
        self.env: dict[str, Value | None] = {}
        self.globals: Mapping[str, Any] = rule.globals
        self.decide: list[tuple[str, ast.expr]] = []
        self.update: list[tuple[str, ast.expr]] = []
        self.average: list[tuple[str, ast.expr]] = []
        self.slots: dict[str, tuple[str, ast.expr]] = {}  # code in decide -> (name in update, node)
        self.sums: dict[Any, _Sum] = {}
        self.reports: dict[str, Value] = {}
        self.rounds: dict[str, dict[str, int]] = {"decide": {}, "update": {}}  # after how many measures a name is known
        self.versions: dict[str, int] = {}  # how often a name in update has been assigned
        self.reserved = {"t", "lr", *rule.hyperparameters, *rule.scalars}
        self.taken = {a.arg for a in ast.walk(rule.tree) if isinstance(a, ast.arg)} | _names(rule.tree) | {"t"}
        self.h = "h" if "h" not in self.taken else self._fresh("h")
        self.taken.add("h")
        self.guards: list[ast.expr] = []  # uniform conditions under which the present statement runs
        self.depth = 0  # conditionals (on uniforms or elements) around the present statement
        self.exact = True

    # The whole

    def run(self, before: Before | None, after: After | None) -> Staged:
        """Stage the rule, and what comes before and after it."""
        rule = self.rule
        own = ("p", "g", *rule.states)
        for name in own:
            self.env[name] = Value(Time.ELEMENT, ast.Name(name))
        owned = set(rule.hyperparameters)
        start = self._named("start", Value(Time.ELEMENT, ast.Name("p")))
        gradient = self._named("raw", Value(Time.ELEMENT, ast.Name("g")))
        lr = None
        if before is not None:
            p, g, lr, *found = self._option(before, owned)
            reports = dict(zip(before.reports, found, strict=True))
            self.reports = {name: value for name, value in reports.items() if value.time is Time.UNIFORM}
            self.env = {k: v for k, v in self.env.items() if k in own}
            for name, value in (("p", p), ("g", g)):
                self._assign(name, value, before.tree)
            self.globals = rule.globals
        self._bind(owned)
        if lr is not None and lr.time is Time.ELEMENT:
            self.env["lr"] = lr
        for name in rule.scalars:
            self.env[name] = Value(Time.UNIFORM, ast.Name(name))
        self.env["base_lr"] = Value(
            Time.UNIFORM, ast.Name("lr")
        )  # the same for all elements, whatever their own factor
        if rule.counts:
            self.env["t"] = Value(Time.UNIFORM, ast.Name("t"), integer=True)
        results = self._body(rule.tree)
        expected = ["the new p", *rule.states, *rule.scalars]
        if len(results) != len(expected):
            self._fail(
                rule.tree.body[-1],
                f"returns {len(results)} value{'s' * (len(results) != 1)}, expected {len(expected)}: the new p"
                + (f", then {', '.join(expected[1:])} in the order of the arguments" if expected[1:] else " alone"),
            )
        states = list(zip(rule.states, results[1:], strict=False))
        scalars = list(zip(rule.scalars, results[1 + len(rule.states) :], strict=True))
        for name, value in scalars:
            if value.time is Time.ELEMENT:
                self._fail(rule.tree.body[-1], f"{name!r} is state of a group, so it cannot follow from elements")
        new_p, emitted, averages = results[0], {}, []
        if after is not None:
            new_p = self._named("new", new_p)
            self.env = {"p": new_p, "start": start}
            new_p, *averages = self._option(after, owned)
            averages = averages if self.static.get("averaged") else []
            states += zip(AVERAGES, averages, strict=False)
            if self.static.get("statistics"):
                new_p = self._named("new", new_p)
                change = Value(Time.ELEMENT, ast.BinOp(new_p.node, ast.Sub(), start.node))
                emitted = {"param_norm": new_p, "update_norm": self._named("change", change)}
                if "grad_norm" not in self.reports:
                    emitted["raw_grad_norm"] = gradient
            if averages:
                averages = self._average(after, owned)
        return self._residual(self._lift(new_p), states, scalars, emitted, averages)

    def _average(self, after: After, owned: set[str]) -> list[Value]:
        """Stage the averages of leaves that are not updated: as after an update that leaves `p` as it is."""
        update, static = self.update, self.static
        p = Value(Time.ELEMENT, ast.Name("p"))
        self.update, self.static = [], {**static, "per_element": False}
        self.env = {"p": p, "start": p}
        _, *averages = self._option(after, owned)
        averages = [replace(value, node=self._lift(value)) for value in averages]
        self.update, self.static, self.average = update, static, self.update
        return averages

    def _option(self, function: Source, owned: set[str]) -> list[Value]:
        """Stage what comes before or after the rule. What a rule names itself, it owns: here it is off."""
        options = set(function.hyperparameters)
        self._bind((options - owned) | (options & {"lr"}))
        self.env.update({name: _static(0.0) for name in (options & owned) - {"lr"}})
        for name in function.states:
            self.env[name] = Value(Time.ELEMENT, ast.Name(name))
        self.reserved |= options
        self.taken |= _names(function.tree) | {a.arg for a in ast.walk(function.tree) if isinstance(a, ast.arg)}
        self.globals = function.globals
        return self._body(function.tree)

    def _bind(self, names: set[str]) -> None:
        for name in sorted(names):
            if name in self.static:
                self.env[name] = _static(self.static[name])
            else:
                self.env[name] = Value(Time.UNIFORM, ast.Name(name))

    def _residual(
        self,
        new_p: ast.expr,
        states: list[tuple[str, Value]],
        scalars: list[tuple[str, Value]],
        emitted: dict[str, Value],
        averages: list[Value],
    ) -> Staged:
        """Drop what nobody uses, states and sums included, and write the functions."""
        kept = {name: self._lift(value) for name, value in states}
        extra = {name: self._lift(value) for name, value in emitted.items()}
        last = [value.node for _, value in scalars] + [self._number(v).node for v in self.reports.values()]
        sums: list[_Sum] = []
        while True:
            added = [ast.Name(s.element) for s in sums]
            unused = self._unused(new_p, kept, [*extra.values(), *added])
            if unused is not None:  # a state that is returned as it came and read by nobody else does not exist
                del kept[unused]
                continue
            results = [new_p, *kept.values(), *extra.values()]
            update, _ = self._live(results, self.update)
            passes, _ = self._live([*results, *added], self.update)
            others = [*results, *added, *(v.node for v in averages), *(x for _, x in self.average)]
            read = set().union(*(_names(x) for _, x in passes), *map(_names, others))
            slots = [(name, node) for name, node in self.slots.values() if name in read]
            slots = slots or [("unused", ast.Constant(0.0))]
            values = [node for _, node in slots] + last
            decide, free = self._live(values, self.decide)
            needed = [s for s in self.sums.values() if not free.isdisjoint(s.names.values())]
            needed.sort(key=lambda s: s.round)
            if needed == sums:
                break
            sums = needed
        names = {n: (k, scope) for k, s in enumerate(sums) for scope, n in s.names.items() if n in free}
        arguments = ["p", "g", *kept, *self._inputs(passes, [*results, *added], kept)]
        unpacked = (f"({''.join(n + ', ' for n, _ in slots).strip()})", ast.Name(self.h))
        uniforms = tuple(n for n in ("lr", *_ordered(self.rule, free - set(names))) if n in free)

        def element(name: str, values: list[ast.expr], among: list[tuple[str, ast.expr]]) -> str:
            statements, _ = self._live(values, among)
            return _function(name, [*arguments, self.h], [unpacked, *statements], _tuple(values))

        by_round = [[s for s in sums if s.round == r] for r in sorted({s.round for s in sums})]
        measures = [
            Measure(
                element("measure", [ast.Name(s.element) for s in part], self.update),
                tuple(s.kind for s in part),
                tuple(s.column for s in part),
            )
            for part in by_round
        ]
        return Staged(
            self.rule.name,
            uniforms,
            tuple(kept),
            tuple(arguments[2 + len(kept) :]),
            tuple(name for name, _ in scalars),
            *self._sharing({name: value.node for name, value in scalars}, free),
            tuple(names.values()),
            tuple(self.reports),
            tuple(extra),
            len(slots),
            self.exact,
            _function("decide", ["t", *uniforms, *(name for name, _ in scalars), *names], decide, _tuple(values)),
            tuple(measures),
            element("update", results, self.update),
            element("average", [v.node for v in averages], self.average) if averages else "",
        )

    def _sharing(self, scalars: dict[str, ast.expr], read: set[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Over what each state of a group is one, and the uniforms that states which are one for all follow from.

        What follows from a sum over several leaves, and is remembered, has to be the same for all of them, those that
        are left out of a step included. So it may follow from nothing that they do not have in common.

        Args:
            scalars: what each becomes, in terms of `decide`.
            read: the names that are free in `decide`.
        """
        assigned = dict(self.decide)
        sums = {name: scope for s in self.sums.values() for scope, name in s.names.items()}
        widest = list(primitives.SCOPES)

        def follows_from(node: ast.expr) -> set[str]:
            found = set()
            for name in _names(node):
                found |= follows_from(assigned[name]) if name in assigned else {name}
            return found

        sources = {name: follows_from(node) for name, node in scalars.items()}
        shared = dict.fromkeys(scalars, "leaf")
        while True:
            before = dict(shared)
            for name, from_ in sources.items():
                fed = [sums[x] for x in from_ if x in sums] + [shared[x] for x in from_ if x in shared]
                if name in read:  # what is only shown is made anew at each update
                    shared[name] = max([shared[name], *fed], key=widest.index)
            for name, from_ in sources.items():
                for x in from_ & shared.keys():  # what something shared follows from is shared
                    if name in read:
                        shared[x] = max(shared[x], shared[name], key=widest.index)
            if shared == before:
                break
        for name, scope in shared.items():
            narrower = {sums[x] for x in sources[name] & sums.keys()} - set(widest[widest.index(scope) :])
            if scope != "leaf" and (narrower or "t" in sources[name]):
                other = f"a sum over {narrower.pop()!r}" if narrower else "t, which each leaf counts for itself"
                self._fail(
                    self.rule.tree.body[-1],
                    f"{name!r} is remembered, and follows from a sum over {scope!r}, which is one for several leaves, "
                    f"but also from {other}. Let it follow from what these leaves have in common; steps can be counted "
                    "by a state of the group",
                )
        common = set().union(*(sources[n] for n, scope in shared.items() if scope == "all"))
        return tuple(shared.values()), tuple(sorted(common - shared.keys() - sums.keys()))

    def _unused(self, new_p: ast.expr, kept: dict[str, ast.expr], others: list[ast.expr]) -> str | None:
        """A state that comes out as it went in and that nothing else needs."""
        for name, result in kept.items():
            same = isinstance(result, ast.Name) and result.id == name
            if same and not any(target == name for target, _ in self.update):
                rest = [new_p, *others, *(x for other, x in kept.items() if other != name)]
                if name not in self._live(rest, self.update)[1]:
                    return name
        return None

    def _inputs(
        self, statements: list[tuple[str, ast.expr]], results: list[ast.expr], states: Mapping[str, ast.expr]
    ) -> list[str]:
        """What is read of an element beside p, g and the states."""
        _, free = self._live(results, statements)
        return sorted(free - {"p", "g", *states} - {name for name, _ in self.slots.values()})

    @staticmethod
    def _live(
        results: list[ast.expr], statements: list[tuple[str, ast.expr]]
    ) -> tuple[list[tuple[str, ast.expr]], set[str]]:
        """The statements that the results need, and the names that are free in them."""
        live = set().union(*(_names(r) for r in results))
        kept = []
        for target, node in reversed(statements):
            if target in live:
                live = (live - {target}) | _names(node)
                kept.append((target, node))
        return kept[::-1], live

    # Statements

    def _body(self, function: ast.FunctionDef) -> list[Value]:
        body = function.body
        if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            body = body[1:]
        results = self._block(body)
        if results is None:
            self._fail(function, "must end with a return of the new p, then the new states")
        return results

    def _block(self, statements: list[ast.stmt]) -> list[Value] | None:
        """Stage statements; the values returned, if a `return` was reached."""
        for statement in statements:
            match statement:
                case ast.Return(value=ast.Tuple(elts=parts)):
                    return [self._value(x) for x in self._returned(statement, parts)]
                case ast.Return(value=ast.List() | ast.Dict() | ast.Set()):
                    self._fail(statement, "returns a container; return the new p and the new states, `return p, m`")
                case ast.Return(value=ast.expr() as part):
                    return [self._value(x) for x in self._returned(statement, [part])]
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    self._assign(name, self._value(value), statement)
                case ast.Assign(targets=[ast.Tuple(elts=targets)], value=ast.Tuple(elts=parts)) if len(targets) == len(
                    parts
                ) and all(isinstance(x, ast.Name) for x in targets):
                    held = [self._copied(self._value(x)) for x in parts]
                    for target, one in zip(targets, held, strict=True):
                        self._assign(target.id, one, statement)  # type: ignore[attr-defined]
                case ast.AugAssign(target=ast.Name(id=name), op=op, value=value):
                    whole = ast.copy_location(ast.BinOp(ast.Name(name), op, value), statement)
                    self._assign(name, self._value(ast.copy_location(whole, statement)), statement)
                case ast.If():
                    returned = self._if(statement)
                    if returned is not None:
                        return returned
                case ast.Pass():
                    pass
                case _:
                    self._fail(
                        statement,
                        f"{_kind(statement)} cannot be staged; a rule is assignments, conditionals and one return",
                    )
        return None

    def _returned(self, statement: ast.stmt, parts: list[ast.expr]) -> list[ast.expr]:
        if self.depth:
            self._fail(statement, "a return inside a conditional cannot be staged; assign in it and return at the end")
        return parts

    def _if(self, statement: ast.If) -> list[Value] | None:
        test = self._test(statement.test)
        if test.time is Time.STATIC:
            return self._block(statement.body if test.constant else statement.orelse)
        if test.time is Time.ELEMENT:
            test = replace(self._copied(replace(test, node=self._condition(test))), truth=True)
        before = self.env
        outcomes = []
        for body, holds in ((statement.body, True), (statement.orelse, False)):
            self.env = dict(before)
            with self._guarded(test, holds):
                self._block(body)
            outcomes.append(self.env)
        self.env = dict(before)
        then, other = outcomes
        for name in [n for n in {**then, **other} if then.get(n) is not other.get(n)]:
            a, b = then.get(name), other.get(name)
            if a is None or b is None:
                self.env[name] = None  # assigned in one branch only
            else:
                self._assign(name, self._choose(test, a, b), statement)
        return None

    def _assign(self, name: str, value: Value, statement: ast.AST) -> None:
        itself = isinstance(value.node, ast.Name) and value.node.id == name
        if itself or value.time is Time.STATIC or (value.time is Time.UNIFORM and self.depth):
            self.env[name] = value
        elif value.time is Time.UNIFORM:
            fresh = self._fresh(name) if self._used_in_decide(name) else name
            self._note("decide", fresh, value.node)
            self.env[name] = replace(value, node=ast.Name(fresh))
        else:
            clash = self.depth or any(name == slot for slot, _ in self.slots.values())
            fresh = self._fresh(name) if clash else name
            self._note("update", fresh, value.node)
            self.env[name] = replace(value, node=ast.Name(fresh))

    def _used_in_decide(self, name: str) -> bool:
        return name in self.reserved or any(name == target for target, _ in self.decide)

    def _note(self, where: str, name: str, node: ast.expr) -> None:
        """Add an assignment to `decide` or `update`."""
        (self.decide if where == "decide" else self.update).append((name, node))
        self.rounds[where][name] = self._round(where, node)
        self.versions[name] = self.versions.get(name, 0) + 1

    def _round(self, where: str, node: ast.expr) -> int:
        """How many measures must have been taken before an expression is known."""
        return max((self.rounds[where].get(name, 0) for name in _names(node)), default=0)

    def _fresh(self, name: str) -> str:
        k = 1
        while f"{name}_{k}" in self.taken:
            k += 1
        self.taken.add(f"{name}_{k}")
        return f"{name}_{k}"

    class _Guard:
        def __init__(self, stager: Stager, guard: ast.expr | None) -> None:
            self.stager, self.guard = stager, guard

        def __enter__(self) -> None:
            self.stager.depth += 1
            if self.guard is not None:
                self.stager.guards.append(self.guard)

        def __exit__(self, *_: object) -> None:
            self.stager.depth -= 1
            if self.guard is not None:
                self.stager.guards.pop()

    def _guarded(self, test: Value, holds: bool) -> _Guard:
        """The context in which one branch is staged."""
        if test.time is not Time.UNIFORM:
            return self._Guard(self, None)
        return self._Guard(self, test.node if holds else ast.UnaryOp(ast.Not(), test.node))

    # Expressions

    def _value(self, node: ast.expr) -> Value:
        match node:
            case ast.Constant(value=bool() | int() | float() as constant):
                return _static(constant)
            case ast.Name(id=name):
                return self._name(node, name)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return self._not(self._value(operand))
            case ast.UnaryOp(op=ast.USub() | ast.UAdd() as op, operand=operand):
                x = self._number(self._value(operand))
                if x.time is Time.STATIC:
                    return _static(-x.constant if isinstance(op, ast.USub) else +x.constant)
                return replace(x, node=ast.UnaryOp(op, x.node))
            case ast.BinOp(left=left, op=op, right=right):
                return self._binary(node, self._number(self._value(left)), op, self._number(self._value(right)))
            case ast.Compare(left=left, ops=ops, comparators=rest):
                terms = [self._number(self._value(x)) for x in (left, *rest)]
                pairs = [self._compare(a, op, b, node) for a, op, b in zip(terms, ops, terms[1:], strict=False)]
                return self._all(ast.And(), pairs)
            case ast.BoolOp(op=op, values=values):
                return self._all(op, [self._value(x) for x in values])
            case ast.IfExp(test=test, body=body, orelse=orelse):
                return self._conditional(self._test(test), body, orelse)
            case ast.Call(func=function, args=args, keywords=[]):
                return self._call(node, function, args)
            case ast.Call(func=function, args=[one], keywords=[ast.keyword(arg="over", value=over)]):
                return self._call(node, function, [one, over])
            case ast.Attribute():
                constant = self._resolve(node)
                if isinstance(constant, bool | int | float):
                    return self._constant(ast.unparse(node), constant)
        return self._fail(node, f"{_kind(node)} cannot be staged")

    def _test(self, node: ast.expr) -> Value:
        """The test of a conditional: a switch that is on everywhere is static."""
        value = self._value(node)
        is_switch = isinstance(node, ast.Name) and isinstance(value.node, ast.Name) and value.node.id == node.id
        return _static(True) if is_switch and node.id in self.on else value  # type: ignore[attr-defined]

    def _name(self, node: ast.expr, name: str) -> Value:
        if name in self.env:
            value = self.env[name]
            if value is None:
                self._fail(node, f"{name!r} is assigned in one branch of a conditional only; assign it in both")
            return value
        constant = self.globals.get(name)
        if isinstance(constant, bool | int | float):
            return self._constant(name, constant)
        return self._fail(node, f"{name!r} is not an argument, an earlier assignment or a numeric constant")

    def _constant(self, text: str, constant: bool | int | float) -> Value:
        """A number of the module or closure; the rule notes its own."""
        if self.globals is self.rule.globals:
            self.rule.constants[text] = constant
        return _static(constant)

    def _binary(self, node: ast.expr, a: Value, op: ast.operator, b: Value) -> Value:
        if isinstance(op, ast.Pow):
            return self._power(node, a, b)
        if not isinstance(op, ast.Add | ast.Sub | ast.Mult | ast.Div):
            self._fail(node, f"the operator {_kind(op)} cannot be staged; use +, -, *, / and **")
        time = max(a.time, b.time)
        integer = a.integer and b.integer and not isinstance(op, ast.Div)
        if time is Time.STATIC:
            return _static(self._folded(node, ast.BinOp(a.node, op, b.node)))
        if time is Time.UNIFORM:
            return Value(time, ast.BinOp(a.node, op, b.node), integer)
        if isinstance(op, ast.Div) and b.time is not Time.ELEMENT:
            op, b = ast.Mult(), Value(Time.UNIFORM, ast.BinOp(ast.Constant(1.0), ast.Div(), b.node))
        return Value(time, ast.BinOp(self._lift(a), op, self._lift(b)))

    def _power(self, node: ast.expr, a: Value, b: Value) -> Value:
        if a.time is Time.STATIC and b.time is Time.STATIC:
            return _static(self._folded(node, ast.BinOp(a.node, ast.Pow(), b.node)))
        if b.time is Time.STATIC and b.constant in (0.5, -0.5):
            root = self._basic("sqrt", [a])
            return root if b.constant > 0 else self._binary(node, _static(1.0), ast.Div(), root)
        if b.time is Time.STATIC and b.integer and abs(b.constant) in (1, 2, 3, 4):
            base = a = self._held(a)
            for _ in range(abs(b.constant) - 1):
                a = self._binary(node, a, ast.Mult(), base)
            return a if b.constant > 0 else self._binary(node, _static(1.0), ast.Div(), a)
        if Time.ELEMENT in (a.time, b.time):
            self._fail(
                node, "an element can be raised to 0.5 or to a literal integer up to 4; for others use exp and log"
            )
        function = "power" if b.integer else "real_power"
        return Value(Time.UNIFORM, ast.Call(ast.Name(function), [_float(a), b.node if b.integer else _float(b)], []))

    def _folded(self, node: ast.expr, expression: ast.expr) -> Any:
        try:
            return eval(compile(ast.fix_missing_locations(ast.Expression(expression)), "<rule>", "eval"), {})
        except ArithmeticError as error:
            self._fail(node, f"{ast.unparse(expression)}: {error}")

    def _compare(self, a: Value, op: ast.cmpop, b: Value, node: ast.expr) -> Value:
        if not isinstance(op, ast.Lt | ast.LtE | ast.Gt | ast.GtE | ast.Eq | ast.NotEq):
            self._fail(node, f"the comparison {_kind(op)} cannot be staged")
        time = max(a.time, b.time)
        if time is Time.STATIC:
            return _static(self._folded(node, ast.Compare(a.node, [op], [b.node])))
        if time is Time.UNIFORM:
            return Value(time, ast.Compare(a.node, [op], [b.node]), truth=True)
        return Value(time, ast.Compare(self._lift(a), [op], [self._lift(b)]), truth=True)

    def _all(self, op: ast.boolop, values: list[Value]) -> Value:
        """`and` or `or` of conditions."""
        decisive = isinstance(op, ast.Or)
        rest = []
        for value in values:
            if value.time is not Time.STATIC:
                rest.append(value)
            elif bool(value.constant) is decisive:
                return _static(decisive)
        if not rest:
            return _static(not decisive)
        time = max(v.time for v in rest)
        if len(rest) == 1:
            return rest[0]
        if time is Time.UNIFORM:
            return Value(time, ast.BoolOp(op, [v.node for v in rest]), truth=True)
        join = ast.BitOr() if decisive else ast.BitAnd()
        node = self._condition(rest[0])
        for value in rest[1:]:
            node = ast.BinOp(node, join, self._condition(value))
        return Value(time, node, truth=True)

    def _not(self, x: Value) -> Value:
        if x.time is Time.STATIC:
            return _static(not x.constant)
        if x.time is Time.UNIFORM:
            return Value(x.time, ast.UnaryOp(ast.Not(), x.node), truth=True)
        return Value(x.time, ast.BinOp(self._condition(x), ast.BitXor(), ast.Constant(True)), truth=True)

    def _conditional(self, test: Value, body: ast.expr, orelse: ast.expr) -> Value:
        if test.time is Time.STATIC:
            return self._value(body if test.constant else orelse)
        with self._guarded(test, True):
            a = self._value(body)
        with self._guarded(test, False):
            b = self._value(orelse)
        return self._choose(test, a, b)

    def _choose(self, test: Value, a: Value, b: Value) -> Value:
        """`a` where the condition holds, else `b`; the condition is not static."""
        truth = a.truth and b.truth
        if test.time is Time.UNIFORM and max(a.time, b.time) is not Time.ELEMENT:
            return Value(Time.UNIFORM, ast.IfExp(test.node, a.node, b.node), a.integer and b.integer, truth)
        a, b = self._number(a), self._number(b)
        with self._guarded(test, True):
            then = self._lift(a)
        with self._guarded(test, False):
            other = self._lift(b)
        return Value(Time.ELEMENT, ast.Call(ast.Name("where"), [self._condition(test), then, other], []))

    def _call(self, node: ast.Call, function: ast.expr, args: list[ast.expr]) -> Value:
        target = self._resolve(function)
        name = primitives.name_of(target)
        if name is None:
            known = ", ".join((*primitives.BASIC, *primitives.COMPOSED))
            self._fail(node, f"the function {ast.unparse(function)!r} is not known to staging; a rule may call {known}")
        parameters = inspect.signature(getattr(primitives, name)).parameters.values()
        most = len(parameters)
        least = sum(p.default is p.empty for p in parameters)
        if not least <= len(args) <= most:
            expected = f"{least} or {most}" if least < most else str(most)
            self._fail(node, f"{name} takes {expected} arguments, got {len(args)}")
        if name == "where":
            return self._conditional(self._test(args[0]), args[1], args[2])
        if name in primitives.SUMS:
            return self._sum(node, name, args)
        values = [self._number(self._value(x)) for x in args]
        if name in primitives.BASIC:
            return self._basic(name, values)
        return self._inlined(name, values)

    def _basic(self, name: str, args: list[Value]) -> Value:
        if max(v.time for v in args) is not Time.ELEMENT:  # once, in float64, by the same library on every CPU backend
            return Value(Time.UNIFORM, ast.Call(ast.Name(name), [_float(v) for v in args], []))
        self.exact = self.exact and primitives.BASIC[name]
        return Value(Time.ELEMENT, ast.Call(ast.Name(name), [self._lift(v) for v in args], []))

    def _inlined(self, name: str, args: list[Value]) -> Value:
        """A composed primitive, staged in place with its arguments bound."""
        tree, seen = _COMPOSED_TREES[name]
        held = [self._held(v) for v in args]
        outer, outer_globals = self.env, self.globals
        self.env = {a.arg: v for a, v in zip(tree.args.args, held, strict=True)}
        self.globals = seen
        statement = tree.body[-1]
        assert isinstance(statement, ast.Return) and statement.value is not None
        result = self._value(statement.value)
        self.env, self.globals = outer, outer_globals
        return result

    def _sum(self, node: ast.Call, kind: str, args: list[ast.expr]) -> Value:
        """A sum over elements: taken by `measure`, known to `decide` from then on."""
        scope: Any = "leaf"
        if len(args) > 1:
            match args[1]:
                case ast.Constant(value=scope):
                    pass
                case ast.Name(id=name) if (bound := self.env.get(name)) is not None and bound.time is Time.STATIC:
                    scope = bound.constant
                case _:
                    scope = None
            if scope not in primitives.SCOPES:
                shown = ", ".join(map(repr, primitives.SCOPES))
                self._fail(node, f"{kind} runs over {shown}, written as a literal, got {ast.unparse(args[1])}")
        value = self._number(self._value(args[0]))
        if value.time is not Time.ELEMENT:
            self._fail(node, f"{kind} sums what differs between elements; {ast.unparse(args[0])!r} does not")
        key = (kind, ast.unparse(value.node), tuple((n, self.versions.get(n, 0)) for n in sorted(_names(value.node))))
        if key not in self.sums:
            element = self._named("added", value).node
            assert isinstance(element, ast.Name)
            argument = value.node.id if isinstance(value.node, ast.Name) and value.node.id not in self.versions else ""
            self.sums[key] = _Sum(kind, element.id, self._round("update", element), {}, argument)
        known = self.sums[key]
        if scope not in known.names:
            known.names[scope] = name = self._fresh(f"{kind}_{scope}")
            self.rounds["decide"][name] = known.round + 1
        return Value(Time.UNIFORM, ast.Name(known.names[scope]))

    def _resolve(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Name) and node.id not in self.env:
            return self.globals.get(node.id)
        if isinstance(node, ast.Attribute) and (owner := self._resolve(node.value)) is not None:
            return getattr(owner, node.attr, None)
        return None

    # From uniform to element

    def _held(self, value: Value) -> Value:
        """The value under a name, so that it can be used twice."""
        if value.time is Time.STATIC or isinstance(value.node, ast.Name):
            return value
        if value.time is Time.UNIFORM:
            if self.depth:
                return value
            name = self._fresh("u")
            self._note("decide", name, value.node)
        else:
            return self._copied(value)
        return replace(value, node=ast.Name(name))

    def _copied(self, value: Value) -> Value:
        """The value under a name of its own, so that it outlives an assignment to what it was computed from."""
        if value.time is not Time.ELEMENT:
            return value
        return self._named("x", value)

    def _named(self, prefix: str, value: Value) -> Value:
        """An element's value under a fresh name."""
        name = self._fresh(prefix)
        self._note("update", name, self._lift(value))
        return Value(Time.ELEMENT, ast.Name(name), truth=value.truth)

    def _number(self, value: Value) -> Value:
        """A condition used as a number is 1 or 0."""
        if not value.truth or value.time is Time.STATIC:
            return value
        if value.time is Time.UNIFORM:
            return Value(value.time, ast.IfExp(value.node, ast.Constant(1.0), ast.Constant(0.0)))
        one, zero = self._lift(_static(1.0)), self._lift(_static(0.0))
        return Value(value.time, ast.Call(ast.Name("where"), [value.node, one, zero], []))

    def _condition(self, value: Value) -> ast.expr:
        """A value as a condition on elements."""
        if value.time is Time.ELEMENT and value.truth:
            return value.node
        zero = self._lift(_static(0.0))
        return ast.Compare(self._lift(self._number(value)), [ast.NotEq()], [zero])

    def _lift(self, value: Value) -> ast.expr:
        """The value in terms of `update`: a uniform one becomes a slot of `h`."""
        if value.time is Time.ELEMENT:
            return value.node
        node = self._number(value).node
        if isinstance(node, ast.Constant):
            node = ast.Constant(float(node.value))  # type: ignore[arg-type]
        elif self.guards and not isinstance(node, ast.Name):
            test = self.guards[0] if len(self.guards) == 1 else ast.BoolOp(ast.And(), list(self.guards))
            node = ast.IfExp(test, node, ast.Constant(0.0))
        code = ast.unparse(node)
        if code not in self.slots:
            free = (
                isinstance(node, ast.Name)
                and node.id not in {t for t, _ in self.update}
                and node.id not in _reserved(self.rule)
            )
            name = node.id if free and isinstance(node, ast.Name) else self._fresh("h")
            self.slots[code] = (name, node)
            self.rounds["update"][name] = self._round("decide", node)
        return ast.Name(self.slots[code][0])

    def _fail(self, node: ast.AST, problem: str) -> NoReturn:
        line = getattr(node, "lineno", self.rule.tree.lineno)
        raise RuleError(f"rule {self.rule.name!r}, line {line}: {problem}.")


# The states that `after` keeps.
AVERAGES = ("ema",)


def _reserved(rule: Source) -> set[str]:
    return {"p", "g", "h", *rule.states, *AVERAGES}


def _ordered(rule: Source, free: set[str]) -> Iterator[str]:
    """Uniform inputs: the rule's own in its order, then those of the step's options."""
    yield from (n for n in rule.hyperparameters if n != "lr")
    yield from sorted(free - {*rule.hyperparameters, *rule.scalars, "lr", "t"})


def _float(value: Value) -> ast.expr:
    """An argument of a function in `decide`, always float64."""
    if isinstance(value.node, ast.Constant):
        return ast.Constant(float(value.node.value))  # type: ignore[arg-type]
    return ast.Call(ast.Name("float"), [value.node], []) if value.integer else value.node


def _kind(node: ast.AST) -> str:
    words = {
        "For": "a for loop",
        "While": "a while loop",
        "With": "a with block",
        "Subscript": "an index",
        "Try": "a try block",
    }
    name = type(node).__name__
    return words.get(name, f"`{name}`")


def _tuple(nodes: list[ast.expr]) -> ast.expr:
    return ast.Tuple(nodes, ast.Load())


def _function(name: str, arguments: list[str], statements: list[tuple[str, ast.expr]], result: ast.expr) -> str:
    lines = [f"def {name}({', '.join(arguments)}):"]
    lines += [f"    {target} = {_text(node)}" for target, node in statements]
    lines.append(f"    return {_text(result)}")
    return "\n".join(lines)


def _text(node: ast.expr) -> str:
    text = ast.unparse(ast.fix_missing_locations(copy.deepcopy(node)))
    return text[1:-1].rstrip(",") if isinstance(node, ast.Tuple) and len(node.elts) > 1 else text


_COMPOSED_TREES = {name: parse(function) for name, function in primitives.COMPOSED.items()}
