"""What makes six scripts one book: the same order, the same words, nothing imported, no dead flag."""

import ast
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import pytest
import torch

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path.stem for path in (ROOT / "algos").glob("*.py"))
SOURCES = {name: (ROOT / "algos" / f"{name}.py").read_text() for name in SCRIPTS}
README = (ROOT / "README.md").read_text()
SECTIONS = "Pseudo-code|Equations|Symbols|Departures from the paper|References|Read first|New here|Run|Expect"
# These are each script's own; every other function of one name has one text.
OWN = {"Args", "Agent", "make_envs", "make_agent", "load_policy", "train", "td_target", "value_loss"}
# q_learning.py has no torch: no device, and NumPy's own file format.
WITHOUT_TORCH = {"start_run", "save_checkpoint", "load_checkpoint", "evaluate", "record_video", "parse_args"}
SHARED = "fail parse_args env_seeds setup_torch start_run write_file save_checkpoint load_checkpoint evaluate"
SHARED_ARGS = "seed cuda run_dir resume evaluate capture_video track wandb_project_name wandb_entity"


def functions(name: str) -> dict[str, str]:
    """The source of every function and class at the top level of a script, by name."""
    tree = ast.parse(SOURCES[name])
    nodes = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return {node.name: ast.get_source_segment(SOURCES[name], node) for node in nodes}


def fields(name: str) -> dict[str, tuple[str, str]]:
    """Name, line and trailing comment of every field of Args."""
    body = SOURCES[name].split("class Args:")[1].split("\n\n\n")[0].split("    @property")[0]
    return dict(re.findall(r"^    (\w+): [^#\n]*?(?:  # (.*))?$", body, flags=re.M))


@pytest.mark.parametrize("name", SCRIPTS)
def test_nothing_of_the_project_is_imported(name):
    own = {path.stem for path in (ROOT / "algos").rglob("*.py")} | {"algos", "envs", "tests"}
    for node in ast.walk(ast.parse(SOURCES[name])):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
        roots = [node.module] if isinstance(node, ast.ImportFrom) else []
        roots += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        assert not own & {root.split(".")[0] for root in roots}


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_docstring_is_a_map(name):
    docstring = ast.get_docstring(ast.parse(SOURCES[name]))
    positions = [re.search(rf"^{section}\b", docstring, flags=re.M) for section in SECTIONS.split("|")]
    assert all(positions), dict(zip(SECTIONS.split("|"), positions, strict=True))
    starts = [position.start() for position in positions]
    assert starts == sorted(starts), "the sections stand in the same order everywhere"
    assert f"python algos/{name}.py" in docstring
    code = SOURCES[name].replace(docstring, "")
    steps, numbers = (
        set(re.findall(r"\[[A-D]\]", docstring)),
        set(re.findall(r"^ +\((\d+)\)", docstring, flags=re.M)),
    )
    assert steps and numbers
    for step in steps:
        assert f"# {step}" in code, f"{step} of the pseudo-code is nowhere in the code"
    for number in numbers:
        assert re.search(rf"\({number}\)", code), f"equation ({number}) is beside no line"


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_order_of_a_script(name):
    nodes = [node for node in ast.parse(SOURCES[name]).body if hasattr(node, "name")]
    order = [node.name for node in nodes]
    expected = [
        part for part in ("Args", "make_envs", "fail", "start_run", "evaluate", "train") if part in order
    ]
    assert "Args" in expected and "evaluate" in expected and order[-1] == "train"
    assert [part for part in order if part in expected] == expected
    assert SOURCES[name].rstrip().splitlines()[-3] == 'if __name__ == "__main__":'


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_argument_has_help_and_a_reader(name):
    arguments = fields(name)
    module = importlib.import_module(name)
    assert list(arguments) == list(module.Args.__dataclass_fields__)
    for field, comment in arguments.items():
        assert comment, f"--{field} has no help"
        assert re.search(rf"\b(args|self)\.{field}\b", SOURCES[name]), f"no line reads --{field}"
    for field in SHARED_ARGS.split():
        if field in arguments and field not in ("cuda", "seed"):  # where GPUs and torch differ, so do these
            line = re.search(rf"^    {field}: .*$", SOURCES["ppo"], flags=re.M)[0].replace(
                "__ppo__", f"__{name}__"
            )
            assert line in SOURCES[name], f"--{field} is described differently"


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_trick_has_a_switch(name):
    tricks = set(re.findall(r"\[Trick (\d+)\]", SOURCES[name]))
    for trick in tricks:
        explained = re.search(
            rf"\[Trick {trick}\](?:(?!\[Trick).)*?(?:Ablate|[Tt]ry): --([\w-]+)", SOURCES[name], re.S
        )
        assert explained, f"[Trick {trick}] names no switch"
        flag = explained[1].removeprefix("no-").replace("-", "_")
        assert flag in fields(name), f"[Trick {trick}]: there is no --{explained[1]}"


