"""What makes the scripts one book: the same order, the same words, nothing imported, no dead flag."""

import ast
import importlib
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import copy_block
import gymnasium as gym
import pytest
import torch

ROOT = Path(__file__).parents[1]
# The project's own: a copy that a user made (README: "How to change one") is the user's.
SCRIPTS = copy_block.SCRIPTS
SOURCES = {name: (ROOT / "algos" / f"{name}.py").read_text() for name in SCRIPTS}
README = (ROOT / "README.md").read_text()
SECTIONS = "Pseudo-code|Equations|Symbols|Departures from the paper|References|Read first|New here|Run|Expect"
# These are each script's own; every other function of one name has one text.
OWN = {"Args", "Agent", "make_agent", "make_envs", "load_policy", "check_settings", "check_spaces", "train"}
OWN |= {"td_target", "value_loss", "policy_loss", "ReplayMemory"}
# Scripts without torch have no device and NumPy's own file format.
WITHOUT_TORCH = {"Run", "save_checkpoint", "load_checkpoint", "evaluate", "record_video", "check_args"}
PROMISES = "fail parse_args read_command_line check_args env_seeds Run open_folder is_new write_file "
PROMISES += "save_checkpoint load_checkpoint evaluate record_video"
SHARED_ARGS = "resume evaluate capture_video track wandb_project_name wandb_entity"
# Lines from the first one to the end of `train`, at most.
PATHS = {"q_learning": 240, "reinforce": 342, "ppo": 330, "a2c_continuous": 410, "dqn_atari": 400}
PATHS |= {"rnd_ppo": 450, "icm_ppo": 460, "ppo_continuous": 445, "ppo_atari": 440}
PATHS |= {"decision_transformer": 450}


def functions(name: str) -> dict[str, str]:
    """The source of every function and class at the top level of a script, by name."""
    tree = ast.parse(SOURCES[name])
    nodes = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return {node.name: ast.get_source_segment(SOURCES[name], node) for node in nodes}


def fields(name: str) -> dict[str, tuple[str, str]]:
    """Name, line and trailing comment of every field of Args."""
    body = SOURCES[name].split("class Args:")[1].split("\n\n\n")[0].split("    @property")[0]
    return dict(re.findall(r"^    (\w+): [^#\n]*?(?:  # (.*))?$", body, flags=re.M))


