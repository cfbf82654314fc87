"""What ops are compared with, by name: ``torch`` (eager, plain), ``triton`` (written from the semantics; with the
suffix ``-float32`` it accumulates in float32) and ``triton-original`` (SGLang's own, where an SGLang is installed)."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Reference:
    """One implementation of an op.

    ``run(**arguments)`` writes to the output arguments. ``problem()`` is None, or why it cannot run here at all;
    ``objection(**arguments)`` is None, or why it cannot express one call. ``facts`` is told in reports: version,
    ``compiled``, and ``arithmetic`` ("input-dtype": every partial sum rounded to the activation dtype; "float32").
    """

    run: Callable
    problem: Callable = lambda: None
    objection: Callable = lambda **_: None
    facts: Callable = dict


def references_of(op):
    return importlib.import_module(f"epmoe.ops.{op}").REFERENCES


def describe(op):
    """``{name: {"problem": None or str, **facts}}`` of an op's references."""
    described = {}
    for name, reference in references_of(op).items():
        problem = reference.problem()
        described[name] = {"problem": problem, **({} if problem else reference.facts())}
    return described


def objection(op, name, arguments):
    """None, or why reference ``name`` cannot express a call with these arguments."""
    return references_of(op)[name].objection(**arguments)


def run(op, name, arguments):
    references_of(op)[name].run(**arguments)
