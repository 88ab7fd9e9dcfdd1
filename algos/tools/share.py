"""Share a trained agent on the Hugging Face Hub, or fetch one that somebody shared.

    python algos/tools/share.py RUN_DIR --repo-id OWNER/NAME              uploads a run
    python algos/tools/share.py RUN_DIR --repo-id OWNER/NAME --dry-run    shows what would go, sends nothing
    python algos/tools/share.py --load OWNER/NAME                         fetches a run into runs/

The Hub is a web site that keeps models in git repositories; OWNER is your name there. To upload, log in once
with `hf auth login`, or set HF_TOKEN. HF_ENDPOINT names another server that speaks the Hub's protocol.

What goes, in one commit
    README.md         the model card: what was learned, its score, the command, how to load it
    checkpoint.pt     what --evaluate needs; with --with-training-state also what only --resume needs
    q_table.npz       instead of it where the agent is a table: small, so always whole
    args.json, results.json, the TensorBoard charts, replay.mp4; policy.png and replay.html where they exist
    ppo.py            or whichever script it was: as text, so that the repository explains itself

What does not go: absolute paths (they become relative, or lose their folders), the name of this machine
(TensorBoard puts it into the names of its files), the team at Weights & Biases. In the end all files are
searched, also for the ways in which JSON, HTML and a shell write a text. One find, and nothing is sent:
    your home folder and your token for the Hub
    values of 8 characters or more of environment variables whose names contain TOKEN, SECRET, PASS,
    CREDENTIAL, API_KEY, APIKEY, PRIVATE_KEY or ACCESS_KEY, or end in _PAT or _PWD, in capitals or not
    the name of this machine: only in args.json, results.json, replay.html and the charts, for a checkpoint
    has numbers, under names from the script; and not if the files in algos/ have such a word, like torch
Names and folders of 4 characters or less are not searched for: they stand in long files by chance.

The score is checked as well: the script evaluates the very files that go, and must find the score that is in
results.json. A film or a page from before the last training shows another agent: the film is made anew, the
page stays here, and a line says so.

What a stranger's repository can do with --load: fill a folder of yours with at most 1 GB. Files are fetched
by their names, and only those above that are data: no script and no page. None is executed or unpickled here,
and the scripts read checkpoints as numbers. args.json is cleaned again, and a module that it names as the
home of its environment is not imported before you repeat the name.

A request that stays without an answer for --timeout seconds is given up and tried again, a few times. An
upload that ends in the middle leaves no half commit: the same command finishes it, and large files that have
arrived are not sent again.
"""

import ast
import html
import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import tyro

ALGOS = Path(__file__).resolve().parents[1]  # where the scripts are
CHECKPOINTS = ("checkpoint.pt", "q_table.npz")
EVENTS = "events.out.tfevents."  # how the names of TensorBoard's files begin
# The data of a run. No replay.html: a page from a stranger would run its code in the browser.
DATA = {"args.json", "results.json", *CHECKPOINTS, "replay.mp4", "policy.png"}
# Arguments that concern one machine or one person only, and what they become in a shared run.
LOCAL = {"run_dir": None, "resume": None, "evaluate": None, "capture_video": False, "track": False}
LOCAL |= {"wandb_entity": None}
# Names of environment variables whose values must not go.
SECRET = r"TOKEN|SECRET|PASS|CREDENTIAL|API_?KEY|PRIVATE_KEY|ACCESS_KEY|_PAT$|_PWD$"
# Where a path of this machine begins in a text: at / or ~, or behind file:// or a scheme that names no host.
# The slashes of ALE/Pong-v5 and of https://host/ begin none.
PATH_BEGINS = r"(?:(?<!\w)(?:file://[^/\s]*|\w+://)/*(?=/)|(?<![\w./~:-])(?=[/~])|(?<=:)(?=[/~](?!/)))"
# The data of replay.html; watch.py writes one such block for each run.
PAGE_DATA = re.compile(r'(?<=<script type="application/json" class="run">)(.*?)(?=</script>)', re.DOTALL)
MAX_BYTES = 10**9  # of all files of a repository that is fetched
MAX_JSON = 10**6
MAX_REQUESTS = 500  # of one command; a run needs about twenty
PAUSES = (2, 5)  # seconds before the second and the third try
PATIENCE = 120  # seconds after which no further try is begun


