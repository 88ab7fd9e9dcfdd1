"""Writes what stands below the line in ppo.py into the other scripts of the project that use PyTorch.

Run: python tests/copy_block.py          writes
     python tests/copy_block.py --check  only says which scripts differ (exit code 1)

The block begins with the function `fail` and ends with the main block. What stands between the line and
`fail` (ranges, checks, `load_policy`) is each script's own. Behind the main block every script carries its
requirements (PEP 723): the pins of requirements.txt for what it imports. These are written here, too.
Links of README.md and of its Chinese translation into scripts, (algos/ppo.py#L26 "ratio"), get the number of
the first line with that phrase.
Only the project's own scripts are touched: a copy that a user made is the user's.
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
WITH_TORCH = ["ppo", "reinforce", "a2c_continuous", "dqn", "dqn_atari", "ppo_continuous", "rnd_ppo"]
WITH_TORCH += ["ppo_atari", "decision_transformer", "icm_ppo"]
SCRIPTS = ["q_learning", "sarsa", *WITH_TORCH]
PAGES = ["README.md", "algos/README.zh.md"]
LINE = (
    "# ---- From here on: the run folder (save, resume, evaluate, film). The same text in every script. ----"
)
# Packages whose name is not that of their module, and those that work behind another's import.
PACKAGES = {"ale_py": "ale-py", "pybullet_envs_gymnasium": "pybullet_envs_gymnasium"}
BEHIND = {
    "torch.utils.tensorboard": ["tensorboard"],
    "minari": ["h5py", "huggingface_hub"],
    "pybullet_envs_gymnasium": ["pybullet", "pybullet_arm64"],
}


def block(source: str) -> str:
    """From `fail` to the end of the main block."""
    return source[source.index("\ndef fail(") + 1 :].split("\n\n# /// script")[0].rstrip() + "\n"


def imported(source: str) -> set[str]:
    """Full names of the modules that a script imports anywhere, or names as the home of environments."""
    names = {"pybullet_envs_gymnasium"} if "pybullet_envs_gymnasium:" in source else set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


def requirements(source: str) -> str:
    """The script's own requirements as a PEP 723 block."""
    modules = imported(source)
    wanted = {PACKAGES.get(name.split(".")[0], name.split(".")[0]) for name in modules}
    for name in modules:
        wanted.update(BEHIND.get(name, []))
    pins = []
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line and not line.startswith("#") and re.split(r"[\[=]", line)[0] in wanted:
            pins.append("#     " + repr(line).replace("'", '"') if '"' not in line else f"#     '{line}'")
    listed = ",\n".join(pins)
    return f'# /// script\n# requires-python = ">=3.11"\n# dependencies = [\n{listed},\n# ]\n# ///\n'


def rewritten(name: str, original: str) -> str:
    """A script as it should be. original: ppo.py."""
    source = (ROOT / "algos" / f"{name}.py").read_text()
    head = source[: source.index("\ndef fail(") + 1]
    body = block(original) if name in WITH_TORCH else block(source)
    return head + body + "\n" + requirements(head + body)


def with_line_numbers(page: str) -> str:
    """A page whose links into scripts carry today's line numbers; ValueError where a phrase is gone."""

    def line_of(link: re.Match) -> str:
        path, phrase = link[1], link[2]
        for number, line in enumerate(((ROOT / page).parent / path).read_text().splitlines(), 1):
            if phrase.lower() in line.lower():
                return f'({path}#L{number} "{phrase}")'
        raise ValueError(f"{path} does not say {phrase!r}, to which {page} links")

    return re.sub(r'\(((?:algos/)?\w+\.py)#L\d+ "([^"]+)"\)', line_of, (ROOT / page).read_text())


def main() -> None:
    original = (ROOT / "algos" / "ppo.py").read_text()
    different = []
    for page in PAGES:
        linked = with_line_numbers(page)
        if linked != (ROOT / page).read_text():
            different.append(page)
            if "--check" not in sys.argv:
                (ROOT / page).write_text(linked)
    for name in SCRIPTS:
        path = ROOT / "algos" / f"{name}.py"
        text = rewritten(name, original)
        if text != path.read_text():
            different.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(text)
    print("different:" if different else "all have one text", *different)
    raise SystemExit(bool(different) and "--check" in sys.argv)


if __name__ == "__main__":
    main()
