"""Breaks a script in many small ways and counts how many of the broken versions its tests notice.

Run: python tests/benchmark/mutants.py ppo                       100 random mutants of algos/ppo.py
     python tests/benchmark/mutants.py ppo --only 12 57          some of them again, after a test was mended
     python tests/benchmark/mutants.py ppo --list                what would be changed, without running tests

A mutant changes one thing between `make_envs` and the end of `train`, or in `load_policy` or `evaluate`: an
operator, a comparison, a constant, the order of arguments, or it deletes a statement. It is tested in a copy
of algos/ and tests/ in a temporary folder. A mutant is killed if a test fails, or the tests take too long.
"""

import argparse
import ast
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

import gymnasium  # noqa: F401, for the forks of this process
import pytest
import torch
import torch.utils.tensorboard
import tyro  # noqa: F401

ROOT = Path(__file__).parents[2]
OPERATORS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
PLUMBING = {"print", "close", "set_postfix_str", "fail", "tqdm", "bar.update", "signal"}


def targets(tree: ast.Module) -> list[ast.AST]:
    """Functions and classes of the algorithm."""
    nodes = [node for node in tree.body if hasattr(node, "name")]
    names = [node.name for node in nodes]
    path = nodes[names.index("Args") + 1 : names.index("train") + 1]
    return path + [node for node in nodes if node.name in ("load_policy", "evaluate")]


def mutations(tree: ast.Module):
    """Every possible change: (line, what, node, function that changes the node), in the tree's order."""
    for top in targets(tree):
        ignored = {id(inner) for node in ast.walk(top) if is_plumbing(node) for inner in ast.walk(node)}
        for node in ast.walk(top):
            if id(node) in ignored:
                continue
            line = getattr(node, "lineno", 0)
            if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp) and type(node.op) in OPERATORS:
                new = OPERATORS[type(node.op)]
                yield line, f"{type(node.op).__name__} -> {new.__name__}", node, set_field("op", new())
            elif isinstance(node, ast.Compare) and type(node.ops[0]) in OPERATORS:
                new = OPERATORS[type(node.ops[0])]
                change = set_field("ops", [new(), *node.ops[1:]])
                yield line, f"{type(node.ops[0]).__name__} -> {new.__name__}", node, change
            elif isinstance(node, ast.UnaryOp) and not isinstance(node.operand, ast.Constant):  # no axis -1
                change = set_field("operand", ast.UnaryOp(node.op, node.operand))  # twice is not at all
                yield line, f"without {type(node.op).__name__}", node, change
            elif isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
                new = not node.value if isinstance(node.value, bool) else node.value + 1
                yield line, f"{node.value} -> {new}", node, set_field("value", new)
            elif isinstance(node, ast.If):
                yield line, "if not", node, set_field("test", ast.UnaryOp(ast.Not(), node.test))
            elif isinstance(node, ast.Call) and len(node.args) >= 2:
                swapped = [node.args[1], node.args[0], *node.args[2:]]
                yield line, "first two arguments swapped", node, set_field("args", swapped)
            for field in ("body", "orelse"):
                statements = getattr(node, field, None)
                if not isinstance(statements, list):
                    continue
                for index, statement in enumerate(statements):
                    docstring = isinstance(getattr(statement, "value", None), ast.Constant)
                    if isinstance(statement, ast.AugAssign | ast.Expr) and not docstring:
                        if id(statement) not in ignored:
                            rest = [*statements[:index], ast.Pass(), *statements[index + 1 :]]
                            yield statement.lineno, "deleted", node, set_field(field, rest)


def set_field(name: str, value):
    return lambda node: setattr(node, name, value)


def is_plumbing(node: ast.AST) -> bool:
    """Messages, the progress bar, closing: to break them breaks no learning."""
    node = node.value if isinstance(node, ast.Expr) else node
    called = getattr(node, "func", None)
    name = ast.unparse(called).removeprefix("self.") if called else ""
    return name in PLUMBING or name.split(".")[-1] in PLUMBING or is_minus_one(node)


def is_minus_one(node: ast.AST) -> bool:
    """The last axis, which is the first as well where there is one."""
    return isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Constant)


def mutant(source: str, number: int) -> tuple[int, str, str]:
    """Line, description and source of mutation `number`."""
    tree = ast.parse(source)
    line, what, node, change = list(mutations(tree))[number]
    change(node)
    return line, what, ast.unparse(ast.fix_missing_locations(tree))


def tested(name: str, text: str, seconds: float) -> str:
    """The first line that failed, or "" if the tests passed."""
    ignored = shutil.ignore_patterns("__pycache__", "figures")
    with tempfile.TemporaryDirectory() as folder:
        for part in ("algos", "tests"):
            shutil.copytree(ROOT / part, Path(folder) / part, ignore=ignored)
        (Path(folder) / f"algos/{name}.py").write_text(text)
        # Most mutants fall at once to the tests that hold whole iterations against slow ones: those first.
        for some in (["-k", "whole or slow"], []):
            test = [f"tests/test_{name}.py", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *some]
            # A fork of this process has torch and gymnasium already, which take half of a short test's time.
            run = multiprocessing.get_context("fork").Process(target=pytest_in, args=(folder, test))
            run.start()
            run.join(seconds / 4 if some else seconds)
            if run.is_alive():
                os.killpg(run.pid, signal.SIGKILL)
                run.join()
                return "too slow"
            lines = (Path(folder) / "output").read_text(errors="replace").splitlines()
            failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
            if failed:
                return failed[0][:100]
            if run.exitcode not in (0, 5):  # 5: no test has such a name
                return f"exit {run.exitcode}"
        return ""


def pytest_in(folder: str, arguments: list[str]) -> NoReturn:
    """Run pytest in that folder; its output goes to the file `output` there. Ends the process."""
    os.setpgid(0, 0)  # a group of its own, so that what a test starts ends with it
    os.chdir(folder)
    output = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = pytest.main(arguments)
    sys.stdout.flush()
    os._exit(code)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("script")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=160, help="longest run of the tests")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of mutants")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    torch.set_num_threads(1)
    sys.dont_write_bytecode = True
    source = (ROOT / "algos" / f"{args.script}.py").read_text()
    numbers = list(range(len(list(mutations(ast.parse(source))))))
    chosen = args.only or sorted(random.Random(args.seed).sample(numbers, min(args.count, len(numbers))))
    plain = ast.unparse(ast.parse(source))
    if not args.list and (failure := tested(args.script, plain, args.seconds)):
        sys.exit(f"the unchanged script fails: {failure}")
    survivors = 0
    for number in chosen:
        line, what, text = mutant(source, number)
        place = source.splitlines()[line - 1].strip()[:70]
        result = "" if args.list else tested(args.script, text, args.seconds)
        survivors += not result
        word = "listed" if args.list else "killed" if result else "SURVIVED"
        print(f"{word:8} {number:4} line {line:3} {what:28} {place}   {result}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} killed")


if __name__ == "__main__":
    main()