@dataclass(frozen=True)
class Args:
    run_dir: tyro.conf.Positional[str | None] = None  # the run; with --load its new folder, else in runs/
    repo_id: str | None = None  # OWNER/NAME on the Hub, made if it does not exist
    load: str | None = None  # fetch OWNER/NAME or OWNER/NAME@REVISION
    private: bool = False  # only you can see the repository
    dry_run: bool = False  # write the folder that would be uploaded, list it, send nothing
    with_training_state: bool = False  # share the optimizer too, so that others can go on with --resume
    check: bool = True  # evaluate the very files that go; a score that is not that of results.json stops all
    env_id: str | None = None  # repeat the run's module:id here to allow that its module is imported
    timeout: float = 30.0  # seconds without an answer after which a request is given up


@dataclass(frozen=True)
class SharedRun:
    """A finished run: its folder, args.json, results.json, the name of its checkpoint and its script."""

    folder: Path
    settings: dict
    results: dict
    checkpoint: str
    script: Path


def read_run(folder: Path, name: str) -> SharedRun:
    """Read a run folder; ends with one line, in which it is called `name`, if it is not what it should be."""
    found = [checkpoint for checkpoint in CHECKPOINTS if (folder / checkpoint).is_file()]
    if len(found) != 1 or not (folder / "args.json").is_file():
        fail(f"{name} is no run folder: it needs args.json and one of {', '.join(CHECKPOINTS)}")
    if not (folder / "results.json").is_file():
        fail(f"{name} has no results.json: a run has a score to share when it has ended (--resume goes on)")
    settings = read_json(folder / "args.json", name)
    results = read_json(folder / "results.json", name)
    algo = str(results.get("algo"))
    script = ALGOS / f"{algo}.py"
    if not re.fullmatch(r"[\w-]+", algo) or not script.is_file():
        fail(f"{name} was made by the script {algo!r}, which is not in {os.path.relpath(ALGOS)}")
    for number in ("mean_reward", "std_reward", "eval_episodes", "global_step", "wall_time_s", "seed"):
        if not isinstance(results.get(number), int | float):
            fail(f"results.json of {name} has no number {number}")
    env_id = settings.get("env_id")
    if env_id != results.get("env_id") or not re.fullmatch(r"[\w./:-]+", str(env_id)):
        fail(f"args.json and results.json of {name} do not name one environment")
    if not isinstance(settings.get("versions"), dict):
        fail(f"args.json of {name} names no versions of packages")
    return SharedRun(folder, settings, results, found[0], script)


