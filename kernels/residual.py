"""What is left of a rule when it has been staged: the functions, without whatever nobody uses."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from .draft import Draft, Sum
from .primitives import SCOPES
from .staged import Code, Measure, Staged
from .values import StagingError, Statement, variables


@dataclass
class Results:
    """What the functions return, in the names of `update` or `decide`.

    Attributes:
        p: the new parameter.
        states: the new states, among them the averages.
        scalars: the new state of the group.
        reports: what is for people.
        emitted: what is summed up after the update.
        averages: the averages of leaves that are not updated.
        average: the statements that these need.
    """

    p: ast.expr
    states: dict[str, ast.expr]
    scalars: dict[str, ast.expr]
    reports: dict[str, ast.expr]
    emitted: dict[str, ast.expr] = field(default_factory=dict)
    averages: list[ast.expr] = field(default_factory=list)
    average: list[Statement] = field(default_factory=list)


def residual(name: str, hyperparameters: Sequence[str], draft: Draft, results: Results, exact: bool) -> Staged:
    """Drop what nobody uses, states and sums included, and write the functions.

    Args:
        name: the rule's.
        hyperparameters: the rule's, in order.
        draft: the statements.
        results: what they lead to.
        exact: see `Staged`.

    Raises:
        StagingError: if state that is one for several leaves follows from what they do not have in common.
    """
    states, emitted = dict(results.states), list(results.emitted.values())
    last = [*results.scalars.values(), *results.reports.values()]
    sums: list[Sum] = []
    while True:  # dropping one thing can make others superfluous
        added: list[ast.expr] = [ast.Name(s.element) for s in sums]
        unused = _unused_state(draft, results.p, states, [*emitted, *added])
        if unused is not None:
            del states[unused]
            continue
        updated = [results.p, *states.values(), *emitted]
        passes, of_element = live([*updated, *added], draft.update)
        others = [*updated, *added, *results.averages, *(node for _, node in results.average)]
        read = set().union(*(variables(node) for _, node in passes), *map(variables, others))
        slots = [(slot, node) for slot, node in draft.slots.values() if slot in read]
        slots = slots or [("unused", ast.Constant(0.0))]
        decided = [*(node for _, node in slots), *last]
        decide, free = live(decided, draft.decide)
        needed = [s for s in draft.sums if not free.isdisjoint(s.names.values())]
        needed.sort(key=lambda s: s.round)
        if needed == sums:
            break
        sums = needed
    inputs = sorted(of_element - {"p", "g", *states} - {slot for slot, _ in draft.slots.values()})
    sum_names = {n: (k, scope) for k, s in enumerate(sums) for scope, n in s.names.items() if n in free}
    options = free - {*hyperparameters, *results.scalars, *sum_names, "lr", "t"}
    uniforms = tuple(n for n in ("lr", *(n for n in hyperparameters if n != "lr"), *sorted(options)) if n in free)
    shared, common = _sharing(draft, results.scalars, free)

    def of_elements(function: str, values: list[ast.expr], among: list[Statement]) -> Code:
        statements, _ = live(values, among)
        arguments = ["p", "g", *states, *inputs, draft.slots_argument]
        return _code(function, arguments, statements, values, [slot for slot, _ in slots])

    measures = []
    for number in sorted({s.round for s in sums}):
        part = [s for s in sums if s.round == number]
        source = of_elements("measure", [ast.Name(s.element) for s in part], draft.update)
        measures.append(Measure(source, tuple(s.kind for s in part), tuple(s.column for s in part)))
    return Staged(
        name=name,
        uniforms=uniforms,
        states=tuple(states),
        inputs=tuple(inputs),
        scalars=tuple(results.scalars),
        shared=shared,
        common=common,
        sums=tuple(sum_names.values()),
        reports=tuple(results.reports),
        emitted=tuple(results.emitted),
        slots=len(slots),
        exact=exact,
        decide=_code("decide", ["t", *uniforms, *results.scalars, *sum_names], decide, decided),
        measures=tuple(measures),
        update=of_elements("update", updated, draft.update),
        average=of_elements("average", results.averages, results.average) if results.averages else None,
    )


def live(results: Iterable[ast.expr], statements: Sequence[Statement]) -> tuple[list[Statement], set[str]]:
    """The statements that the results need, and the names that are free in them."""
    free = set().union(*(variables(r) for r in results))
    kept = []
    for target, node in reversed(statements):
        if target in free:
            free = (free - {target}) | variables(node)
            kept.append((target, node))
    return kept[::-1], free


def _unused_state(
    draft: Draft, new_p: ast.expr, states: Mapping[str, ast.expr], others: Sequence[ast.expr]
) -> str | None:
    """A state that comes out as it went in and that nothing else needs: it does not exist."""
    for name, result in states.items():
        same = isinstance(result, ast.Name) and result.id == name
        if same and not any(target == name for target, _ in draft.update):
            rest = [new_p, *others, *(x for other, x in states.items() if other != name)]
            if name not in live(rest, draft.update)[1]:
                return name
    return None


def _sharing(draft: Draft, scalars: Mapping[str, ast.expr], read: set[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """For each state of a group, over what it is one; and the uniforms that what is one for all follows from.

    What follows from a sum over several leaves, and is remembered, has to be the same for all of them, those that are
    left out of a step included. So it may follow from nothing that they do not have in common.

    Args:
        draft: the statements.
        scalars: what each state becomes, in the names of `decide`.
        read: the names that are free in `decide`.
    """
    assigned = dict(draft.decide)
    scope_of = {name: scope for s in draft.sums for scope, name in s.names.items()}
    width = SCOPES.index

    def follows_from(node: ast.expr) -> set[str]:
        names = set()
        for name in variables(node):
            names |= follows_from(assigned[name]) if name in assigned else {name}
        return names

    sources = {name: follows_from(node) for name, node in scalars.items()}
    shared = dict.fromkeys(scalars, SCOPES[0])
    remembered = [name for name in scalars if name in read]  # what is only shown is made anew at each update
    while True:
        before = dict(shared)
        for name in remembered:
            enters = [scope_of[x] for x in sources[name] if x in scope_of]
            enters += [shared[x] for x in sources[name] if x in shared]
            shared[name] = max([shared[name], *enters], key=width)
        for name in remembered:
            for x in sources[name] & shared.keys():  # what something shared follows from is shared
                shared[x] = max(shared[x], shared[name], key=width)
        if shared == before:
            break
    for name, scope in shared.items():
        narrower = {scope_of[x] for x in sources[name] & scope_of.keys()} - set(SCOPES[width(scope) :])
        if scope != SCOPES[0] and (narrower or "t" in sources[name]):
            other = f"a sum over {narrower.pop()!r}" if narrower else "t, which each leaf counts for itself"
            raise StagingError(
                f"{name!r} is remembered, and follows from a sum over {scope!r}, which is one for several leaves, but "
                f"also from {other}. Let it follow from what these leaves have in common; steps can be counted by a "
                "state of the group"
            )
    common = set().union(*(sources[name] for name, scope in shared.items() if scope == "all"))
    return tuple(shared.values()), tuple(sorted(common - shared.keys() - scope_of.keys()))


# Text


def _code(
    name: str,
    arguments: Sequence[str],
    statements: Sequence[Statement],
    values: list[ast.expr],
    slots: Sequence[str] = (),
) -> Code:
    """A function that unpacks the slots, if there are any, carries out the statements and returns the values."""
    result = ast.Tuple(values, ast.Load())
    lines = [f"def {name}({', '.join(arguments)}):"]
    if slots:
        lines.append(f"    ({''.join(slot + ', ' for slot in slots).strip()}) = {arguments[-1]}")
    lines += [f"    {target} = {_text(node)}" for target, node in statements]
    lines.append(f"    return {_text(result)}")
    _, free = live([result], statements)
    nodes = [n for part in (result, *(node for _, node in statements)) for n in ast.walk(part)]
    calls = {n.func.id for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    reads = tuple(sorted(free.intersection(arguments)))
    return Code("\n".join(lines), reads, tuple(sorted(calls)), not free.isdisjoint(slots))


def _text(node: ast.expr) -> str:
    text = ast.unparse(ast.fix_missing_locations(copy.deepcopy(node)))
    return text[1:-1].rstrip(",") if isinstance(node, ast.Tuple) and len(node.elts) > 1 else text