def test_copied_functions_have_one_text():
    copies: dict[str, dict[str, str]] = {}
    for name in SCRIPTS:
        for function, text in functions(name).items():
            if (name, function) == ("a2c_continuous", "policy_loss"):
                continue  # no ratio, nothing to clip
            if function not in OWN and not (name == "q_learning" and function in WITHOUT_TORCH):
                copies.setdefault(function, {})[name] = text
    for function, texts in copies.items():
        assert len(set(texts.values())) == 1, f"{function} differs between {', '.join(texts)}"
    for function in SHARED.split():
        assert set(copies[function]) >= set(SCRIPTS) - {"q_learning"}, f"{function} is missing somewhere"


def env_ids() -> set[str]:
    text = README + "".join(ast.get_docstring(ast.parse(source)) or "" for source in SOURCES.values())
    return set(re.findall(r"(?:[\w.]+:)?(?:ALE/)?[A-Z][\w-]*-v\d+\b", text))


@pytest.mark.parametrize("env_id", sorted(env_ids()))
def test_every_environment_that_is_named_can_be_made(env_id):
    if "Bullet" in env_id:
        pytest.importorskip("pybullet_envs_gymnasium")
    if env_id.startswith("ALE/") or "NoFrameskip" in env_id:
        gym.register_envs(importlib.import_module("ale_py"))
    if env_id.startswith("MiniGrid"):
        gym.register_envs(importlib.import_module("minigrid"))
    gym.make(env_id).close()


def commands() -> list[str]:
    text = README + "\n" + "\n".join(SOURCES.values())
    text = re.sub(r"\\+\n\s*", " ", text)  # lines that go on, in Markdown and inside of docstrings
    return sorted({" ".join(found.split()) for found in re.findall(r"python (algos/\w+\.py[^\n#`(]*)", text)})


@pytest.mark.parametrize("command", commands())
def test_every_command_that_is_named_is_understood(command, monkeypatch):
    script, *arguments = shlex.split(command)
    module = importlib.import_module(Path(script).stem)
    arguments = [
        a for a in arguments if "runs/" not in a and a not in ("--resume", "--evaluate", "RUN_DIR", "--help")
    ]
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    module.parse_args()


def test_only_the_card_stands_at_the_top():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    top = {path.split("/")[0] for path in tracked.stdout.splitlines()}
    visible = {name for name in top if not name.startswith(".")}
    assert visible <= {"algos", "tests", "requirements.txt", "README.md", "LICENSE"}


def test_every_requirement_is_pinned():
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        assert line.startswith("#") or re.match(r"^[\w\[\],-]+==[\w.]+(; .*)?$", line), line


@pytest.mark.parametrize("name", sorted(set(SCRIPTS) - {"q_learning"}))
def test_numbers_too_small_for_speed_become_zero(name):
    """In a long DQN run with denormal numbers, Adam's step took a third of the time."""
    if not torch.set_flush_denormal(False):
        pytest.skip("this processor cannot")
    module = importlib.import_module(name)
    module.setup_torch(module.Args())
    assert (torch.full((64,), 1e-37) * 1e-3).sum() == 0