def read_json(path: Path, name: str) -> dict:
    """A JSON object from a file of the run called `name`; ends with one line if it is none."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise ValueError(f"it is larger than {MAX_JSON:,} bytes")
        value = without_paths(json.loads(path.read_text(encoding="utf-8")))
        if not isinstance(value, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        fail(f"cannot use {path.name} of {name}: {type(error).__name__} {error}")
    return value


# ---- What goes: the folder that is uploaded ----


def share(args: Args) -> None:
    """Write the folder, look through it, upload it; with --dry-run leave it for the user to look at."""
    run = read_run(Path(args.run_dir), args.run_dir)
    for path in sorted(run.folder.iterdir()):
        if path.is_symlink():  # in a stranger's folder it could lead to anything of yours
            fail(f"{path.name} in {args.run_dir} is a link: only what lies in the folder itself can go")
    hub = connect(args.timeout)
    token = hub.get_token()
    if token is None and not args.dry_run:
        fail("not logged in to the Hub: run `hf auth login`, or set HF_TOKEN")
    stage = Path(tempfile.mkdtemp(prefix="share-"))
    try:
        write_stage(args, run, stage)
        find_secrets(stage, token)
        files = sorted((path.name, path.stat().st_size) for path in stage.iterdir())
        end = f"nothing was sent: {stage}" if args.dry_run else upload(args, hub, stage)
    except BaseException:
        shutil.rmtree(stage)
        raise
    if not args.dry_run:
        shutil.rmtree(stage)
    for name, size in files:
        print(f"{size:>12,}  {name}")
    print(f"{len(files)} files, {sum(size for _, size in files):,} bytes, {end}")


def write_stage(args: Args, run: SharedRun, stage: Path) -> None:
    """Put everything that goes into an empty folder; the script evaluates there, and films if need be."""
    step = copy_checkpoint(run, stage, args.with_training_state)
    if step != run.results["global_step"]:
        reason = f"results.json is of step {run.results['global_step']:,}, {run.checkpoint} of step {step:,}"
        fail(f"{reason}: end the run first with --resume {run.folder}")
    settings = clean_settings(run.settings)
    (stage / "args.json").write_text(json.dumps(settings, indent=2))
    (stage / "results.json").write_text(json.dumps(without_paths(run.results), indent=2))
    shutil.copyfile(run.script, stage / run.script.name)
    if (run.folder / "policy.png").is_file():
        shutil.copyfile(run.folder / "policy.png", stage / "policy.png")
    copy_page(run, settings, stage)
    # A name like events.out.tfevents.SECONDS.MACHINE.PROCESS.0 tells the machine. TensorBoard needs only its
    # beginning, and reads the files of a run in the order of their names.
    for number, path in enumerate(sorted(run.folder.glob(EVENTS + "*"))):
        begun = path.name.removeprefix(EVENTS).split(".")[0]
        shutil.copyfile(path, stage / f"{EVENTS}{begun if begun.isdecimal() else 0}.{number}")
    film = run.folder / "replay.mp4"
    if film.is_file() and not is_stale(film, run):
        shutil.copyfile(film, stage / film.name)
        play(args, run, stage)
    elif play(args, run, stage, film=True) and os.access(run.folder, os.W_OK):
        keep_film(stage / film.name, film)
    (stage / "README.md").write_text(model_card(args, run, settings, stage), encoding="utf-8")


def is_stale(path: Path, run: SharedRun) -> bool:
    """Whether a film or a page is from before the last training: then it shows another agent."""
    return path.stat().st_mtime < (run.folder / run.checkpoint).stat().st_mtime


def keep_film(made: Path, film: Path) -> None:
    """Put a film into the run folder, whole or not at all: the next share would take half a film."""
    temporary = film.with_name("tmp-" + film.name)
    temporary.unlink(missing_ok=True)  # left by a share that was killed
    try:
        shutil.copyfile(made, temporary)
        os.replace(temporary, film)
    finally:
        temporary.unlink(missing_ok=True)


def copy_page(run: SharedRun, settings: dict, stage: Path) -> None:
    """Put replay.html into the stage, without paths. A page of another agent stays here; a line says so."""
    page = run.folder / "replay.html"
    if not page.is_file():
        return
    if is_stale(page, run):
        reason = f"is older than {run.checkpoint}"
    else:
        try:
            cleaned = clean_page(page.read_bytes().decode(), command_line(run.script, settings))
            (stage / page.name).write_bytes(cleaned.encode())
            return
        except (ValueError, AttributeError, KeyError, RecursionError):
            reason = "is not as watch.py writes it for one run"
    again = shlex.join(["python", os.path.relpath(ALGOS / "tools" / "watch.py"), str(run.folder)])
    print(f"no page: replay.html {reason}; to make it anew: {again}", file=sys.stderr)


def clean_page(text: str, command: str) -> str:
    """replay.html without paths. command: what the page shall show as the command of the training."""
    before, block, after = PAGE_DATA.split(text)
    data = json.loads(block)
    # The page has the command as it was typed. What was played has no words of this machine, but pictures as
    # text, in which slashes mean something else.
    words = {name: part for name, part in data.items() if name != "episodes"}
    data = without_paths(words) | {"command": command, "episodes": data["episodes"]}
    block = json.dumps(data, allow_nan=False, separators=(",", ":"))
    # As watch.py does it: nothing in the data can end the script tag.
    return before + block.replace("<", "\\u003c").replace("&", "\\u0026") + after


def copy_checkpoint(run: SharedRun, stage: Path, with_training_state: bool) -> int:
    """Copy the checkpoint, without what only --resume needs; returns its step. Runs no code from it."""
    source = run.folder / run.checkpoint
    target = stage / run.checkpoint
    try:
        if run.checkpoint == "q_table.npz":
            import numpy as np

            with np.load(source, allow_pickle=False) as file:
                step = int(file["global_step"])
            shutil.copyfile(source, target)
            return step
        import torch  # here, because it is slow to import

        saved = torch.load(source, map_location="cpu", weights_only=True)
        step = int(saved["global_step"])
        if with_training_state:
            shutil.copyfile(source, target)
        else:
            torch.save({name: part for name, part in saved.items() if not for_training(name, part)}, target)
    except Exception as error:  # damaged files and foreign files fail in many ways
        fail(f"cannot use {source}: {type(error).__name__} {error}")
    return step


def for_training(name: str, part) -> bool:
    """Whether an entry of checkpoint.pt serves --resume only: optimizers, target networks, replay memory."""
    is_optimizer = isinstance(part, dict) and {"state", "param_groups"} <= part.keys()
    return is_optimizer or name.startswith("target") or name in ("memory", "rng_state", "recent_returns")


def clean_settings(settings: dict) -> dict:
    """args.json without what concerns one machine or one person only: paths, the team of W&B."""
    return without_paths(settings | {name: value for name, value in LOCAL.items() if name in settings})


def without_paths(value):
    """A JSON value in which no path is absolute: what lies below the working folder or the project is written
    from there, and of other paths only the last name stays."""
    if isinstance(value, dict):
        return {without_paths(name): without_paths(part) for name, part in value.items()}
    if isinstance(value, list):
        return [without_paths(part) for part in value]
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith(("{", "[")):
        try:  # as in --env-kwargs: there a path ends with its string, and may hold spaces
            held = json.loads(value)
            cleaned = without_paths(held)
            if cleaned != held:
                return json.dumps(cleaned)
        except (ValueError, RecursionError):
            pass  # it only looked like JSON
    begins = re.match(PATH_BEGINS, value)
    if begins:
        return relative(value[begins.end() :])
    # A path inside of a longer text: taken to end at a space or a comma.
    return re.sub(PATH_BEGINS + r"([/~]+[^/~\s\"',;][^\s\"',;]*)", lambda match: relative(match[1]), value)


def relative(path: str) -> str:
    """An absolute path from the working folder or the project if it lies below, else its last name."""
    absolute = Path(os.path.normpath(os.path.expanduser(path)))
    for base in (Path.cwd(), ALGOS.parent):
        if absolute.is_relative_to(base):
            return str(absolute.relative_to(base))
    return "" if absolute == Path.home() else absolute.name  # its last name is that of a person


def play(args: Args, run: SharedRun, stage: Path, film: bool = False) -> bool:
    """Let the script evaluate the staged files, compare the score, film an episode; whether it made a film.

    Without a film the run is shared all the same, with another score than its own it is not.
    """
    if not (args.check or film):
        return False
    command = [sys.executable, str(run.script), "--evaluate", str(stage)]
    command += ["--env-id", args.env_id] if args.env_id else []
    command += [] if args.check else ["--eval-episodes", "1"]
    code, summary, error = start(command + ["--capture-video"] * film)
    if code and film:
        print(f"no film: {error}", file=sys.stderr)
        (stage / "tmp-replay.mp4").unlink(missing_ok=True)  # it may have broken off
        film = False
        code, summary, error = start(command)
    if code:
        fail(f"{run.script.name} --evaluate does not take the files that would go: {error}")
    mean, std, episodes = (run.results[name] for name in ("mean_reward", "std_reward", "eval_episodes"))
    wanted = f"{mean:.2f} ± {std:.2f} over {episodes} episodes"
    if args.check and f": {wanted} after " not in summary:
        found = summary.partition(": ")[2].partition(" after ")[0]
        fail(f"the files come to {found}, results.json says {wanted}: nothing is sent", code=1)
    return film


def start(command: list[str]) -> tuple[int, str, str]:
    """Run a script and pass its progress bar on; returns its exit code, its last line, and its error."""
    error = ""
    # stdout goes into a file: a full pipe would hold the script up, while here its stderr is read to the end.
    with tempfile.TemporaryFile("w+", encoding="utf-8") as out:
        options = {"stdout": out, "stderr": subprocess.PIPE, "text": True, "encoding": "utf-8"}
        with subprocess.Popen(command, **options) as process:
            for line in process.stderr:  # each state of the bar is a line
                if line.strip():
                    error = line.strip().removeprefix("error: ")
                if "%|" in line and sys.stderr.isatty():
                    print(f"\r{line.rstrip()}", end="", file=sys.stderr)
        out.seek(0)
        lines = out.read().splitlines()
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)  # clears the line of the bar
    return process.returncode, lines[-1] if lines else "", error


def find_secrets(stage: Path, token: str | None) -> None:
    """End with one line if a file that would go holds one of the secrets in the text at the top."""
    secrets = {str(Path.home()): "your home folder", os.path.realpath(Path.home()): "your home folder"}
    secrets |= {token: "your token"} if token else {}
    for name, value in os.environ.items():
        if re.search(SECRET, name, flags=re.IGNORECASE) and len(value) >= 8:
            secrets.setdefault(value, f"the value of {name}")
    host = socket.gethostname()
    # A machine may be called agent or torch. Words of these files stand in each run and tell nothing of it,
    # nor does the beginning of TensorBoard's files.
    ordinary = b"".join(path.read_bytes() for path in ALGOS.rglob("*.py")) + b"brain.Event:2"
    machine = {} if as_bytes(host) in ordinary else {host: "the name of this machine"}
    for path in sorted(stage.iterdir()):
        data = path.read_bytes()
        may_name_it = path.suffix in (".json", ".html") or is_events(path.name)
        for secret, words in (secrets | machine if may_name_it else secrets).items():
            # What is shorter stands in long files by chance, and a home folder may be just /.
            if len(secret) > 4 and any(as_bytes(form) in data for form in ways_to_write(secret)):
                fail(f"{path.name} holds {words}: nothing is sent")


def as_bytes(text: str) -> bytes:
    """As in files; what is no text in an environment variable stays as it is."""
    return text.encode("utf-8", "surrogateescape")


def ways_to_write(secret: str) -> set[str]:
    """A text as files may hold it: itself, in JSON, in a command, in JSON around these, in HTML."""
    forms = {secret, json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1]}
    forms |= {form.replace("'", "'\"'\"'") for form in forms}  # as shlex.join writes it
    forms |= {json.dumps(form)[1:-1] for form in forms}
    forms |= {html.escape(form) for form in forms}
    return forms | {form.replace("<", "\\u003c").replace("&", "\\u0026") for form in forms}  # watch.py's JSON


def upload(args: Args, hub, stage: Path) -> str:
    """One commit with all files of the folder; returns the repository's address."""
    # What an earlier share of another run put there and this one has not would mix two runs.
    mine = [*DATA, EVENTS + "*", "replay.html", *(path.name for path in ALGOS.glob("*.py"))]

    def attempt() -> str:
        # Without --private the default of the user or organisation holds, which may be private too.
        url = hub.create_repo(args.repo_id, private=args.private or None, exist_ok=True)
        if args.private:
            refuse_if_public(args.repo_id, hub)
        message = "Share a run with share.py"
        hub.upload_folder(
            repo_id=args.repo_id, folder_path=stage, commit_message=message, delete_patterns=mine
        )
        return str(url)

    return persist(attempt, args.repo_id)


