"""Binding times: the pass over a rule that splits it into `decide` and `update` (see `staging`)."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import NoReturn

from .draft import Draft
from .functions import CALLABLE, TABLE, Kind, name_of
from .language import After, Before, RuleError, Source, parse
from .operations import Operations, construct
from .primitives import SCOPES
from .residual import Results, residual
from .staged import AVERAGES, Staged
from .values import Constant, StagingError, Statement, Time, Value, element, static, uniform, variables


class Stager:
    """One pass over a rule's statements that splits them into those of `decide` and those of `update`.

    Args:
        rule: the rule.
        static: hyperparameters whose value is known.
        on: switches that are nonzero everywhere.
    """

    def __init__(self, rule: Source, static: Mapping[str, Constant], on: frozenset[str]) -> None:
        self.rule, self.static, self.on = rule, static, on
        self.env: dict[str, Value | None] = {}  # what variables stand for; None: assigned in one branch only
        self.globals: Mapping[str, object] = rule.globals
        self.draft = Draft(
            {"p", "g", "h", *rule.states, *AVERAGES},
            {"t", "lr", *rule.hyperparameters, *rule.scalars},
            {*_arguments(rule.tree), *variables(rule.tree), "t"},
        )
        self.operations = Operations(self.draft)

    # The whole

    def run(self, before: Before | None, after: After | None) -> Staged:
        """Stage the rule, and what comes before and after it."""
        rule, draft = self.rule, self.draft
        own = ("p", "g", *rule.states)
        self.env = {name: element(name) for name in own}
        owned = set(rule.hyperparameters)
        start, gradient = draft.named("start", element("p")), draft.named("raw", element("g"))
        lr = None
        reports: dict[str, Value] = {}
        if before is not None:
            p, g, lr, *values = self._option(before, owned)
            reports = {n: v for n, v in zip(before.reports, values, strict=True) if v.time is Time.UNIFORM}
            self.env = {k: v for k, v in self.env.items() if k in own}
            self.env.update(p=draft.assign("p", p), g=draft.assign("g", g))
            self.globals = rule.globals
        self._bind(owned)
        if lr is not None and lr.time is Time.ELEMENT:
            self.env["lr"] = lr
        self.env.update({name: uniform(name) for name in rule.scalars})
        self.env["base_lr"] = uniform("lr")  # the same for all elements, whatever their own factor
        if rule.counts:
            self.env["t"] = uniform("t", integer=True)
        results = self._body(rule.tree)
        expected = ["the new p", *rule.states, *rule.scalars]
        if len(results) != len(expected):
            self._fail(
                rule.tree.body[-1],
                f"returns {len(results)} value{'s' * (len(results) != 1)}, expected {len(expected)}: the new p"
                + (f", then {', '.join(expected[1:])} in the order of the arguments" if expected[1:] else " alone"),
            )
        states = dict(zip(rule.states, results[1:], strict=False))
        scalars = dict(zip(rule.scalars, results[1 + len(rule.states) :], strict=True))
        for name, value in scalars.items():
            if value.time is Time.ELEMENT:
                self._fail(rule.tree.body[-1], f"{name!r} is state of a group, so it cannot follow from elements")
        new_p = results[0]
        emitted: dict[str, Value] = {}
        averages: list[ast.expr] = []
        average: list[Statement] = []
        if after is not None:
            new_p = draft.named("new", new_p)
            self.env = {"p": new_p, "start": start}
            new_p, *kept = self._option(after, owned)
            if self.static.get("averaged"):
                states.update(zip(AVERAGES, kept, strict=False))
            if self.static.get("statistics"):
                new_p = draft.named("new", new_p)
                change = Value(Time.ELEMENT, ast.BinOp(new_p.node, ast.Sub(), start.node))
                emitted = {"param_norm": new_p, "update_norm": draft.named("change", change)}
                if "grad_norm" not in reports:
                    emitted["raw_grad_norm"] = gradient
            if self.static.get("averaged"):
                averages, average = self._average(after, owned)
        lift = draft.lift
        made = Results(
            p=lift(new_p),
            states={name: lift(value) for name, value in states.items()},
            emitted={name: lift(value) for name, value in emitted.items()},
            scalars={name: value.node for name, value in scalars.items()},
            reports={name: draft.number(value).node for name, value in reports.items()},
            averages=averages,
            average=average,
        )
        try:
            return residual(rule.name, rule.hyperparameters, draft, made, self.operations.exact)
        except StagingError as error:
            self._fail(rule.tree.body[-1], str(error))

    def _average(self, after: After, owned: set[str]) -> tuple[list[ast.expr], list[Statement]]:
        """The averages of leaves that are not updated, and statements: as after an update that leaves `p` as it is."""
        update, values = self.draft.update, self.static
        self.draft.update, self.static = [], {**values, "per_element": False}
        self.env = {"p": element("p"), "start": element("p")}
        _, *averages = self._option(after, owned)
        nodes = [self.draft.lift(value) for value in averages]
        statements, self.draft.update, self.static = self.draft.update, update, values
        return nodes, statements

    def _option(self, function: Source, owned: set[str]) -> list[Value]:
        """Stage what comes before or after the rule. What a rule names itself, it owns: here it is off."""
        options = set(function.hyperparameters)
        self._bind((options - owned) | (options & {"lr"}))
        self.env.update({name: static(0.0) for name in (options & owned) - {"lr"}})
        self.env.update({name: element(name) for name in function.states})
        self.draft.uniforms |= options
        self.draft.taken |= variables(function.tree) | _arguments(function.tree)
        self.globals = function.globals
        return self._body(function.tree)

    def _bind(self, names: set[str]) -> None:
        """Bind hyperparameters to their values, or to the arguments of `decide`."""
        for name in sorted(names):
            self.env[name] = static(self.static[name]) if name in self.static else uniform(name)

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
                    self._assign(name, self._value(value))
                case ast.Assign(targets=[ast.Tuple(elts=targets)], value=ast.Tuple(elts=parts)) if len(targets) == len(
                    parts
                ) and all(isinstance(x, ast.Name) for x in targets):
                    values = [self.draft.copied(self._value(x)) for x in parts]
                    for target, new in zip(targets, values, strict=True):
                        assert isinstance(target, ast.Name)
                        self._assign(target.id, new)
                case ast.AugAssign(target=ast.Name(id=name), op=op, value=value):
                    whole = ast.BinOp(ast.copy_location(ast.Name(name), statement), op, value)
                    self._assign(name, self._value(ast.copy_location(whole, statement)))
                case ast.If():
                    returned = self._if(statement)
                    if returned is not None:
                        return returned
                case ast.Pass():
                    pass
                case _:
                    self._fail(
                        statement,
                        f"{construct(statement)} cannot be staged; a rule is assignments, conditionals and one return",
                    )
        return None

    def _returned(self, statement: ast.stmt, parts: list[ast.expr]) -> list[ast.expr]:
        if self.draft.depth:
            self._fail(statement, "a return inside a conditional cannot be staged; assign in it and return at the end")
        return parts

    def _if(self, statement: ast.If) -> list[Value] | None:
        test = self._test(statement.test)
        if test.time is Time.STATIC:
            return self._block(statement.body if test.constant else statement.orelse)
        if test.time is Time.ELEMENT:
            test = replace(self.draft.copied(replace(test, node=self.operations.condition(test))), truth=True)
        before = self.env
        outcomes = []
        for body, holds in ((statement.body, True), (statement.orelse, False)):
            self.env = dict(before)
            with self.draft.branch(test, holds):
                self._block(body)
            outcomes.append(self.env)
        self.env = dict(before)
        then, other = outcomes
        for name in [n for n in {**then, **other} if then.get(n) is not other.get(n)]:
            a, b = then.get(name), other.get(name)
            if a is None or b is None:
                self.env[name] = None
            else:
                self._assign(name, self.operations.choice(test, a, b))
        return None

    def _assign(self, name: str, value: Value) -> None:
        self.env[name] = self.draft.assign(name, value)

    # Expressions

    def _value(self, node: ast.expr) -> Value:
        try:
            return self._expression(node)
        except StagingError as error:
            self._fail(node, str(error))

    def _number(self, node: ast.expr) -> Value:
        return self.draft.number(self._value(node))

    def _expression(self, node: ast.expr) -> Value:
        """Stage an expression.

        Raises:
            StagingError: if that cannot be; of this expression, while problems of its parts are `RuleError`s by then.
        """
        operations = self.operations
        match node:
            case ast.Constant(value=bool() | int() | float() as constant):
                return static(constant)
            case ast.Name(id=name):
                return self._variable(name)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return operations.negated(self._value(operand))
            case ast.UnaryOp(op=ast.USub() | ast.UAdd() as op, operand=operand):
                return operations.signed(op, self._number(operand))
            case ast.BinOp(left=left, op=op, right=right):
                return operations.binary(self._number(left), op, self._number(right))
            case ast.Compare(left=left, ops=ops, comparators=rest):
                terms = [self._number(x) for x in (left, *rest)]
                pairs = [operations.compare(a, op, b) for a, op, b in zip(terms, ops, terms[1:], strict=False)]
                return operations.joined(ast.And(), pairs)
            case ast.BoolOp(op=op, values=values):
                return operations.joined(op, [self._value(x) for x in values])
            case ast.IfExp(test=test, body=body, orelse=orelse):
                return self._conditional(self._test(test), body, orelse)
            case ast.Call(func=function, args=args, keywords=[]):
                return self._call(function, args)
            case ast.Call(func=function, args=[argument], keywords=[ast.keyword(arg="over", value=over)]):
                return self._call(function, [argument, over])
            case ast.Attribute():
                value = self._resolve(node)
                if isinstance(value, bool | int | float):
                    return self._constant(ast.unparse(node), value)
        raise StagingError(f"{construct(node)} cannot be staged")

    def _test(self, node: ast.expr) -> Value:
        """The test of a conditional: a switch that is on everywhere is static."""
        value = self._value(node)
        is_switch = isinstance(node, ast.Name) and value.name == node.id and node.id in self.on
        return static(True) if is_switch else value

    def _variable(self, name: str) -> Value:
        if name in self.env:
            value = self.env[name]
            if value is None:
                raise StagingError(f"{name!r} is assigned in one branch of a conditional only; assign it in both")
            return value
        constant = self.globals.get(name)
        if isinstance(constant, bool | int | float):
            return self._constant(name, constant)
        raise StagingError(f"{name!r} is not an argument, an earlier assignment or a numeric constant")

    def _constant(self, text: str, constant: bool | int | float) -> Value:
        """A number of the module or closure; the rule notes its own."""
        if self.globals is self.rule.globals:
            self.rule.constants[text] = constant
        return static(constant)

    def _conditional(self, test: Value, body: ast.expr, orelse: ast.expr) -> Value:
        if test.time is Time.STATIC:
            return self._value(body if test.constant else orelse)
        with self.draft.branch(test, True):
            a = self._value(body)
        with self.draft.branch(test, False):
            b = self._value(orelse)
        return self.operations.choice(test, a, b)

    def _call(self, function: ast.expr, args: list[ast.expr]) -> Value:
        name = name_of(self._resolve(function))
        if name is None:
            called, advice = ast.unparse(function), f"a rule may call {', '.join(CALLABLE)}"
            if called in CALLABLE and called not in {*self.env, *self.globals}:
                advice = "import it where the rule is defined, such as from numpy"
            raise StagingError(f"the function {called!r} is not known to staging; {advice}")
        row = TABLE[name]
        parameters = inspect.signature(row.python).parameters.values()
        most = len(parameters)
        least = sum(p.default is p.empty for p in parameters)
        if not least <= len(args) <= most:
            expected = f"{least} or {most}" if least < most else str(most)
            raise StagingError(f"{row.python.__name__} takes {expected} arguments, got {len(args)}")
        if name == "where":
            return self._conditional(self._test(args[0]), args[1], args[2])
        if row.kind is Kind.SUM:
            return self._sum(name, args[0], args[1] if len(args) > 1 else None)
        values = [self._number(x) for x in args]
        return self.operations.called(name, values) if row.kind is Kind.CALL else self._inlined(name, values)

    def _inlined(self, name: str, args: list[Value]) -> Value:
        """A function that is staged in place, with its arguments bound."""
        tree, names_seen = _INLINED[name]
        bound = [self.draft.held(v) for v in args]
        outer, outer_globals = self.env, self.globals
        self.env = {a.arg: v for a, v in zip(tree.args.args, bound, strict=True)}
        self.globals = names_seen
        statement = tree.body[-1]
        assert isinstance(statement, ast.Return) and statement.value is not None
        result = self._value(statement.value)
        self.env, self.globals = outer, outer_globals
        return result

    def _sum(self, kind: str, argument: ast.expr, over: ast.expr | None) -> Value:
        """A sum over elements."""
        scope = SCOPES[0] if over is None else self._scope(kind, over)
        value = self._number(argument)
        if value.time is not Time.ELEMENT:
            raise StagingError(f"{kind} sums what differs between elements; {ast.unparse(argument)!r} does not")
        return self.draft.sum(kind, scope, value)

    def _scope(self, kind: str, over: ast.expr) -> str:
        """What a sum runs over, as a literal or a static value says."""
        bound = self.env.get(over.id) if isinstance(over, ast.Name) else None
        node = over if bound is None else bound.node
        for scope in SCOPES:
            if isinstance(node, ast.Constant) and node.value == scope:
                return scope
        shown = ", ".join(map(repr, SCOPES))
        raise StagingError(f"{kind} runs over {shown}, written as a literal, got {ast.unparse(over)}")

    def _resolve(self, node: ast.expr) -> object:
        """What a name, or an attribute, of the module or closure stands for; None if it is nothing there."""
        if isinstance(node, ast.Name) and node.id not in self.env:
            return self.globals.get(node.id)
        if isinstance(node, ast.Attribute) and (owner := self._resolve(node.value)) is not None:
            return getattr(owner, node.attr, None)
        return None

    def _fail(self, node: ast.AST, problem: str) -> NoReturn:
        line = getattr(node, "lineno", self.rule.tree.lineno)
        raise RuleError(f"rule {self.rule.name!r}, line {line}: {problem}.") from None


def _arguments(function: ast.FunctionDef) -> set[str]:
    return {a.arg for a in ast.walk(function) if isinstance(a, ast.arg)}


_INLINED = {name: parse(row.python) for name, row in TABLE.items() if row.kind is Kind.INLINED}
