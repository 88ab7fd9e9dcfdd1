"""share.py against a server on this machine that speaks the Hub's protocol: what goes, comes and fails."""

import html
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace

import copy_block
import hub_server
import numpy as np
import pytest
import yaml
from hub_server import Fault
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[1]
TOOLS = ROOT / "algos" / "tools"
sys.path.insert(0, str(TOOLS))
import share  # noqa: E402
import watch  # noqa: E402

REPO = "me/agent"
HOST = "alices-laptop-4711"
# Every process of a test believes that it runs on this machine.
SITE = f"import socket\nsocket.gethostname = lambda: {HOST!r}\n"
# A script that plays at once; FAKE says what goes wrong. The default of `sizes` is computed.
FAKE = '''"""Pretends to have learned: a fake for tests.

The second paragraph."""
import os, sys
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Args:
    env_id: str = "CartPole-v1"
    sizes: list[int] = field(default_factory=list)
    seed: int = 1


folder = Path(sys.argv[sys.argv.index("--evaluate") + 1])
wrong = os.environ.get("FAKE", "")
if "--capture-video" in sys.argv:
    (folder / "tmp-replay.mp4").write_bytes(b"a film")
    if wrong == "film":
        sys.exit("error: no pictures here")
    os.replace(folder / "tmp-replay.mp4", folder / "replay.mp4")
if wrong == "evaluate":
    sys.exit("error: cannot use it")
episodes = sys.argv[sys.argv.index("--eval-episodes") + 1] if "--eval-episodes" in sys.argv else "3"
mean = "4.00" if wrong == "score" else "5.00"
print("100%|####| 3/3", file=sys.stderr)
print(f"CartPole-v1, seed 1: {mean} ± 1.50 over {episodes} episodes after 10 steps, 1.0 s: {folder}")
'''
ARGS = {"env_id": "CartPole-v1", "sizes": [64, 32], "seed": 1, "run_dir": None, "wandb_entity": "team"}
ARGS |= {
    "track": True,
    "capture_video": True,
    "resume": None,
    "evaluate": None,
    "versions": {"numpy": "2.4.6"},
}
RESULTS = {"algo": "fake", "env_id": "CartPole-v1", "seed": 1, "global_step": 10, "episodes": 4}
RESULTS |= {"mean_reward": 5.0, "std_reward": 1.5, "score": 3.5, "eval_episodes": 3, "wall_time_s": 1.0}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One server for all tests, because huggingface_hub reads its address only once, when it is imported."""
    server = hub_server.HubServer(tmp_path_factory.mktemp("hub"))
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith("huggingface_hub")}
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("HF_")]:
            patch.delenv(name)
        patch.setenv("HF_ENDPOINT", server.url)
        patch.setenv("HF_HOME", str(server.folder / "home"))
        for name in ("PROGRESS_BARS", "XET", "TELEMETRY"):
            patch.setenv(f"HF_HUB_DISABLE_{name}", "1")
        share.connect(1)
        yield server
    for name in [name for name in sys.modules if name.startswith("huggingface_hub")]:
        del sys.modules[name]
    sys.modules.update(before)
    server.close()


@pytest.fixture
def hub(server, tmp_path):
    """The server, empty again."""
    (tmp_path / "hub").mkdir()
    server.empty(tmp_path / "hub")
    yield server
    server.empty(tmp_path / "hub")  # lets go of requests that it has stalled


@pytest.fixture
def home(tmp_path):
    """A home folder with a working folder in it, where the tool is started."""
    (tmp_path / "home" / "alice" / "work").mkdir(parents=True)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE)
    return tmp_path / "home" / "alice"


@pytest.fixture
def algos(tmp_path):
    """A folder of scripts with one script, the fake."""
    (tmp_path / "project" / "algos").mkdir(parents=True)
    (tmp_path / "project" / "algos" / "fake.py").write_text(FAKE)
    return tmp_path / "project" / "algos"


def page(**changes) -> str:
    """A page as watch.py writes it, without an episode. changes: to what it says of the run."""
    about = {"name": "mine", "algo": "fake", "env_id": "CartPole-v1", "seed": 1, "steps": 10}
    about |= {"command": "python algos/fake.py --sizes 64 32", "versions": {"torch": "2.13.0"}}
    return watch.page([SimpleNamespace(about=about | changes)], [[]])


def page_data(text: str) -> dict:
    """What a page says of its run."""
    (block,) = re.findall(r'<script type="application/json" class="run">(.*?)</script>', text, re.S)
    return json.loads(block)


def fake_run(folder: Path, **changes) -> Path:
    """A finished run of the fake. changes: to results.json."""
    folder.mkdir(parents=True)
    np.savez(folder / "q_table.npz", global_step=10, q_table=np.ones((2, 2)))
    (folder / "args.json").write_text(json.dumps(ARGS))
    (folder / "results.json").write_text(json.dumps(RESULTS | changes))
    (folder / f"events.out.tfevents.1763740000.{HOST}.77.0").write_bytes(b"charts")
    for name in ("policy.png", "replay.mp4", "notes.txt"):
        (folder / name).write_bytes(name.encode())
    (folder / "replay.html").write_bytes(page().encode())
    return folder


@pytest.fixture
def tool(home, hub, algos, monkeypatch, capfd, caplog):
    """Runs the tool in this process, with the fake script only; returns what it printed, or its error.

    Of an error there is one line, with the given exit code. Never does the token stand in the console.
    """
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
    monkeypatch.setattr(socket, "gethostname", lambda: HOST)
    monkeypatch.setattr(tempfile, "tempdir", str(home.parent))
    monkeypatch.setattr(share, "ALGOS", algos)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home / "work")

    told = []  # of pages that did not go, by the last call

    def run(*argv, code: int = 0, token: str = hub_server.TOKEN, **environment) -> str:
        for name, value in {"HF_TOKEN": token, "FAKE": "", **environment}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["share.py", *map(str, argv)])
        capfd.readouterr()
        told.clear()
        ended = 0
        try:
            share.main()
        except SystemExit as stop:
            ended = stop.code
        out, err = capfd.readouterr()
        assert ended == code, err
        assert hub_server.TOKEN not in out + err
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(errors) == (code != 0), err
        others = [line for line in err.splitlines() if not line.startswith(("error: ", "no film: "))]
        told.extend(line for line in others if line.startswith("no page: "))
        others = [line for line in others if not line.startswith("no page: ")]
        assert all(" again in " in line for line in others), "nothing else is said"
        assert not caplog.records, "the package, too, says nothing: it would show addresses of uploads"
        return errors[0] if code else out

    run.told = told
    return run


def start(home: Path, hub, script: str, *argv) -> subprocess.Popen:
    """Start a script as users do, in a process of its own, in the working folder."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    inherited |= {"HOME": str(home), "HF_HOME": str(home / "hub-cache"), "TMPDIR": str(home.parent)}
    inherited |= {"PYTHONPATH": str(home.parents[1] / "site"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    inherited |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub_server.TOKEN} if hub else {}
    command = [sys.executable, str(ROOT / "algos" / script), *map(str, argv)]
    options = {"cwd": home / "work", "env": inherited, "text": True}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def finish(process: subprocess.Popen, code: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == code and "Traceback" not in err, err
    return out, err


def refused_before_any_request(hub) -> bool:
    return not hub.requests


# ---- What goes ----


def test_upload_load_and_evaluate_give_the_same_score(home, hub):
    """All in processes of their own, as users do it; the run's files name the home folder and the machine."""
    folder = home / "work" / "mine"
    flags = ["--total-episodes", "300", "--eval-episodes", "5", "--run-dir", folder]
    summary, _ = finish(start(home, None, "q_learning.py", "--env-id", "CliffWalking-v1", *flags))
    before = {path.name for path in folder.iterdir()}
    assert str(home) in (folder / "args.json").read_text(), "the path is there, so it can be missed"
    assert any(HOST in name for name in before)
    out, _ = finish(start(home, hub, "tools/share.py", folder, "--repo-id", REPO))
    assert out.splitlines()[-1].endswith(f"{hub.url}/{REPO}")
    assert {path.name for path in folder.iterdir()} == before | {"replay.mp4"}, "the film stays"
    assert len(hub.repositories[REPO].commits) == 2, "the first one and ours"
    files = hub.files(REPO)
    events = [name for name in files if name.startswith("events.out.tfevents.")]
    names = {"README.md", "args.json", "results.json", "q_table.npz", "policy.png", "replay.mp4"}
    assert set(files) == names | {"q_learning.py", ".gitattributes", *events} and len(events) == 1
    assert files["q_table.npz"] == (folder / "q_table.npz").read_bytes()
    assert files["q_learning.py"] == (ROOT / "algos" / "q_learning.py").read_bytes()
    for secret in (HOST, str(home.parent), hub_server.TOKEN):
        assert secret.encode() not in b"".join(files.values()) + " ".join(files).encode()

    out, _ = finish(start(home, hub, "tools/share.py", "--load", REPO))
    line, evaluate, film = out.splitlines()
    assert film == evaluate + " --capture-video" and "CliffWalking-v1, q_learning, seed 1" in line
    python, script, *arguments = shlex.split(evaluate)
    assert python == "python" and (home / "work" / script).resolve() == ROOT / "algos" / "q_learning.py"
    assert arguments == ["--evaluate", "runs/me--agent"]
    again, _ = finish(start(home, None, "q_learning.py", *arguments))
    assert again == summary.replace(str(folder), "runs/me--agent")
    assert charts(home / "work" / "runs" / "me--agent") == charts(folder)


def charts(folder: Path) -> dict:
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    assert tags
    return {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in tags}


def test_no_byte_of_what_goes_tells_who_or_where(home, hub, tool, algos):
    """Paths, the machine and the team are everywhere where a run can have them."""
    folder = fake_run(home / "work" / "mine")
    told = {"run_dir": str(folder), "dataset": str(home / "data" / "set.npz"), "file": "~/alices/x.npz"}
    told |= {"env_kwargs": json.dumps({"map": f"{home}/maps/m.txt", "list": ["/srv/alice/one.txt"]})}
    told |= {"track": True, "wandb_entity": "alices-team", "nested": {"list": [str(home / "a b" / "c.txt")]}}
    (folder / "args.json").write_text(json.dumps(ARGS | told))
    tool(folder, "--repo-id", REPO, WANDB_API_KEY="0123456789abcdef")
    everything = (
        b"".join(path.read_bytes() for path in hub.folder.iterdir()) + " ".join(hub.files(REPO)).encode()
    )
    for secret in ("alice", HOST, hub_server.TOKEN, "0123456789abcdef", str(home.parent), "team", "/srv"):
        assert secret.encode() not in everything, secret
    settings = json.loads(hub.files(REPO)["args.json"])
    assert settings["run_dir"] is None and settings["wandb_entity"] is None
    assert settings["dataset"] == "set.npz" and settings["file"] == "x.npz"
    assert json.loads(settings["env_kwargs"]) == {"map": "m.txt", "list": ["one.txt"]}
    assert settings["nested"] == {"list": ["c.txt"]} and settings["sizes"] == [64, 32]
    assert "events.out.tfevents.1763740000.0" in hub.files(REPO)


@pytest.mark.parametrize(
    "value, wanted",
    [
        ("ALE/Pong-v5", "ALE/Pong-v5"),
        ("envs.pong:PongPLE-v0", "envs.pong:PongPLE-v0"),
        ("https://host/a/b", "https://host/a/b"),
        ("runs/x", "runs/x"),
        ("1/2 and / and ~", "1/2 and / and ~"),
        ("/srv/data/x.npz", "x.npz"),
        ("/srv/my data/x.npz", "x.npz"),
        ("WORK/runs/x", "runs/x"),
        ("PROJECT/algos/x", "algos/x"),
        ("HOME", ""),
        ("at:/srv/a,/srv/b", "at:a,b"),
        ('{"map": "/srv/m"}', '{"map": "m"}'),
        ('{"f": "/srv/My Project/alice/ant.xml"}', '{"f": "ant.xml"}'),
        ('["a", {"f": ["/srv/My Project/x", 1.5]}]', '["a", {"f": ["x", 1.5]}]'),
        (json.dumps({"in": json.dumps({"f": "/srv/My Project/x"})}), json.dumps({"in": '{"f": "x"}'})),
        ('{"/srv/My Project/x": 1}', '{"x": 1}'),
        ('{"f": "\\u002fsrv/alice/x"}', '{"f": "x"}'),
        ('{"f": "/srv/alice/x", "f": 1}', '{"f": "x", "f": 1}'),
        ('{"map_name":"8x8", "名": 1e-3}', '{"map_name":"8x8", "名": 1e-3}'),
        ('{"f": "/srv/alice/x"', '{"f": "x"'),
        ("[" * 100_000 + '"/srv/alice/x"', "[" * 100_000 + '"x"'),
        ("file:///srv/alice/robots/ant.xml", "ant.xml"),
        ("file:///srv/My Project/ant.xml", "ant.xml"),
        ("file://localhost/srv/alice/ant.xml", "ant.xml"),
        ("file:////srv/alice/ant.xml", "ant.xml"),
        ("file://WORK/maps/m.txt", "maps/m.txt"),
        ("from file:///srv/alice/ant.xml, file:///srv/b", "from ant.xml, b"),
        ('{"f": "file:///srv/My Project/ant.xml"}', '{"f": "ant.xml"}'),
        ("sqlite:////srv/alice/tune.db", "tune.db"),
        ("//srv/alice/x", "x"),
        ("at //srv/alice/x, // no", "at x, // no"),
        (' {"f": "/srv/My Project/x"}', '{"f": "x"}'),
        (3, 3),
        (None, None),
    ],
)
def test_paths_become_relative(value, wanted, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    if isinstance(value, str):
        value = value.replace("WORK", str(Path.cwd())).replace("PROJECT", str(ROOT))
        value = value.replace("HOME", str(Path.home()))
    assert share.without_paths(value) == wanted


@pytest.mark.parametrize(
    "file", ["README.md", "fake.py", "args.json", "replay.html", "checkpoint.pt", "events.out.tfevents.1.0"]
)
@pytest.mark.parametrize("secret", ["token", "key", "home", "machine"])
def test_one_secret_and_nothing_is_sent(file, secret, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", "/home/alice")
    monkeypatch.setenv("SOME_API_KEY", "key-of-alice")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setattr(socket, "gethostname", lambda: HOST)
    (tmp_path / file).write_bytes(b"nothing false in here")
    share.find_secrets(tmp_path, "hf_secret")
    text = {"token": b"hf_secret", "key": b"key-of-alice", "home": b"/home/alice", "machine": HOST.encode()}[
        secret
    ]
    (tmp_path / file).write_bytes(b"\x00before" + text + b"behind")
    if secret == "machine" and file.endswith((".md", ".py", ".pt")):
        share.find_secrets(tmp_path, None)  # no words of this machine come into these
        return
    with pytest.raises(SystemExit) as stopped:
        share.find_secrets(tmp_path, "hf_secret")
    assert stopped.value.code == 2 and file in capsys.readouterr().err


WRITERS = {
    "as it is": lambda text: text,
    "in args.json": lambda text: json.dumps({"f": text}, indent=2),
    "in JSON within args.json": lambda text: json.dumps({"env_kwargs": json.dumps({"f": text})}),
    "in JSON that a user typed": lambda text: json.dumps({"k": json.dumps({"f": text}, ensure_ascii=False)}),
    "on the page": lambda text: page(name=text),
    "in JSON on the page": lambda text: page(name=json.dumps({"f": text})),
    "in the title of the page": html.escape,
    "in the command on the card": lambda text: shlex.join(["--env-kwargs", json.dumps({"f": text})]),
    "in the command on the page": lambda text: page(name=shlex.join(["--k", json.dumps({"f": text})])),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(
    "secret", ["/home/李明", "s3cret&more", 'say "<hi>"', "back\\slash", "it's mine, 李"]
)
def test_a_secret_is_found_as_files_write_it(secret, writer, tmp_path, monkeypatch, capsys):
    """JSON and HTML write some letters in other ways, JSON within JSON twice so."""
    monkeypatch.setenv("HOME" if secret.startswith("/") else "DB_PASSWORD", secret)
    (tmp_path / "replay.html").write_text(WRITERS[writer]("nothing in here"))
    share.find_secrets(tmp_path, None)
    (tmp_path / "replay.html").write_text(WRITERS[writer](f"{secret}/maze.txt"))
    with pytest.raises(SystemExit):
        share.find_secrets(tmp_path, None)
    assert "replay.html holds " in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, secret",
    [
        ("MY_TOKEN", True),
        ("AWS_SECRET", True),
        ("PGPASSWORD", True),
        ("DB_PASSWD", True),
        ("DB_PASS", True),
        ("ssh_passphrase", True),
        ("SMTP_CREDENTIALS", True),
        ("SOME_API_KEY", True),
        ("SOME_APIKEY", True),
        ("SIGNING_PRIVATE_KEY", True),
        ("AWS_ACCESS_KEY_ID", True),
        ("GITHUB_PAT", True),
        ("MYSQL_PWD", True),
        ("DATA_PATH", False),
        ("PATTERN", False),
        ("PWD", False),
        ("KEYBOARD", False),
    ],
)
def test_which_variables_are_secrets(name, secret, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(name, "12345-abc")
    (tmp_path / "args.json").write_text('{"x": "12345-abc"}')
    if secret:
        with pytest.raises(SystemExit):
            share.find_secrets(tmp_path, None)
        assert f"the value of {name}" in capsys.readouterr().err
    else:
        share.find_secrets(tmp_path, None)
    monkeypatch.setenv(name, "12345-a")  # less than 8 characters stand in files by chance
    (tmp_path / "args.json").write_text('{"x": "12345-a"}')
    share.find_secrets(tmp_path, None)


def test_a_password_may_be_of_bytes_that_are_no_text(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DB_PASSWORD", os.fsdecode(b"s3cret\xffmore"))
    (tmp_path / "fake.py").write_bytes(b"# nothing")
    share.find_secrets(tmp_path, None)
    (tmp_path / "fake.py").write_bytes(b"# s3cret\xffmore")
    with pytest.raises(SystemExit):
        share.find_secrets(tmp_path, None)
    assert "DB_PASSWORD" in capsys.readouterr().err


@pytest.mark.parametrize("host", ["agent", "torch", "actor", "brain", "archive", "python"])
def test_a_machine_with_the_name_of_a_part_can_share(host, tmp_path, monkeypatch):
    """Such words are in every checkpoint, in all charts, on all pages, whoever shares them."""
    import torch
    from torch.utils.tensorboard import SummaryWriter

    monkeypatch.setattr(socket, "gethostname", lambda: host)
    torch.save({"agent": {"actor.0.weight": torch.zeros(2)}}, tmp_path / "checkpoint.pt")
    with SummaryWriter(tmp_path) as writer:
        writer.add_scalar("charts/reward", 1.0, 1)
    (events,) = tmp_path.glob("events.*")
    events.rename(tmp_path / "events.out.tfevents.1.0")
    (tmp_path / "args.json").write_text(json.dumps({"versions": {"torch": "2.13.0"}}))
    (tmp_path / "replay.html").write_text(page())
    share.find_secrets(tmp_path, None)


def test_a_secret_in_the_users_own_script_stops_the_upload(home, hub, tool, algos):
    (algos / "fake.py").write_text(FAKE + f"# {home}/data\n")
    error = tool(fake_run(home / "run"), "--repo-id", REPO, code=2)
    assert "fake.py holds your home folder" in error
    assert refused_before_any_request(hub)
    assert not list(home.parent.glob("share-*")), "the copy in the temporary folder is gone"


def call(name: str, *argv, monkeypatch, capfd) -> tuple[int, str, str]:
    """Run a script's main block in this process; returns exit code, stdout and stderr."""
    module = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, argv)])
    capfd.readouterr()
    code = 0
    source = Path(module.__file__).read_text()
    try:
        exec(
            compile(source[source.index('if __name__ == "__main__":') :], f"{name}.py", "exec"),
            {**vars(module), "__name__": "__main__"},
        )
    except SystemExit as end:
        code = end.code
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return code, *capfd.readouterr()


def test_a_checkpoint_goes_without_the_state_of_the_training(home, tmp_path, monkeypatch, capfd):
    """--evaluate works as before, --resume says in one line that it cannot; with the flag it goes on."""
    import torch

    folder = tmp_path / "mine"
    flags = ["--num-envs", "4", "--num-steps", "64", "--total-timesteps", "512", "--eval-episodes", "5"]
    code, summary, err = call("ppo", *flags, "--run-dir", folder, monkeypatch=monkeypatch, capfd=capfd)
    assert code == 0, err
    whole = torch.load(folder / "checkpoint.pt", weights_only=True)
    recorded = share.read_run(folder, "mine")
    for with_training_state in (False, True):
        stage = tmp_path / f"stage-{with_training_state}"
        stage.mkdir()
        assert share.copy_checkpoint(recorded, stage, with_training_state) == 512
        kept = torch.load(stage / "checkpoint.pt", weights_only=True)
        left_out = set() if with_training_state else {"optimizer", "rng_state", "recent_returns"}
        assert set(whole) - set(kept) == left_out
        for name, weights in whole["agent"].items():
            assert torch.equal(kept["agent"][name], weights)
        shutil.copy(folder / "args.json", stage)
        code, again, err = call("ppo", "--evaluate", stage, monkeypatch=monkeypatch, capfd=capfd)
        assert code == 0, err
        assert again == summary.replace(str(folder), str(stage))
        resume = ["--resume", stage, "--total-timesteps", "1024"]
        code, _, err = call("ppo", *resume, monkeypatch=monkeypatch, capfd=capfd)
        if with_training_state:
            assert code == 0, err
        else:
            assert code == 2 and len(err.splitlines()) == 1 and "optimizer" in err


def test_what_only_a_training_needs():
    optimizer = {"state": {}, "param_groups": []}
    for name, part in {
        "optimizer": optimizer,
        "critic_adam": optimizer,
        "target": {},
        "memory": {"obs": 1},
        "rng_state": 1,
    }.items():
        assert share.for_training(name, part), name
    for name, part in {"agent": {"state": 1}, "global_step": 1, "extra": {}, "normalizer": {}}.items():
        assert not share.for_training(name, part), name


def test_the_card_is_what_the_leaderboard_reads(home, hub, tool, algos):
    """The course's leaderboard takes the first metric of the first result apart at +/-."""
    tool(fake_run(home / "run"), "--repo-id", REPO)
    card = hub.files(REPO)["README.md"].decode()
    _, front, text = card.split("---\n", 2)
    metadata = yaml.safe_load(front)
    result = metadata["model-index"][0]["results"][0]
    mean, std = result["metrics"][0]["value"].split("+/-")
    assert (float(mean), float(std)) == (5.0, 1.5) and result["metrics"][0]["type"] == "mean_reward"
    assert result["dataset"] == {"type": "CartPole-v1", "name": "CartPole-v1"}
    assert result["task"]["type"] == "reinforcement-learning"
    assert metadata["library_name"] and {"CartPole-v1", "fake", "reinforcement-learning"} <= set(
        metadata["tags"]
    )
    said = ("5.00 ± 1.50", "3 episodes", "seed 1", "10 steps", f"--load {REPO}", "| numpy | 2.4.6 |")
    for words in (*said, "Pretends to have learned: a fake for tests.", "replay.mp4", "`--resume` goes on"):
        assert words in text, words
    assert "python algos/fake.py --env-id CartPole-v1 --sizes 64 32 --seed 1\n" in text
    assert "second paragraph" not in text


@pytest.mark.parametrize(
    "settings, wanted",
    [
        ({"env_id": "Taxi-v4"}, "Taxi-v4"),
        ({"env_id": "pybullet_envs_gymnasium:AntBulletEnv-v0"}, "AntBulletEnv-v0"),
        ({"env_id": "FrozenLake-v1", "env_kwargs": None}, "FrozenLake-v1-4x4-no_slippery"),
        ({"env_id": "FrozenLake-v1", "env_kwargs": '{"map_name": "8x8"}'}, "FrozenLake-v1-8x8"),
        ({"env_id": "FrozenLake-v1", "env_kwargs": "{}"}, "FrozenLake-v1-4x4"),
    ],
)
def test_environments_are_called_as_on_the_leaderboard(settings, wanted):
    assert share.leaderboard_name(settings) == wanted


@pytest.mark.parametrize("name", copy_block.SCRIPTS)
def test_the_command_on_the_card_gives_the_same_settings(name, monkeypatch):
    """Once with the defaults, once with every setting changed; the script itself reads the command."""
    module = importlib.import_module(name)
    plain = json.loads(json.dumps(asdict(module.Args())))  # as args.json has it
    changed = {}
    for key, value in plain.items():
        if isinstance(value, bool):
            changed[key] = not value
        elif isinstance(value, int | float):
            changed[key] = value + 1
        elif isinstance(value, list):
            changed[key] = [*value, 7]
        elif "float" in str(module.Args.__dataclass_fields__[key].type):
            changed[key] = -0.5
        elif "kwargs" in key:
            changed[key] = '{"two": "words"}'
    changed |= {"env_id": "Some/Game-v1"} | {key: plain[key] for key in share.LOCAL if key in plain}
    for settings in (plain, plain | changed):
        python, script, *flags = shlex.split(share.command_line(Path(module.__file__), settings))
        assert (python, script) == ("python", f"algos/{name}.py")
        monkeypatch.setattr(sys, "argv", [script, *flags])
        assert json.loads(json.dumps(asdict(module.parse_args()))) == settings
        words = {word for word in flags if word.startswith("--")}
        assert settings != plain or words == {"--env-id", "--seed"} | words & {"--cuda", "--no-cuda"}


def test_a_film_is_made_if_there_is_none_or_an_old_one(home, hub, tool):
    folder = fake_run(home / "run")
    tool(folder, "--repo-id", REPO)
    assert hub.files(REPO)["replay.mp4"] == b"replay.mp4", "it is newer than the checkpoint"
    os.utime(folder / "replay.mp4", (1, 1))
    tool(folder, "--repo-id", REPO)
    assert hub.files(REPO)["replay.mp4"] == b"a film" == (folder / "replay.mp4").read_bytes()


def test_an_interruption_leaves_no_half_film(home, hub, tool, monkeypatch):
    """The next share would take it, for it is newer than the checkpoint."""
    folder = fake_run(home / "run")
    os.utime(folder / "replay.mp4", (1, 1))
    copy = shutil.copyfile

    def broken_off(source, target):
        if Path(target).parent == folder:
            Path(target).write_bytes(b"a fi")
            raise KeyboardInterrupt
        return copy(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", broken_off)
        patch.setattr(sys, "argv", ["share.py", str(folder), "--repo-id", REPO])
        patch.setenv("HF_TOKEN", hub_server.TOKEN)
        with pytest.raises(SystemExit):
            share.main()
    assert (folder / "replay.mp4").read_bytes() == b"replay.mp4"
    assert (folder / "replay.mp4").stat().st_mtime == 1
    assert not (folder / "tmp-replay.mp4").exists()
    tool(folder, "--repo-id", REPO)
    assert hub.files(REPO)["replay.mp4"] == b"a film" == (folder / "replay.mp4").read_bytes()


@pytest.mark.parametrize("name", ["replay.mp4", "tmp-replay.mp4", "policy.png", "events.out.tfevents.1.link"])
def test_a_run_with_a_link_is_refused(name, home, hub, tool):
    """A run folder from somebody else may hold links: where they lead must neither go nor be overwritten."""
    folder = fake_run(home / "run")
    (home / "diary").write_text("mine")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(home / "diary")
    os.utime(home / "diary", (1, 1))
    assert f"{name} in {folder} is a link" in tool(folder, "--repo-id", REPO, code=2)
    assert (home / "diary").read_text() == "mine" and (folder / name).is_symlink()
    assert not hub.repositories


def test_the_page_goes_with_the_command_of_the_card(home, hub, tool):
    """Else it would have the command as it was typed, with all paths. What is played stays byte for byte."""
    folder = fake_run(home / "run")
    options = {"file": "/srv/My Project/alice-project/maze.txt", "<&>": "it's"}
    (folder / "args.json").write_text(json.dumps(ARGS | {"sizes": [json.dumps(options)]}))
    typed = shlex.join(["python", "algos/fake.py", "--sizes", json.dumps(options)])
    played = {
        "pictures": ["UklGR/abc+/def//x==", "/9j/4AAQ"],
        "charts": [{"title": "V(s)", "x": [0.1, None]}],
    }
    before = page(command=typed[:2000], map={"tiles": ["/srv/alice/x", "·"]})
    assert "alice-project" in before
    text = before.replace('"episodes":[]', '"episodes":' + json.dumps([played], separators=(",", ":")))
    (folder / "replay.html").write_text(text)
    tool(folder, "--repo-id", REPO)
    sent = hub.files(REPO)["replay.html"].decode()
    assert "alice" not in sent and "/srv" not in sent
    data = page_data(sent)
    assert data["command"] in hub.files(REPO)["README.md"].decode()
    assert json.loads(shlex.split(data["command"])[-3]) == {"file": "maze.txt", "<&>": "it's"}
    assert data["episodes"] == [played] and data["map"] == {"tiles": ["x", "·"]}
    (block,) = re.findall(r'class="run">(.*?)</script>', sent, re.S)
    (block_before,) = re.findall(r'class="run">(.*?)</script>', text, re.S)
    assert not {"<", "&"} & set(block), "nothing in it can end the script tag"
    assert sent.replace(block, "") == text.replace(block_before, ""), "all else is as it was"


def test_a_page_without_paths_stays_byte_for_byte(home, hub, tool):
    folder = fake_run(home / "run")
    (folder / "replay.html").write_text(
        page(command="python algos/fake.py --env-id CartPole-v1 --sizes 64 32 --seed 1", score="5 ± 1 <&>")
    )
    tool(folder, "--repo-id", REPO)
    assert hub.files(REPO)["replay.html"] == (folder / "replay.html").read_bytes()
    assert not tool.told


@pytest.mark.parametrize("kind", ["old", "of two runs", "of another hand", "damaged", "no object", "no text"])
def test_a_page_that_shows_something_else_stays_here(kind, home, hub, tool):
    """One from before the last training would stand beside the new score."""
    folder = fake_run(home / "run")
    text = page()
    two = re.sub(r"<script type=.*?</script>", lambda block: block[0] + block[0], text, flags=re.S)
    shown = {"of two runs": two, "of another hand": "<p>/srv/alice", "damaged": text.replace('{"name"', "{")}
    shown |= {"no object": re.sub(r'class="run">.*?<', 'class="run">[]<', text)}
    (folder / "replay.html").write_bytes(shown.get(kind, text).encode() + b"\xff" * (kind == "no text"))
    if kind == "old":
        os.utime(folder / "replay.html", (1, 1))
    tool(folder, "--repo-id", REPO)
    assert "replay.html" not in hub.files(REPO)
    (line,) = tool.told
    wanted = "is older than q_table.npz" if kind == "old" else "is not as watch.py writes it"
    assert wanted in line and f"watch.py {folder}" in line


def test_without_a_film_a_run_goes_all_the_same(home, hub, tool):
    folder = fake_run(home / "run")
    (folder / "replay.mp4").unlink()
    tool(folder, "--repo-id", REPO, FAKE="film")
    assert not any(name.endswith(".mp4") for name in hub.files(REPO)), "nor half of one"
    assert b"replay.mp4" not in hub.files(REPO)["README.md"]


@pytest.mark.parametrize("wrong, code, words", [("score", 1, "4.00"), ("evaluate", 2, "cannot use it")])
def test_a_score_that_is_not_true_goes_nowhere(wrong, code, words, home, hub, tool):
    folder = fake_run(home / "run")
    error = tool(folder, "--repo-id", REPO, code=code, FAKE=wrong)
    assert words in error and refused_before_any_request(hub)
    tool(folder, "--repo-id", REPO, "--no-check", FAKE=wrong)
    assert REPO in hub.repositories


def test_the_scripts_are_told_which_module_is_allowed(home, hub, tool, algos):
    told = 'if "--env-id" in sys.argv: folder.joinpath("replay.mp4").write_text(" ".join(sys.argv[3:]))\n'
    (algos / "fake.py").write_text(FAKE + told)
    folder = fake_run(home / "run")
    (folder / "replay.mp4").unlink()
    tool(folder, "--repo-id", REPO, "--env-id", "theirs:CartPole-v1", "--no-check")
    assert b"--env-id theirs:CartPole-v1" in hub.files(REPO)["replay.mp4"]


def test_a_script_may_print_much(tmp_path):
    """More than a pipe holds: the script would wait for a reader of stdout, this tool for its stderr."""
    code = "import sys; print('x' * 200_000); print('bar 1', file=sys.stderr); print('the last line')"
    tell = "import sys, share; print(share.start([sys.executable, '-c', sys.argv[1]]))"
    command = [sys.executable, "-c", tell, code]
    ended = subprocess.run(command, cwd=TOOLS, capture_output=True, text=True, timeout=60)
    assert ended.stdout == "(0, 'the last line', 'bar 1')\n", ended.stderr


def test_results_of_another_step_go_nowhere(home, hub, tool):
    error = tool(fake_run(home / "r", global_step=9), "--repo-id", REPO, code=2)
    assert "--resume" in error and refused_before_any_request(hub)


def test_a_dry_run_sends_nothing_and_leaves_its_folder(home, hub, tool):
    folder = fake_run(home / "run")
    out = tool(folder, "--repo-id", REPO, "--dry-run", token="")
    assert refused_before_any_request(hub)
    stage = Path(out.splitlines()[-1].rpartition(": ")[2])
    listed = {line.split()[-1]: int(line.split()[0].replace(",", "")) for line in out.splitlines()[:-1]}
    assert listed == {path.name: path.stat().st_size for path in stage.iterdir()}
    assert {"README.md", "fake.py", "replay.html", "policy.png"} <= set(listed) and "notes.txt" not in listed


def test_another_run_replaces_the_first_and_leaves_what_is_not_ours(home, hub, tool):
    hub.create(REPO, files={"thoughts.md": b"mine", "checkpoint.pt": b"old", "replay.html": b"old"})
    hub.commit(
        REPO, hub.repositories[REPO].commits[-1][1] | {"events.out.tfevents.9.0": (hub.keep(b"o"), False)}
    )
    folder = fake_run(home / "run")
    (folder / "replay.html").unlink()
    tool(folder, "--repo-id", REPO)
    files = hub.files(REPO)
    assert files["thoughts.md"] == b"mine" and "q_table.npz" in files
    assert not {"checkpoint.pt", "replay.html", "events.out.tfevents.9.0"} & set(files)
    assert len(hub.repositories[REPO].commits) == 3


# ---- What the Hub may do ----

PASSING = [
    Fault("POST", "/repos/create", 500),
    Fault("POST", "/repos/create", "stall"),
    Fault("POST", "/repos/create", "lost"),
    Fault("POST", "/validate-yaml", 503),
    Fault("GET", "/api/models", "stall"),
    Fault("POST", "/preupload/", 500),
    Fault("POST", "/preupload/", "cut"),
    Fault("POST", "/objects/batch", "stall"),
    Fault("PUT", "/lfs/", 500),
    Fault("PUT", "/lfs/", "stall"),
    Fault("PUT", "/lfs/", "cut", times=2),
    Fault("POST", "/verify", 429),
    Fault("POST", "/commit/", 409),
    Fault("POST", "/commit/", 500),
    Fault("POST", "/commit/", "stall"),
    Fault("POST", "/commit/", "lost"),
    Fault("POST", "/commit/", "cut"),
]


@pytest.mark.parametrize("fault", PASSING, ids=lambda fault: f"{fault.method} {fault.path} {fault.kind}")
def test_a_fault_that_passes_leaves_one_whole_commit(fault, home, hub, tool):
    """Also where the answer to the commit was lost: it is not made twice."""
    hub.faults.append(Fault(fault.method, fault.path, fault.kind, fault.times))
    folder = fake_run(home / "run")
    tool(folder, "--repo-id", REPO, "--no-check", "--timeout", "0.6")
    assert not hub.faults[0].times, "the fault was met"
    assert len(hub.repositories[REPO].commits) == 2
    files = hub.files(REPO)
    assert files["q_table.npz"] == (folder / "q_table.npz").read_bytes() and len(files) == 10


@pytest.mark.parametrize(
    "fault, words",
    [
        (Fault("POST", "/repos/create", "stall", 99), "does not answer in time"),
        (Fault("POST", "/preupload/", "stall", 99), "does not answer in time"),
        (Fault("PUT", "/lfs/", "stall", 99), "does not answer in time"),
        (Fault("POST", "/commit/", 500, 99), "500"),
        (Fault("GET", "/api/models", "cut", 99), "cannot reach"),
        (Fault("POST", "/commit/", 409, 99), "409"),
        (Fault("POST", "/repos/create", 404, 99), "404"),
        (Fault("POST", "/repos/create", 400, 99), "400"),
        (
            Fault(
                "POST",
                "/repos/create",
                409,
                10**6,
                "Cannot create repo: another conflicting operation is in progress",
            ),
            "more than 50 requests",
        ),
    ],
    ids=lambda value: f"{value.path} {value.kind}" if isinstance(value, Fault) else "",
)
def test_a_fault_that_stays_is_one_line_in_a_bounded_time(fault, words, home, hub, tool, monkeypatch):
    hub.faults.append(fault)
    code = 2 if words in ("404", "400") or "requests" in words else 1
    timeout = 0.2 if fault.kind == "stall" else 30
    arguments = [fake_run(home / "run"), "--repo-id", REPO, "--no-check", "--timeout", timeout]
    if "requests" in words:
        monkeypatch.setattr(share, "MAX_REQUESTS", 50)
    begun = time.monotonic()
    assert words in tool(*arguments, code=code)
    assert time.monotonic() - begun < 30
    assert REPO not in hub.repositories or len(hub.repositories[REPO].commits) == 1


@pytest.mark.parametrize("patience, tries", [(120, 3), (0, 1)])
def test_no_try_is_begun_when_the_patience_is_at_its_end(patience, tries, home, hub, tool, monkeypatch):
    monkeypatch.setattr(share, "PATIENCE", patience)
    hub.faults.append(Fault("POST", "/repos/create", 500, 99))
    tool(fake_run(home / "run"), "--repo-id", REPO, "--no-check", code=1)
    assert hub.requests == [("POST", "/api/repos/create")] * tries


def test_a_second_try_finishes_the_same_upload(home, hub, tool):
    """The first command ends when one of three large files has arrived; the second sends the other two."""
    arguments = [fake_run(home / "run"), "--repo-id", REPO, "--no-check"]
    hub.faults += [Fault("POST", "/verify", 400, times=99)]
    assert "400" in tool(*arguments, code=2)
    arrived = {path for method, path in hub.requests if method == "PUT"}
    assert arrived and len(hub.repositories[REPO].commits) == 1
    hub.faults.clear()
    hub.requests.clear()
    tool(*arguments)
    assert not arrived & {path for method, path in hub.requests if method == "PUT"}
    assert len(hub.repositories[REPO].commits) == 2 and len(hub.files(REPO)) == 10
    tool(*arguments)
    assert len(hub.repositories[REPO].commits) == 2, "the same again is no commit"


def test_large_files_go_in_parts(home, hub, tool):
    folder = fake_run(home / "run")
    film = np.random.default_rng(0).bytes(hub_server.PART_BYTES * 2 + 5)
    (folder / "replay.mp4").write_bytes(film)
    hub.faults.append(Fault("PUT", "/2", "cut"))
    tool(folder, "--repo-id", REPO, "--no-check")
    assert hub.files(REPO)["replay.mp4"] == film
    hub.faults.append(Fault("GET", "/cdn/", "cut", times=3))
    tool("--load", REPO)
    assert (home / "work" / "runs" / "me--agent" / "replay.mp4").read_bytes() == film


@pytest.mark.parametrize(
    "token, repo_id, words",
    [
        ("", REPO, "hf auth login"),
        ("hf_wrong", REPO, "401"),
        (hub_server.READ_TOKEN, REPO, "403"),
        (hub_server.TOKEN, "you/agent", "403"),
    ],
)
def test_without_the_right_to_write_there_is_one_line(token, repo_id, words, home, hub, tool):
    arguments = [fake_run(home / "run"), "--repo-id", repo_id, "--no-check"]
    assert words in tool(*arguments, code=2, token=token)
    assert not hub.repositories and refused_before_any_request(hub) == (not token)


def test_the_login_of_the_hubs_own_command_will_do(home, hub, tool, monkeypatch):
    """`hf auth login` leaves the token in a file; there, too, it is a secret that must not go."""
    import huggingface_hub

    file = home / "login"
    file.write_text(hub_server.TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(file))
    folder = fake_run(home / "run")
    tool(folder, "--repo-id", REPO, token="")
    assert len(hub.repositories[REPO].commits) == 2
    (folder / "replay.html").write_text(page(name=hub_server.TOKEN))
    assert "replay.html holds your token" in tool(folder, "--repo-id", REPO, token="", code=2)
    assert len(hub.repositories[REPO].commits) == 2


def test_nobody_there_or_offline_is_one_line(home, hub, tool, monkeypatch):
    import huggingface_hub

    arguments = [fake_run(home / "run"), "--repo-id", REPO, "--no-check"]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in tool(*arguments, code=2)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert refused_before_any_request(hub)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", nobody)
    assert "cannot reach the Hub" in tool(*arguments, code=1)


def test_private_stays_private(home, hub, tool):
    arguments = [fake_run(home / "run"), "--no-check", "--private", "--repo-id"]
    tool(*arguments, "me/hidden")
    assert hub.repositories["me/hidden"].private
    tool(*arguments, "me/hidden")  # a second time, too
    hub.create("me/open")
    assert "is public" in tool(*arguments, "me/open", code=2)
    assert len(hub.repositories["me/open"].commits) == 1
    hub.faults.append(Fault("GET", "/me/open", 500))
    assert "is public" in tool(*arguments, "me/open", code=2), "not to know it is not yet hidden"
    assert len(hub.repositories["me/open"].commits) == 1 and not hub.faults[0].times
    tool("--load", "me/hidden")
    assert "no such repository" in tool("--load", "me/hidden", code=2, token="")


def test_ctrl_c_while_the_hub_hangs(home, hub):
    hub.faults.append(Fault("GET", "/api/models", "stall", 99))
    process = start(home, hub, "tools/share.py", "--load", REPO)
    while not hub.requests and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = finish(process, code=130)
    assert len(err.splitlines()) == 1 and os.listdir(home / "work" / "runs") == []


# ---- What comes ----


def stored(home: Path, **changes) -> dict[str, bytes]:
    """The files of a shared run as a stranger could have put them there."""
    folder = fake_run(home / "theirs", **changes)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    shutil.rmtree(folder)
    return files


def test_only_data_is_fetched(home, hub, tool):
    files = stored(home) | {"ppo.py": b"raise SystemExit", "sub/args.json": b"{}", "README.md": b"x"}
    hub.create(REPO, files=files | {"events.out.tfevents.1/x": b"", "sitecustomize.py": b"raise SystemExit"})
    out = tool("--load", REPO)
    folder = home / "work" / "runs" / "me--agent"
    assert str(folder.relative_to(home / "work")) in out
    events = f"events.out.tfevents.1763740000.{HOST}.77.0"
    names = {"args.json", "results.json", "q_table.npz", "replay.mp4", "policy.png", events}
    assert {path.name for path in folder.iterdir()} == names
    assert sorted(os.listdir(home / "work" / "runs")) == ["me--agent"], "nothing else is left behind"
    bodies = {
        path.rpartition("/")[2] for method, path in hub.requests if method == "GET" and "/resolve/" in path
    }
    assert bodies == {name for name in names if not name.endswith(hub_server.LARGE)}
    assert (folder / "replay.mp4").read_bytes() == b"replay.mp4"
    assert folder.stat().st_mode & 0o055, "others may read it, as other runs"


def test_their_settings_become_ours(home, hub, tool):
    theirs = {"run_dir": "/etc", "resume": "/etc", "track": True, "wandb_entity": "theirs", "file": "/etc/x"}
    files = stored(home) | {"args.json": json.dumps(ARGS | theirs).encode()}
    hub.create(REPO, files=files)
    tool("--load", REPO)
    settings = json.loads((home / "work" / "runs" / "me--agent" / "args.json").read_text())
    wanted = {"run_dir": None, "resume": None, "track": False, "wandb_entity": None, "file": "x"}
    assert settings == ARGS | wanted | {"capture_video": False}


def test_a_foreign_module_is_named_and_not_allowed(home, hub, tool):
    """The commands to paste do not allow it."""
    files = stored(home, env_id="theirs:Task-v0")
    files["args.json"] = json.dumps(ARGS | {"env_id": "theirs:Task-v0"}).encode()
    hub.create(REPO, files=files)
    _, warning, *commands = tool("--load", REPO).splitlines()
    assert "module theirs" in warning and "--env-id theirs:Task-v0" in warning
    assert len(commands) == 2 and not any("theirs" in command for command in commands)


def test_revisions_folders_and_names(home, hub, tool, algos):
    files = stored(home)
    hub.create(REPO, files=files)
    first = hub.repositories[REPO].commits[0][0]
    hub.commit(REPO, hub.repositories[REPO].commits[0][1] | {"replay.mp4": (hub.keep(b"newer"), True)})
    runs = home / "work" / "runs"
    tool("--load", REPO)
    tool("--load", f"{REPO}@{first}")
    assert (runs / "me--agent" / "replay.mp4").read_bytes() == b"newer"
    assert (runs / "me--agent-2" / "replay.mp4").read_bytes() == b"replay.mp4"
    tool("theirs/run", "--load", REPO)
    assert (home / "work" / "theirs" / "run" / "args.json").exists()
    assert "exists already" in tool("theirs/run", "--load", REPO, code=2)
    assert "not this revision" in tool("--load", f"{REPO}@nowhere", code=2)
    assert "no such repository" in tool("--load", "me/nothing", code=2)


NESTED = json.loads("[" * 600 + "]" * 600)
BAD_RUNS = {
    "a name that leaves the folder": {"../evil": b"x"},
    "a name from the root": {"/tmp/evil": b"x"},
    "no arguments": {"args.json": None},
    "no results": {"results.json": None},
    "no checkpoint": {"q_table.npz": None},
    "two checkpoints": {"checkpoint.pt": b"x"},
    "no JSON": {"args.json": b"{"},
    "no object": {"results.json": b"[]"},
    "deep JSON": {"args.json": b"[" * 100_000},
    # Python 3.12 goes deeper, and takes it.
    **({"JSON nearly too deep": {"args.json": {"x": NESTED}}} if sys.version_info < (3, 12) else {}),
    "a path that no system has": {"args.json": {"x": "~\0"}},
    "long JSON": {"args.json": {"x": "x" * 1_000_001}},
    "bytes": {"results.json": b"\xff\xfe\x00"},
    "an unknown script": {"results.json": {"algo": "theirs"}},
    "a script elsewhere": {"results.json": {"algo": "../project/algos/fake"}},
    "a script in a folder": {"results.json": {"algo": "sub/fake"}},
    "no score": {"results.json": {"mean_reward": "5"}},
    "a terminal's codes": {"results.json": {"env_id": "\x1b[2J"}, "args.json": {"env_id": "\x1b[2J"}},
    "two environments": {"args.json": {"env_id": "Taxi-v4"}},
    "no versions": {"args.json": {"versions": None}},
}


@pytest.mark.parametrize("case", BAD_RUNS)
def test_what_is_no_run_is_refused_in_one_line(case, home, hub, tool, algos):
    (algos / "sub").mkdir()
    (algos / "sub" / "fake.py").write_text("")
    files = stored(home)
    for name, change in BAD_RUNS[case].items():
        if isinstance(change, dict):
            change = json.dumps(json.loads(files[name]) | change).encode()
        files[name] = change
    hub.create(REPO, files={name: data for name, data in files.items() if data is not None})
    error = tool("--load", REPO, code=2)
    assert "\x1b" not in error
    left = [path for path in home.rglob("*") if path.is_file() and "hub-cache" not in path.parts]
    assert not left and not (home.parent / "evil").exists() and not Path("/tmp/evil").exists()


def test_more_than_a_gigabyte_is_refused_before_it_comes(home, hub, tool):
    hub.create(REPO, files=stored(home))
    hub.sizes["replay.mp4"] = 999_999_900
    assert "more than 1,000,000,000" in tool("--load", REPO, code=2)
    assert not [path for method, path in hub.requests if method == "GET" and "/cdn/" in path]
    hub.sizes["replay.mp4"] = len("replay.mp4")
    hub.sizes["other.bin"] = 10**12  # what is not fetched does not count
    hub.commit(REPO, hub.repositories[REPO].commits[0][1] | {"other.bin": (hub.keep(b"x"), True)})
    tool("--load", REPO)


@pytest.mark.parametrize(
    "fault",
    [Fault("GET", "/api/models", "stall"), Fault("HEAD", "/resolve/", 500), Fault("GET", "/cdn/", "stall")],
)
def test_a_download_bears_faults_that_pass(fault, home, hub, tool):
    hub.create(REPO, files=stored(home))
    hub.faults.append(fault)
    tool("--load", REPO, "--timeout", "0.6")
    assert not fault.times and (home / "work" / "runs" / "me--agent" / "q_table.npz").exists()


def test_a_hub_that_stays_silent_ends_a_download(home, hub, tool):
    hub.create(REPO, files=stored(home))
    hub.faults.append(Fault("GET", "/tree/", "stall", 99))
    assert "in time" in tool("--load", REPO, "--timeout", "0.2", code=1)
    assert os.listdir(home / "work" / "runs") == []


def test_a_checkpoint_that_is_a_trap_is_never_opened(home, hub, tool):
    import pickle

    class Bomb:
        def __reduce__(self):
            return Path.touch, (home / "exploded",)

    hub.create(REPO, files=stored(home) | {"q_table.npz": pickle.dumps(Bomb())})
    tool("--load", REPO)
    again = fake_run(home / "mine")
    (again / "q_table.npz").write_bytes(pickle.dumps(Bomb()))
    assert "cannot use" in tool(again, "--repo-id", "me/mine", code=2)
    (again / "q_table.npz").unlink()
    import torch

    torch.save({"global_step": 10, "agent": Bomb()}, again / "checkpoint.pt")
    assert "cannot use" in tool(again, "--repo-id", "me/mine", code=2)
    assert not (home / "exploded").exists()


# ---- The command line ----


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["RUN"],
        ["--repo-id", REPO],
        ["RUN", "--repo-id", "agent"],
        ["RUN", "--repo-id", "a/b/c"],
        ["RUN", "--repo-id", "me/a@main"],
        ["RUN", "--repo-id", "me/a--b"],
        ["RUN", "--repo-id", "me/a..b"],
        ["RUN", "--repo-id", "me/-a"],
        ["RUN", "--repo-id", "me/" + "a" * 97],
        ["RUN", "--repo-id", "mé/a"],
        ["RUN", "--repo-id", REPO, "--timeout", "nan"],
        ["RUN", "--repo-id", REPO, "--timeout", "0"],
        ["RUN", "--repo-id", REPO, "--no-such-flag"],
        ["nowhere", "--repo-id", REPO],
        ["--load", "agent"],
        ["--load", ""],
        ["--load", REPO, "--repo-id", REPO],
        ["--load", REPO, "--dry-run"],
        ["--load", REPO, "--no-check"],
    ],
    ids=" ".join,
)
def test_what_cannot_work_is_one_line(argv, home, hub, tool):
    fake_run(home / "work" / "RUN")
    before = sorted(path.name for path in (home / "work" / "RUN").iterdir())
    os.utime(home / "work" / "RUN" / "replay.mp4", (1, 1))
    tool(*argv, code=2)
    assert not hub.requests and not list(home.parent.glob("share-*"))
    assert (home / "work" / "RUN" / "replay.mp4").stat().st_mtime == 1, "before any work"
    assert sorted(path.name for path in (home / "work" / "RUN").iterdir()) == before


def test_an_unfinished_run_has_nothing_to_share(home, hub, tool):
    folder = fake_run(home / "run")
    (folder / "results.json").unlink()
    assert "--resume" in tool(folder, "--repo-id", REPO, code=2)
    (folder / "q_table.npz").unlink()
    assert "no run folder" in tool(folder, "--repo-id", REPO, code=2)


def test_help_is_quick(capsys, monkeypatch):
    """What is slow to import is not needed for it."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import share; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code, str(TOOLS)], capture_output=True, text=True
    ).stdout.split()
    assert not {"torch", "huggingface_hub", "numpy", "httpx2"} & set(loaded)
    monkeypatch.setattr(sys, "argv", ["share.py", "--help"])
    with pytest.raises(SystemExit) as stopped:
        share.main()
    out = capsys.readouterr().out
    assert stopped.value.code == 0
    for field in fields(share.Args):
        assert re.search(rf"--{field.name.replace('_', '-')}\b", out) or field.name == "run_dir"