def refuse_if_public(repo_id: str, hub) -> None:
    """End with one line if somebody without a login can see the repository, which existed before."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    with tempfile.TemporaryDirectory() as folder:
        try:
            hub.snapshot_download(repo_id, token=False, dry_run=True, cache_dir=folder)
        except Exception as error:
            for cause in causes(error):  # a gated repository can be seen
                if isinstance(cause, RepositoryNotFoundError) and not isinstance(cause, GatedRepoError):
                    return
            raise
    fail(f"{repo_id} exists and is public: make it private in its settings on the Hub first")


# ---- The model card ----


def leaderboard_name(settings: dict) -> str:
    """The environment as the course's leaderboard calls it: without its module, FrozenLake with its map."""
    name = settings["env_id"].rpartition(":")[2]
    if name == "FrozenLake-v1":
        options = json.loads(settings.get("env_kwargs") or '{"is_slippery": false}')
        name += f"-{options.get('map_name', '4x4')}" + "-no_slippery" * (not options.get("is_slippery", True))
    return name


def command_line(script: Path, settings: dict) -> str:
    """The command that trains such a run: environment, seed, and what is not the script's default."""
    words = ["python", f"algos/{script.name}"]
    tree = ast.parse(script.read_text(encoding="utf-8"))
    (definition,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args")
    for field in definition.body:
        name = field.target.id if isinstance(field, ast.AnnAssign) else None
        if name not in settings or name in (*LOCAL, "wandb_project_name"):
            continue
        value = settings[name]
        written = field.value
        if isinstance(written, ast.Call) and written.keywords:
            written = written.keywords[0].value  # default_factory=lambda: [64], or =list
            written = getattr(written, "body", ast.List([]))
        try:
            default = ast.literal_eval(written)
        except ValueError:  # a default that is computed: the flag is shown
            default = ...
        if value == default and name not in ("env_id", "seed"):
            continue
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else "--no-" + flag[2:])
        else:
            words += [flag, *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def model_card(args: Args, run: SharedRun, settings: dict, stage: Path) -> str:
    """README.md of the repository; its front matter is what the course's leaderboard reads."""
    name = run.script.stem
    env = leaderboard_name(settings)
    results = run.results
    mean = f"{results['mean_reward']:.2f}"
    std = f"{results['std_reward']:.2f}"
    idea = (ast.get_docstring(ast.parse(run.script.read_text(encoding="utf-8"))) or name).splitlines()[0]
    versions = "\n".join(f"| {package} | {number} |" for package, number in settings["versions"].items())
    film = "`replay.mp4` shows one of them, to its last step. " if (stage / "replay.mp4").exists() else ""
    whole = args.with_training_state or run.checkpoint == "q_table.npz"
    rest = "and of the training: `--resume` goes on" if whole else "only: `--resume` cannot go on with it"
    return f"""---
library_name: single-file-rl
tags:
- "{env}"
- "{name}"
- reinforcement-learning
- deep-reinforcement-learning
- custom-implementation
- deep-rl-course
model-index:
- name: "{name}"
  results:
  - task:
      type: reinforcement-learning
      name: reinforcement-learning
    dataset:
      type: "{env}"
      name: "{env}"
    metrics:
    - type: mean_reward
      value: "{mean} +/- {std}"
      name: mean_reward
      verified: false
---

# {name} on {settings["env_id"]}

{idea}

**Score: {mean} ± {std}**, mean and standard deviation of {results["eval_episodes"]} episodes on seeds that
the training has not seen. {film}It was trained for {results["global_step"]:,} steps, in
{results["wall_time_s"]:,.1f} seconds, with this command:

```bash
{command_line(run.script, settings)}
```

## Try it

The whole algorithm is one file, `{run.script.name}`: here it is as it was when this run was shared. With the
project that it comes from:

```bash
python algos/tools/share.py --load {args.repo_id}
```

This fetches a run folder, executes nothing from here, and prints the commands that evaluate the agent and
film it. `{run.checkpoint}` holds the state of the agent {rest}.

| package | version |
|---|---|
{versions}
"""


# ---- What comes: a run folder from the Hub ----


def load(args: Args) -> None:
    """Fetch a shared run into a new run folder and print what can be done with it. Executes nothing."""
    repo_id, _, revision = args.load.partition("@")
    hub = connect(args.timeout)
    parent = Path(args.run_dir).parent if args.run_dir else Path("runs")
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="tmp-load-", dir=parent) as temporary:
        place = Path(temporary)

        def fetch(folder: str, **options):
            options |= {"cache_dir": place / "cache", "local_dir": place / folder}
            return persist(lambda: hub.snapshot_download(repo_id, **options), args.load)

        listed = fetch("list", revision=revision or None, dry_run=True)  # names with .. end here
        # Nothing else is fetched, whatever the repository holds: no code, and no name with a folder in it.
        files = [file for file in listed if file.filename in DATA or is_events(file.filename)]
        names = sorted(file.filename for file in files)
        size = sum(file.file_size or 0 for file in files)  # unknown for some small texts
        if not {"args.json", "results.json"} <= set(names) or len(set(names) & set(CHECKPOINTS)) != 1:
            fail(f"{args.load} holds no run: it needs args.json, results.json and a checkpoint")
        if size > MAX_BYTES:
            fail(f"{args.load} has {size:,} bytes: more than {MAX_BYTES:,} are not fetched")
        fetch("run", revision=files[0].commit_hash, allow_patterns=names)
        shutil.rmtree(place / "run" / ".cache", ignore_errors=True)  # the package's notes on what it fetched
        run = read_run(place / "run", args.load)
        settings = clean_settings(run.settings)
        (run.folder / "args.json").write_text(json.dumps(settings, indent=2))
        folder = new_folder(args.run_dir, repo_id)
        os.replace(run.folder, folder)
    mean, std, episodes = (run.results[name] for name in ("mean_reward", "std_reward", "eval_episodes"))
    score = f"{mean:.2f} ± {std:.2f} over {episodes} episodes, says its author"
    print(f"{settings['env_id']}, {run.script.stem}, seed {run.results['seed']}: {score}: {folder}")
    command = ["python", os.path.relpath(run.script), "--evaluate", str(folder)]
    module = settings["env_id"].rpartition(":")[0]
    if module and not module.startswith("envs."):
        print(f"this runs code of the module {module}, if you allow it with --env-id {settings['env_id']}:")
    print(shlex.join(command))
    print(shlex.join([*command, "--capture-video"]))