def test_every_script_is_in_the_list():
    tracked = subprocess.run(["git", "ls-files", "algos/*.py"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode or not tracked.stdout:
        pytest.skip("not a git checkout")
    own = [path.split("/")[1][:-3] for path in tracked.stdout.splitlines() if path.count("/") == 1]
    assert sorted(own) == sorted(SCRIPTS), "tests/copy_block.py lists the project's scripts"


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
    """The reading path is unbroken: nothing but the algorithm stands above the end of `train`."""
    lines = SOURCES[name].splitlines()
    nodes = [node for node in ast.parse(SOURCES[name]).body if hasattr(node, "name")]
    order = [node.name for node in nodes]
    end = nodes[order.index("train")].end_lineno
    assert end <= PATHS.get(name, 330), "the reading path is too long"
    assert [line for line in lines[end:] if line][0] == copy_block.LINE
    make_envs = "make_envs" if name in copy_block.WITH_TORCH else "make_env"
    above, below = order[: order.index("train")], order[order.index("train") + 1 :]
    assert above.index("Args") < above.index(make_envs)
    plumbing = {*PROMISES.split(), "make_agent", "check_settings", "check_spaces", "load_policy"}
    assert not set(above) & (plumbing - {"make_agent"})
    assert set(below) >= {*PROMISES.split(), "check_settings", "check_spaces", "load_policy"}
    for promise in PROMISES.split():
        assert below.index(promise) > below.index("check_settings"), "its own come first, then one text"
    assert '\nif __name__ == "__main__":\n' in SOURCES[name]


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_line_is_too_long(name):
    """In characters; the linter forgives lines that end with a link."""
    assert not [line for line in SOURCES[name].splitlines() if len(line) > 110]


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_number_has_its_range(name):
    module = importlib.import_module(name)
    numbers = {
        field.name
        for field in module.Args.__dataclass_fields__.values()
        if re.search(r"\b(int|float)\b", str(field.type)) and "bool" not in str(field.type)
    }
    assert numbers == set(module.RANGES)
    here = {} if find_spec("pybullet") or name != "a2c_continuous" else {"env_id": "Pendulum-v1"}
    module.check_args(module.Args(**here))  # the defaults are within them


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_argument_has_help_and_a_reader(name):
    arguments = fields(name)
    module = importlib.import_module(name)
    assert list(arguments) == list(module.Args.__dataclass_fields__)
    for field, comment in arguments.items():
        assert comment, f"--{field} has no help"
        read = rf"\b(args|self)\.{field}\b|getattr\(args, .{field}."
        assert re.search(read, SOURCES[name]), f"no line reads --{field}"
    for field in SHARED_ARGS.split():
        if field in arguments:
            line = re.search(rf"^    {field}: .*$", SOURCES["ppo"], flags=re.M)[0].replace(
                "__ppo__", f"__{name}__"
            )
            # Without a schedule that follows the budget, there is nothing to say of it.
            short = line.replace("; schedules follow the budget given now", "")
            assert line in SOURCES[name] or short in SOURCES[name], f"--{field} is described differently"


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
            if function not in OWN and not (name not in copy_block.WITH_TORCH and function in WITHOUT_TORCH):
                copies.setdefault(function, {})[name] = text
    for function, texts in copies.items():
        assert len(set(texts.values())) == 1, f"{function} differs between {', '.join(texts)}"
    # theirs are the same formula
    for first, second in (("ppo", "rnd_ppo"), ("ppo", "icm_ppo"), ("ppo", "reinforce")):
        for function in ("policy_loss",):
            if function in functions(second):
                assert functions(first)[function] == functions(second)[function]


def test_the_block_below_the_line_has_one_text():
    check = [sys.executable, ROOT / "tests" / "copy_block.py", "--check"]
    run = subprocess.run(check, capture_output=True, text=True)
    assert run.returncode == 0, f"{run.stdout}: python tests/copy_block.py writes it from ppo.py"


def own_requirements(source: str) -> list[str]:
    """What stands in the script's PEP 723 block, read as the standard says."""
    regex = r"(?m)^# /// script$\s(?P<content>(^#(| .*)$\s)+)^# ///$"
    (found,) = re.finditer(regex, source)
    lines = [line[2:] for line in found["content"].splitlines()]
    import tomllib

    parsed = tomllib.loads("\n".join(lines))
    assert parsed["requires-python"] == ">=3.11"
    assert source.rstrip().endswith(found[0].rstrip()), "the block is the end of the file"
    return parsed["dependencies"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_carries_its_requirements(name):
    wanted = own_requirements(SOURCES[name])
    pins = (ROOT / "requirements.txt").read_text().splitlines()
    assert wanted and set(wanted) <= set(pins)
    listed = {re.split(r"[\[=]", line)[0] for line in wanted}
    distributions = importlib.metadata.packages_distributions()
    for module in copy_block.imported(SOURCES[name]):
        root = module.split(".")[0]
        if root not in sys.stdlib_module_names and root in distributions:
            assert listed & {entry for entry in distributions[root]}, f"{root} is imported and not required"
    assert ("torch" in listed) == ("import torch" in SOURCES[name])
    assert not listed & {"pytest", "pytest-xdist", "ruff", "uv"}


def test_one_file_is_enough(tmp_path):
    """A copied script, an empty folder: uv installs what it needs and trains."""
    shutil.copy(ROOT / "algos" / "q_learning.py", tmp_path / "mine.py")
    command = ["uv", "run", "--no-project", "mine.py", "--total-episodes", "2000", "--run-dir", "here"]
    environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    options = {"cwd": tmp_path, "env": environment | {"UV_PYTHON": sys.executable}, "text": True}
    run = subprocess.run([sys.executable, "-m", *command], **options, capture_output=True, timeout=600)
    assert run.returncode == 0, run.stderr
    assert json.loads((tmp_path / "here" / "results.json").read_text())["algo"] == "mine"


def test_a_copied_and_changed_script_leaves_the_suite_green(tmp_path):
    """README invites to copy: the copy is collected by no test and held to no text."""
    for part in ("algos", "tests"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__", "figures"))
    for file in ("README.md", "requirements.txt"):
        shutil.copy(ROOT / file, tmp_path)
    changed = SOURCES["ppo"].replace("deltas = rewards + gamma", "deltas = 2 * rewards + gamma")
    assert changed != SOURCES["ppo"]
    (tmp_path / "algos" / "my_ppo.py").write_text(changed)
    pytest_run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    options = {"cwd": tmp_path, "capture_output": True, "text": True}
    collected = subprocess.run([*pytest_run, "--collect-only", "tests"], **options)
    assert collected.returncode == 0 and "my_ppo" not in collected.stdout, collected.stdout[-2000:]
    quick = ["-k", "not one_file and not leaves_the_suite_green and not can_be_made and not understood"]
    held = subprocess.run([*pytest_run, *quick, "tests/test_conventions.py"], **options)
    assert held.returncode == 0, held.stdout[-2000:]
    every = "test_every_script_is_held_to_its_promises"
    held = subprocess.run([*pytest_run, "-k", every, "tests/test_run_folder.py"], **options)
    assert held.returncode == 0, held.stdout[-2000:]


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
    return sorted(
        {" ".join(found.split()) for found in re.findall(r"python (algos/\w+\.py[^\n#`(&;]*)", text)}
    )


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


@pytest.mark.parametrize("name", copy_block.WITH_TORCH)
def test_numbers_too_small_for_speed_become_zero(name):
    """In a long DQN run with denormal numbers, Adam's step took a third of the time."""
    if not torch.set_flush_denormal(False):
        pytest.skip("this processor cannot")
    module = importlib.import_module(name)
    module.setup_torch(module.Args())
    assert (torch.full((64,), 1e-37) * 1e-3).sum() == 0