def is_events(name: str) -> bool:
    """Whether a file has the name of a TensorBoard file, without a folder."""
    return re.fullmatch(re.escape(EVENTS) + r"[\w.-]+", name) is not None


def new_folder(run_dir: str | None, repo_id: str) -> Path:
    """Make the folder of the run: the given one, which must not exist, or a free name below runs/."""
    default = Path("runs") / repo_id.replace("/", "--")
    folder = Path(run_dir) if run_dir else default
    copy = 1
    while True:
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            if run_dir:
                fail(f"{folder} exists already")
            copy += 1
            folder = default.with_name(f"{default.name}-{copy}")


# ---- The Hub: time limits, second tries, errors in one line ----


def connect(timeout: float):
    """The package huggingface_hub, made to wait `timeout` seconds at most for any answer."""
    # Files as small as these gain nothing from the Xet protocol, which has its own time limits and commits.
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import huggingface_hub  # here, because it is slow to import, and reads the lines above when it is
    from huggingface_hub.utils._http import default_client_factory

    sent = []

    def limit(request) -> None:
        """Called before each request: many of the Hub's calls set no time limit, or an endless one."""
        request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), timeout)
        sent.append(request.url)
        if len(sent) > MAX_REQUESTS:  # as when the Hub goes on saying that it is busy
            raise RuntimeError(f"more than {MAX_REQUESTS} requests, the last to {request.url}")

    def client():
        new = default_client_factory()
        new.event_hooks["request"].append(limit)
        return new

    huggingface_hub.set_client_factory(client)
    # It would write a line for each of its own second tries, with addresses at which anybody can upload.
    huggingface_hub.logging.set_verbosity_error()
    return huggingface_hub


def persist(attempt: Callable, repo_id: str):
    """Call until it works: up to two more times after a failure that may pass, else end with one line."""
    begun = time.monotonic()
    for pause in (*PAUSES, None):
        try:
            return attempt()
        except Exception as error:
            reason, passing = explain(error)
            reason = " ".join(f"{repo_id}: {reason}".split())[:400]
            if pause is None or not passing or time.monotonic() - begun > PATIENCE:
                fail(reason, code=1 if passing else 2)
        print(f"{reason}; again in {pause} s", file=sys.stderr)
        time.sleep(pause)


def causes(error: BaseException | None):
    """An error, the error that it came from, and so on."""
    while error:
        yield error
        error = error.__cause__


def explain(error: Exception) -> tuple[str, bool]:
    """What went wrong, and whether it may pass."""
    import httpx2
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    for cause in causes(error):
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(cause, RevisionNotFoundError):
            return "the Hub knows the repository, but not this revision", False
        if isinstance(cause, RepositoryNotFoundError):
            return "no such repository on the Hub, or one that this login may not see", False
        if status == 401:
            return (
                "the Hub does not take this login (401): run `hf auth login`, or set another HF_TOKEN",
                False,
            )
        if status == 403:
            return "this login may not do that (403): is the name yours, and may the token write?", False
        if status:
            said = getattr(cause, "server_message", None) or ""
            return f"the Hub answers {status} {said}", status in (408, 409, 412, 429) or status >= 500
        if isinstance(cause, httpx2.TimeoutException):
            return "the Hub does not answer in time", True
        if isinstance(cause, httpx2.TransportError):
            return f"cannot reach the Hub: {cause}", True
    return f"{type(error).__name__} {error}", False


# ---- The command line ----


def fail(message: str, code: int = 2) -> NoReturn:
    """End with one line on stderr; exit code 2 means bad input."""
    print("error: " + " ".join(message.split())[:400], file=sys.stderr)
    raise SystemExit(code)


def parse_args() -> Args:
    """Read the command line; what cannot work ends with one line and exit code 2."""
    errors = io.StringIO()
    try:
        with redirect_stderr(errors):
            args = tyro.cli(Args, description=__doc__.partition("\n")[0])
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        fail("".join(letter for letter in errors.getvalue() if not "─" <= letter <= "╿"))
    if not 0 < args.timeout <= 3600:
        fail(f"--timeout {args.timeout} is not between 0 and 3,600")
    given = args.load if args.load is not None else args.repo_id
    if given is None or (args.load is None and args.run_dir is None):
        fail("say what to do: RUN_DIR --repo-id OWNER/NAME shares a run, --load OWNER/NAME fetches one")
    for_sharing = [args.repo_id, args.private, args.dry_run, args.with_training_state, args.env_id]
    if args.load is not None and (any(for_sharing) or not args.check):
        fail("--load takes a RUN_DIR and --timeout only: all other flags are for sharing")
    repo_id = given.partition("@")[0] if args.load is not None else given
    word = r"\w(?:[\w.-]{0,94}\w)?"  # the Hub's rule, and neither -- nor .. in it
    if not re.fullmatch(f"{word}/{word}", repo_id, flags=re.ASCII) or re.search(r"--|\.\.", repo_id):
        fail(
            f"{given} is no name of a repository on the Hub: OWNER/NAME, of letters, digits, and . _ - within"
        )
    return args


def main() -> None:
    args = parse_args()
    try:
        if args.load is not None:
            load(args)
        else:
            share(args)
    except KeyboardInterrupt:
        print("interrupted: the same command begins again and keeps what has arrived", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:
        fail(f"{type(error).__name__} {error}")


if __name__ == "__main__":
    main()
