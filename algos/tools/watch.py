"""See what an agent thinks: plays evaluation episodes of a run folder and writes them as one HTML page.

A film shows what an agent does. The page shows, beside each picture, what the script's own networks or table
say at that moment: how likely each action is or what it is worth, what the critic expects, how new the place
is; below run curves over the whole episode. It is a single file without any request to a network: it opens
from a disk, from a phone, from an attachment.

Run: python algos/tools/watch.py RUN_DIR                  writes RUN_DIR/replay.html
     python algos/tools/watch.py RUN_A RUN_B              two runs side by side, writes RUN_A/compare.html
     python algos/tools/watch.py RUN_DIR --episodes 3 --open

On the page: space plays and stops, the arrow keys step, with Shift ten at once, Home and End jump, + and −
change the speed. A click into a curve goes there.

How a script is read. Everything goes through its own functions: its parse_args reads the folder, so a damaged
run, or one with other flags, ends as there, with one line and exit code 2, and make_envs and load_policy
play as in its films. How to ask its networks is in the table READERS below, with a few lines for each kind of
network. A script of a known shape needs one more line there, and a copy none: my_ppo is read as
ppo is while its load_policy is that of ppo. A run folder may come from a stranger: nothing of it is executed
or unpickled, a module that its env_id names is imported only if --env-id repeats it, and its words reach the
page as text only.

Words on the page
    moment                  a step that is shown, with its picture; the last one is where the episode ended
    discounted return       G_t = r_t + γ r_{t+1} + γ² r_{t+2} + …, what really followed, to compare with V(s)
    surprise                the TD error δ_t = r_t + γ V(s_{t+1}) − V(s_t): better or worse than expected
    entropy                 how open the choice is, in nats; −Σ π ln π, for deviations Σ ln σ √(2πe)

After a termination nothing follows. After a time limit more could: there V of the last state stands for what
would have come. Rewards count as the script learned from them: only their sign with --clip-rewards, nothing
beyond a lost life with --episodic-life, and nothing beyond a point with --restart-credit.
"""

import base64
import hashlib
import html
import importlib.util
import io
import json
import math
import os
import re
import shlex
import sys
import warnings
import webbrowser
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Annotated, NoReturn

import numpy as np
import tyro

ALGOS = Path(__file__).resolve().parents[1]
MAX_MOMENTS = 1200  # pictures of an episode; a longer one is thinned to every 2nd step, every 4th, …
MAX_BYTES = 8_000_000  # of the page; a larger one is thinned further
MAX_SIDE = 640  # pixels; larger pictures are made smaller
HIDDEN = {"run_dir", "resume", "evaluate", "capture_video", "track", "wandb_project_name", "wandb_entity"}


RunDirs = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR [RUN_DIR]")]


@dataclass(frozen=True)
class Args:
    run_dirs: RunDirs = ()  # one run folder, or two to put them side by side
    episodes: int = 1  # how many to play
    seed: int | None = None  # of start and chance; by default that of the (first) run, its evaluation's
    out: str | None = None  # by default replay.html in the folder, for two runs compare.html in the first
    open: bool = False  # show the page in the browser
    env_id: str | None = None  # allows a run whose environment is this module:id to import the module


@dataclass
class Watched:
    """A run folder, ready to play: its script, its arguments, one environment and what reads the networks."""

    folder: Path
    script: ModuleType
    args: object  # the script's own Args
    envs: object  # a vector of one environment, or in scripts for tables a plain one
    vector: bool
    look: object = None  # what the networks say: an observation to a dictionary, see READERS
    about: dict | None = None  # what the page says of the run

    def load_policy(self):
        """What acts, a function of observations to actions, and the checkpoint."""
        if self.vector:
            device = self.script.setup_torch(self.args)
            return self.script.load_policy(self.args, self.envs, self.folder, device)
        return self.script.load_policy(self.args, self.envs, self.folder)

    def reset(self, seed: int):
        """A new episode: the observation and info."""
        return self.envs.reset(seed=[seed] if self.vector else seed)

    def step(self, action):
        """Observation, reward, terminated, truncated, info; the middle three of the one environment."""
        obs, reward, terminated, truncated, info = self.envs.step(action)
        if self.vector:
            reward, terminated, truncated = reward[0], terminated[0], truncated[0]
        return obs, float(reward), bool(terminated), bool(truncated), info

    def render(self):
        """The picture of this moment, uint8 (height, width, 3)."""
        picture = self.envs.render()
        picture = picture[0] if self.vector and picture is not None else picture
        if picture is None:
            raise ValueError("the environment draws no pictures")
        return picture


# How the networks of each script are read. A reader gets script, args, environments, folder, checkpoint and
# returns a function: observation -> dictionary with some of these, all plain numbers:
#     probabilities (|A|,)            of the actions
#     q             (|A|,)            values of the actions
#     mean, sigma   (|A|,) each       of the parts of an action, where ±1 are its bounds
#     value                           what the critic expects: V(s), or max Q
#     asked                           the return that is asked for from now on
#     novelty                         of what is seen now
#     state                           index of the state, for maps


def read_table(script, args, env, folder, checkpoint):
    """q_learning, sarsa: a row of the table. Observations are integers."""
    table = checkpoint["q_table"]  # (|S|, |A|)

    def look(state):
        return {"q": table[state], "value": max(table[state]), "state": int(state)}

    return look


def load_agent(script, args, envs, folder):
    """The script's network with the weights of the run."""
    import torch

    agent = script.make_agent(args, envs, torch.device("cpu"))
    script.load_checkpoint(folder, agent=agent)
    return agent


def read_q_network(script, args, envs, folder, checkpoint):
    """dqn, dqn_atari: a network from observations (1, …) to values (1, |A|)."""
    import torch

    agent = load_agent(script, args, envs, folder)
    dtype = torch.uint8 if envs.single_observation_space.dtype == "uint8" else torch.float32

    @torch.inference_mode()
    def look(obs):
        q = agent(torch.as_tensor(obs, dtype=dtype))[0]  # (|A|,)
        return {"q": q.tolist(), "value": q.max().item()}

    return look


def read_pixels(script, args, envs, folder, checkpoint):
    """ppo_atari: one network from bytes (1, 4, 84, 84) to logits (1, |A|) and values (1,)."""
    import torch

    agent = load_agent(script, args, envs, folder)

    @torch.inference_mode()
    def look(obs):
        logits, values = agent(torch.as_tensor(obs))
        return {"probabilities": logits[0].softmax(-1).tolist(), "value": values.item()}

    return look


def read_softmax(script, args, envs, folder, checkpoint):
    """ppo, reinforce: a network for logits, another one for V(s), which reinforce may lack."""
    import torch

    agent = load_agent(script, args, envs, folder)

    @torch.inference_mode()
    def look(obs):
        x = torch.as_tensor(obs, dtype=torch.float32)
        x = agent.scale(obs) if hasattr(agent, "scale") else x
        said = {"probabilities": agent.actor(x)[0].softmax(-1).tolist()}
        if agent.critic is not None:
            said["value"] = agent.critic(x).item()
        return said

    return look


def read_curious(script, args, envs, folder, checkpoint):
    """rnd_ppo, icm_ppo: logits, two values; of rnd_ppo also how new the newest part of the observation is."""
    import torch

    agent = load_agent(script, args, envs, folder)

    @torch.inference_mode()
    def look(obs):
        x = torch.as_tensor(obs, dtype=torch.float32)
        logits, values = agent(x)  # (1, |A|), (1, 2): of the task and of novelty
        said = {"probabilities": logits[0].softmax(-1).tolist(), "value": values[0, 0].item()}
        if hasattr(agent, "novelty"):  # that of icm_ppo needs the next observation, too
            novelty = agent.novelty(x[:, -1:]) * agent.norm_past.scale  # as intrinsic reward
            said["novelty"] = novelty.item()
        return said

    return look


def read_gaussian(script, args, envs, folder, checkpoint):
    """a2c_continuous, ppo_continuous: mean and deviation of each part of the action."""
    import torch

    agent = load_agent(script, args, envs, folder)
    # With --norm-reward the critic learned rewards in another unit: back to the environment's.
    unit = 1 / agent.norm_return.scale.item() if args.norm_reward else 1.0

    @torch.inference_mode()
    def look(obs):
        x = agent.norm_obs(torch.as_tensor(obs, dtype=torch.float32))
        features = agent.features(x)
        said = {"mean": agent.mean(features)[0].tolist(), "sigma": agent.noise.std(features)[0].tolist()}
        return said | {"value": agent.critic(x).item() * unit}

    return look


def read_transformer(script, args, envs, folder, checkpoint):
    """decision_transformer: what it is asked for, and its logits or actions in view of the last K steps."""
    import torch

    agent = load_agent(script, args, envs, folder).eval()
    wish = args.target_returns[0] if args.target_returns else math.nan
    player = script.Player(agent, torch.tensor([wish]))  # it remembers the episode, as the one that acts does
    outputs = []
    agent.register_forward_hook(lambda module, inputs, output: outputs.append(output))

    def look(obs):
        outputs.clear()
        player.act(obs, np.zeros(1, dtype=np.int64))
        output = outputs[0][0, -1]  # (1, K, |A|) -> (|A|,), of the present step
        said = {"probabilities": output.softmax(-1)} if agent.discrete else {"mean": output}
        said = {name: numbers.tolist() for name, numbers in said.items()}
        now = int(player.filled[0]) - 1
        return said | ({"asked": player.to_go[0, now].item()} if args.condition else {})

    return look


READERS = {
    "q_learning": read_table,
    "sarsa": read_table,
    "dqn": read_q_network,
    "dqn_atari": read_q_network,
    "reinforce": read_softmax,
    "ppo": read_softmax,
    "ppo_atari": read_pixels,
    "rnd_ppo": read_curious,
    "icm_ppo": read_curious,
    "a2c_continuous": read_gaussian,
    "ppo_continuous": read_gaussian,
    "decision_transformer": read_transformer,
}
ACTIONS = {  # names of actions where the environment does not know them, by the beginning of its id
    "Acrobot": ["torque −1", "no torque", "torque +1"],
    "BipedalWalker": ["hip 1", "knee 1", "hip 2", "knee 2"],
    "Blackjack": ["stick", "hit"],
    "CartPole": ["push left", "push right"],
    "CliffWalking": ["up", "right", "down", "left"],
    "FrozenLake": ["left", "down", "right", "up"],
    "LunarLander-": ["nothing", "left engine", "main engine", "right engine"],
    "LunarLanderContinuous": ["main engine", "side engines"],
    "MountainCar-": ["push left", "nothing", "push right"],
    "MountainCarContinuous": ["force"],
    "Pendulum": ["torque"],
    "Pixelcopter": ["climb", "fall"],
    "Pyramids": ["nothing", "forward", "backward", "turn right", "turn left"],
    "Taxi": ["south", "north", "east", "west", "pick up", "drop off"],
}


def fail(message: str, code: int = 2) -> NoReturn:
    """End with one line on stderr; exit code 2 means bad input."""
    print("error: " + " ".join(message.split())[:400], file=sys.stderr)
    raise SystemExit(code)


def read_command_line() -> Args:
    """tyro's reading of the command line; what it cannot read ends with one line and exit code 2."""
    errors = io.StringIO()
    try:
        with redirect_stderr(errors):
            args = tyro.cli(Args, description=__doc__)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        fail("".join(letter for letter in errors.getvalue() if not "─" <= letter <= "╿"))
    if len(args.run_dirs) not in (1, 2):
        fail(f"one run folder, or two to put them side by side, not {len(args.run_dirs)}")
    if not 1 <= args.episodes <= 100:
        fail(f"--episodes {args.episodes} is not between 1 and 100")
    if args.seed is not None and not 0 <= args.seed < 2**32:
        fail(f"--seed {args.seed} is not between 0 and {2**32 - 1:,}")
    return args


def page_path(args: Args) -> Path:
    """Where the page goes; refuses what cannot be written before any work."""
    name = "replay.html" if len(args.run_dirs) == 1 else "compare.html"
    path = Path(args.out or Path(args.run_dirs[0]) / name)
    if path.is_dir():
        fail(f"--out {path} is a folder: name a file")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        fail(f"cannot write {path}: its folder does not exist or is not writable")
    return path


def script_of(folder: Path) -> ModuleType:
    """The script that a run folder comes from, imported from the file in algos/ that has its name.

    results.json says which one it is, and for a run that has not ended the folder's name. Only the name is
    taken from the folder, never a path, and only scripts that stand in algos/ are imported.
    """
    if not folder.is_dir():
        fail(f"there is no folder {folder}")
    here = {path.stem for path in ALGOS.glob("*.py")}
    named = re.search(r"__(\w+?)__seed", folder.resolve().name)
    name = named[1] if named else None
    try:
        if (folder / "results.json").exists():
            name = json.loads((folder / "results.json").read_text())["algo"]
    except Exception as error:  # damaged files and foreign files fail in many ways
        fail(f"cannot use {folder / 'results.json'}: {type(error).__name__} {error}")
    if name is None:
        fail(f"{folder} does not say which script it is of: neither results.json nor ENV__SCRIPT__seed… does")
    if not isinstance(name, str) or name not in here:
        fail(f"{folder} is of a script {name!r} that does not stand in {ALGOS}")
    return load_script(name)


@cache
def load_script(name: str) -> ModuleType:
    """Import a script from its file in algos/."""
    spec = importlib.util.spec_from_file_location(f"algos.{name}", ALGOS / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script  # where tyro looks for the types of its Args
    spec.loader.exec_module(script)
    return script


def read_args(script: ModuleType, folder: Path, env_id: str | None):
    """The arguments of a run, read and checked by its own script; if they are bad, it ends with one line."""
    command = [script.__file__, "--evaluate", str(folder.resolve())]
    try:
        # The script asks for a stranger's module:id to be repeated; another environment is not wanted here.
        if env_id is not None and json.loads((folder / "args.json").read_text())["env_id"] == env_id:
            command += ["--env-id", env_id]
    except Exception as error:
        fail(f"{folder} is no run folder: {type(error).__name__} {error}")
    original = sys.argv
    sys.argv = command
    args = script.parse_args()
    sys.argv = original
    if hasattr(args, "cuda"):
        args = replace(args, cuda=False)  # one row at a time
    script.check_args(args)
    return args


def reader_of(name: str):
    """The reader of a script; a copy is read like its original, if its load_policy has the same text.

    For load_policy says how the networks are asked: where it differs, another reader would get wrong numbers.
    """

    def policy_text(script: str) -> str | None:
        path = ALGOS / f"{script}.py"
        found = (
            re.search(r"^def load_policy\(.*?\n(?=\S)", path.read_text(), re.S | re.M)
            if path.exists()
            else None
        )
        return found and found[0]

    originals = (
        [name] if name in READERS else [one for one in READERS if policy_text(one) == policy_text(name)]
    )
    if not originals:
        fail(f"{name}.py asks its networks in a way of its own: READERS in {__file__} needs a line for it")
    return READERS[originals[0]]


def open_run(folder: Path, args: Args, seed: int | None) -> Watched:
    """Read a run folder; make its environment and what reads its networks."""
    script = script_of(folder)
    run_args = read_args(script, folder, args.env_id)
    if seed is not None:
        run_args = replace(run_args, seed=seed)
    read = reader_of(Path(script.__file__).stem)
    vector = hasattr(script, "make_envs")
    make = script.make_envs if vector else script.make_env
    envs = make(run_args, 1, render_mode="rgb_array") if vector else make(run_args, render_mode="rgb_array")
    for env in getattr(envs.unwrapped, "envs", []):
        # MuJoCo's free camera loses a fast robot; a camera of the robot's model follows it.
        if hasattr(env.unwrapped, "mujoco_renderer") and env.unwrapped.model.ncam:
            env.unwrapped.mujoco_renderer.camera_id = 0
    run = Watched(folder, script, run_args, envs, vector)
    _, checkpoint = run.load_policy()
    run.look = read(script, run_args, envs, folder, checkpoint)
    run.about = describe(run, checkpoint)
    return run


def describe(run: Watched, checkpoint: dict) -> dict:
    """What the page says of a run. Words from the folder are plain strings, cut to a length."""
    saved = json.loads((run.folder / "args.json").read_text())
    name = Path(run.script.__file__).stem
    command = ["python", f"algos/{name}.py"]
    for field, default in asdict(run.script.Args()).items():
        value = saved[field] if field in saved else default
        flag = "--" + field.replace("_", "-")
        if field in HIDDEN or value == default:
            continue
        if isinstance(value, bool):
            command.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            command += [flag, *map(str, value if isinstance(value, list) else [value])]
    versions = saved["versions"] if isinstance(saved["versions"], dict) else {}
    return {
        "name": run.folder.resolve().name[:200],
        "algo": name,
        "env_id": run.args.env_id,
        "seed": int(saved["seed"]),
        "score": score_of(run.folder),
        "steps": int(checkpoint["global_step"]),
        "command": shlex.join(command)[:2000],
        "versions": {str(package)[:50]: str(number)[:50] for package, number in list(versions.items())[:20]},
        "actions": action_names(run.args.env_id, run.envs),
        "fps": float(run.envs.metadata.get("render_fps", 30)),
        "map": map_of(run, checkpoint),
    }


def score_of(folder: Path) -> str:
    """What the run's evaluation said, in words."""
    if not (folder / "results.json").exists():
        return "not evaluated yet"
    try:
        results = json.loads((folder / "results.json").read_text())
        mean, std, episodes = (results[name] for name in ("mean_reward", "std_reward", "eval_episodes"))
        return f"{float(mean):,.2f} ± {float(std):,.2f} over {int(episodes):,} episodes"
    except Exception as error:  # damaged files and foreign files fail in many ways
        fail(f"cannot use {folder / 'results.json'}: {type(error).__name__} {error}")


def action_names(env_id: str, envs) -> list[str]:
    """A name for each action, or for each part of an action: the environment's own, ours, or its number."""
    space = getattr(envs, "single_action_space", envs.action_space)
    number = int(space.n) if hasattr(space, "n") else space.shape[0]
    game = envs.unwrapped
    if hasattr(game, "ale"):  # Atari
        names = [action.name.lower() for action in game.ale.get_action_set()]
    else:
        game = game.envs[0].unwrapped if hasattr(game, "envs") else game
        title = re.sub(r"^.*[:/]", "", env_id)
        names = next((names for start, names in ACTIONS.items() if title.startswith(start)), [])
        if isinstance(getattr(game, "actions", None), type):  # MiniGrid
            names = [action.name for action in game.actions]
        elif hasattr(game, "model") and hasattr(game.model, "actuator"):  # MuJoCo
            names = [game.model.actuator(i).name for i in range(game.model.nu)]
        elif getattr(getattr(game, "robot", None), "ordered_joints", None):  # PyBullet
            names = [joint.joint_name for joint in game.robot.ordered_joints]
        if title.startswith("Graph-"):
            names = [f"to node {i}" for i in range(number)]
    return names if len(names) == number else [f"action {i}" for i in range(number)]


def map_of(run: Watched, checkpoint: dict) -> dict | None:
    """A grid world with the best action of each state and its value, all (rows, columns); or None."""
    tiles, arrows = run.script.tiles_of(run.envs) if hasattr(run.script, "tiles_of") else ([], "")
    if not len(tiles):
        return None
    rows, columns = tiles.shape
    best = []
    for row in checkpoint["q_table"][: rows * columns]:
        best.append("·" if max(row) == min(row) else arrows[row.index(max(row))])
    values = [max(row) for row in checkpoint["q_table"][: rows * columns]]
    return {"columns": columns, "tiles": tiles.ravel().tolist(), "arrows": best, "values": rounded(values)}


def rounded(values: list) -> list:
    """Numbers with five digits, as the page has them; what is no number becomes None."""
    return [None if v is None or not math.isfinite(v) else float(f"{v:.5g}") for v in values]


def encode(picture, lossless: bool) -> bytes:
    """A picture as WebP. picture: uint8 (height, width, 3)."""
    from PIL import Image

    image = Image.fromarray(picture)
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    how = {"lossless": True, "quality": 20} if lossless else {"quality": 60}
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", method=2, **how)
    return buffer.getvalue()


class Film:
    """The pictures of an episode, by step, encoded in the background. Long films keep every 2nd, 4th, …

    Pictures and not a video, because a browser shows a video's frames only nearly at the time asked for.
    """

    def __init__(self, pool: ThreadPoolExecutor, picture) -> None:
        self.pool = pool
        self.frames: dict[int, Future] = {}
        self.known: dict[tuple, Future] = {}  # the same pictures, by what is on them
        self.waiting: deque[Future] = deque()
        self.stride = 1
        # Drawings are small without loss; shaded bodies are not.
        self.lossless = len(encode(picture, True)) < 2 * len(encode(picture, False))

    def add(self, step: int, picture) -> None:
        """The picture after so many steps. One that comes again is not encoded again."""
        what = picture.shape, hashlib.sha256(picture.tobytes()).digest()
        if what not in self.known:
            self.known[what] = self.pool.submit(encode, picture, self.lossless)
            self.waiting.append(self.known[what])
            if len(self.waiting) > 32:  # or a slow encoder would fill the memory
                self.waiting.popleft().result()
        self.frames[step] = self.known[what]
        if len(self.frames) > MAX_MOMENTS:
            self.thin(2 * self.stride)

    def thin(self, stride: int) -> None:
        """Keep the steps that `stride` divides, and the last one."""
        self.stride = stride
        last = max(self.frames)
        kept = {step: frame for step, frame in self.frames.items() if step % stride == 0 or step == last}
        self.frames = kept
        shown = set(kept.values())  # the rest would fill the memory, too
        self.known = {what: frame for what, frame in self.known.items() if frame in shown}

    def size(self) -> int:
        """In bytes."""
        return sum(len(frame.result()) for frame in self.known.values())


def following_returns(rewards, ends, last_value, gamma):
    """The discounted return that really followed each step, G_t = r_t + γ G_{t+1}.

    rewards: T numbers. ends: T booleans, whether nothing counts after this step. last_value: what the last
    observation is worth, 0 after a termination. Returns T + 1 numbers; the last one is last_value.
    """
    returns = [last_value]
    for reward, end in zip(reversed(rewards), reversed(ends), strict=True):
        returns.append(reward if end else reward + gamma * returns[-1])
    return returns[::-1]


def entropy(said: dict) -> float | None:
    """How open the choice is, in nats: of probabilities, or of normal distributions; else None."""
    if "probabilities" in said:
        return -sum(p * math.log(p) for p in said["probabilities"] if p > 0)
    if "sigma" in said:  # differential entropy, which may be negative
        return sum(math.log(sigma * math.sqrt(2 * math.pi * math.e)) for sigma in said["sigma"])
    return None


def play(run: Watched, policy, seed: int, pool: ThreadPoolExecutor) -> dict:
    """Play one episode. Returns per step: what was said, done and earned; and the film.

    said has T + 1 entries, one for each observation with the last one; actions, rewards, learned, ends T.
    """
    args = run.args
    obs, info = run.reset(seed)
    picture = run.render()
    film = Film(pool, picture)
    film.add(0, picture)
    said, actions, rewards, learned, ends = [], [], [], [], []
    terminated = truncated = False
    while not (terminated or truncated) and len(rewards) < run.script.MAX_EVAL_STEPS:
        said.append(run.look(obs))  # before the step: some environments write the next observation over it
        action = policy(obs)
        lives = info.get("lives")
        obs, reward, terminated, truncated, info = run.step(action)
        actions.append(action[0] if run.vector else action)
        rewards.append(reward)
        # As the script learned from it.
        learned.append(float((reward > 0) - (reward < 0)) if getattr(args, "clip_rewards", False) else reward)
        end = terminated
        if getattr(args, "episodic_life", False):
            end = end or bool(info["lives"][0] < lives[0])
        if getattr(args, "restart_credit", False):
            end = end or reward != 0
        ends.append(end)
        ended = terminated or truncated or len(rewards) == run.script.MAX_EVAL_STEPS
        if ended or len(rewards) % film.stride == 0:
            film.add(len(rewards), run.render())
    said.append(run.look(obs))
    ended = "terminated" if terminated else "time limit" if truncated else "stopped"
    episode = {"said": said, "actions": actions, "rewards": rewards, "learned": learned, "ends": ends}
    return episode | {"film": film, "ended": ended, "seed": seed}


def curves(run: Watched, episode: dict) -> list[dict]:
    """The curves below the film, per step and with T + 1 numbers each: what is known at that moment."""
    said, rewards, learned, ends = (episode[name] for name in ("said", "rewards", "learned", "ends"))
    gamma = getattr(run.args, "gamma", 1.0)
    has_value = "value" in said[0]
    value = [words.get("value") for words in said]
    rest = value[-1] if has_value and episode["ended"] != "terminated" else 0.0
    followed = following_returns(learned, ends, rest, gamma)
    until = "until the end"
    if episode["ended"] != "terminated":
        until = "cut off; V of the last state stands for the rest" if has_value else "cut off at the end"
    charts = [{"kind": "reward", "title": "reward", "lines": {"reward": [None, *rewards]}, "how": "sum"}]
    label = "max Q" if "q" in said[0] else "V(s)"
    lines = {f"expected, {label}": value} if has_value else {}
    title = f"discounted return, γ = {gamma:g} ({until})"
    if "asked" in said[0]:
        lines = {"asked for": [words["asked"] for words in said]}
        title = f"return, plain sum ({until})"
    lines |= {"really followed": followed}
    charts.append({"kind": "return", "title": title, "lines": lines, "how": "at"})
    if has_value:
        surprise = [None]
        for t, (reward, end) in enumerate(zip(learned, ends, strict=True)):
            surprise.append(reward + (0.0 if end else gamma * value[t + 1]) - value[t])
        title = "surprise: better (+) or worse (−) than expected, δ"
        lines = {"TD error": surprise}
        charts.append({"kind": "surprise", "title": title, "lines": lines, "how": "largest"})
    if entropy(said[0]) is not None:
        title = "entropy: how open the choice is, in nats"
        lines = {"entropy": [*map(entropy, said)]}
        charts.append({"kind": "entropy", "title": title, "lines": lines, "how": "at"})
    if "novelty" in said[0]:
        lines = {"novelty": [words["novelty"] for words in said]}
        title = "novelty of what is seen, as intrinsic reward"
        charts.append({"kind": "novelty", "title": title, "lines": lines, "how": "at"})
    return charts


def at_moments(values: list, moments: list[int], how: str) -> list:
    """One number for each moment. how: "at" it, or "sum" or "largest" of all since the moment before it."""
    if how == "at":
        return rounded([values[step] for step in moments])
    numbers = [values[0]]
    for before, step in zip(moments, moments[1:], strict=False):
        since = values[before + 1 : step + 1]
        numbers.append(sum(since) if how == "sum" else max(since, key=abs))
    return rounded(numbers)


def episode_data(run: Watched, episode: dict) -> dict:
    """An episode as the page has it: for each moment its step, its picture, what was said and done."""
    film = episode["film"]
    moments = sorted(film.frames)
    pictures = {}  # a picture that comes again is written once
    order = [pictures.setdefault(film.frames[step].result(), len(pictures)) for step in moments]
    bars = {}
    for name in ("probabilities", "q", "mean", "sigma"):
        if name in episode["said"][0]:
            bars[name] = [rounded(episode["said"][step][name]) for step in moments]
    taken = []
    for step in moments:
        action = episode["actions"][step] if step < len(episode["actions"]) else None
        taken.append(int(action) if action is not None and getattr(action, "shape", ()) == () else None)
    charts = []
    for chart in curves(run, episode):
        lines = {name: at_moments(line, moments, chart["how"]) for name, line in chart["lines"].items()}
        charts.append({"kind": chart["kind"], "title": chart["title"], "lines": lines})
    sums = list(accumulate(episode["rewards"], initial=0.0))
    data = {"seed": episode["seed"], "steps": len(episode["rewards"]), "ended": episode["ended"]}
    data |= {"moments": moments, "stride": film.stride, "bars": bars, "taken": taken, "charts": charts}
    data |= {"so_far": rounded([sums[step] for step in moments]), "picture": order}
    if run.about["map"]:
        data["state"] = [episode["said"][step]["state"] for step in moments]
    return data | {"pictures": [base64.b64encode(picture).decode() for picture in pictures]}


def start_seeds(run: Watched, episodes: int, seed: int | None) -> list[int]:
    """The start seeds of the run's first evaluation episodes; with --seed, those of a run with that seed."""
    if seed is None and hasattr(run.script, "start_seeds"):
        return run.script.start_seeds(run.args, episodes)
    blocks = [run.script.env_seeds(20, run.args.seed, 1, first) for first in range(0, episodes, 20)]
    return sum(blocks, [])[:episodes]  # an evaluation plays 20 at a time


def page(runs: list[Watched], episodes: list[list[dict]]) -> str:
    """The whole page. Words of the runs are in it as data only, in which nothing can end the script tag."""
    names = [f"{run.about['algo']} on {run.about['env_id']}, seed {run.about['seed']}" for run in runs]
    title = " and ".join(dict.fromkeys(names)) + (", two runs" if len(set(names)) < len(runs) else "")
    blocks = []
    for run, played in zip(runs, episodes, strict=True):
        data = run.about | {"episodes": [episode_data(run, episode) for episode in played]}
        text = json.dumps(data, allow_nan=False, separators=(",", ":"))
        # In JSON < and & stand in strings only, where they may be written as numbers.
        text = text.replace("<", "\\u003c").replace("&", "\\u0026")
        blocks.append(f'<script type="application/json" class="run">{text}</script>')
    digests = []
    for code in (STYLE, SCRIPT):
        digests.append("'sha256-" + base64.b64encode(hashlib.sha256(code.encode()).digest()).decode() + "'")
    # The browser itself refuses every request and every other code.
    policy = f"default-src 'none'; img-src data:; style-src {digests[0]}; script-src {digests[1]}"
    parts = {"TITLE": html.escape(title), "POLICY": policy, "STYLE": STYLE, "SCRIPT": SCRIPT}
    parts |= {"BLOCKS": "\n".join(blocks)}
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], PAGE)


def small_page(runs: list[Watched], episodes: list[list[dict]]) -> str:
    """The page, thinned until it is small enough; all films have one stride, so that they stay in step."""
    films = [episode["film"] for played in episodes for episode in played]
    stride = max(film.stride for film in films)
    while True:
        for film in films:
            film.thin(stride)
        last = stride > 10**6  # each film has its first and last moment only
        # The page has pictures as text, which takes a third more. That alone may be too much.
        if last or sum(film.size() for film in films) * 4 / 3 <= MAX_BYTES:
            text = page(runs, episodes)
            if last or len(text.encode()) <= MAX_BYTES:
                return text
        stride *= 2


def write_file(path: Path, data: bytes) -> None:
    """Write under a temporary name and move into place, so that no crash leaves half a file."""
    temporary = path.with_name(f"tmp-{os.getpid()}-{path.name}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        fail(f"cannot write {path}: {error}")
    finally:
        temporary.unlink(missing_ok=True)


def watch(args: Args) -> Path:
    """Play the runs and write the page; returns its path."""
    path = page_path(args)
    sys.path.insert(0, str(ALGOS))  # envs.pyramids and its like stand there
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):
        # MuJoCo and pygame draw without a display, if they are told so.
        os.environ.setdefault("MUJOCO_GL", "egl")
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    runs = []
    episodes = []
    try:
        for folder in args.run_dirs:
            # The second run plays what the first one plays: the same starts, the same chance.
            seed = runs[0].args.seed if runs else args.seed
            runs.append(open_run(Path(folder), args, seed))
        seeds = start_seeds(runs[0], args.episodes, args.seed)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for run in runs:
                policy, _ = run.load_policy()
                episodes.append([play(run, policy, seed, pool) for seed in seeds])
                run.envs.close()
            text = small_page(runs, episodes)
    except Exception as error:  # environments, damaged files and foreign files fail in many ways
        fail(f"cannot play {folder if len(runs) < 2 else 'these runs'}: {type(error).__name__} {error}")
    write_file(path, text.encode())
    return path


def main() -> None:
    args = read_command_line()
    warnings.simplefilter("ignore")  # of tyro and Gymnasium: what is wrong with a folder is said in one line
    try:
        path = watch(args)
    except KeyboardInterrupt:
        fail("interrupted, nothing was written", code=130)
    print(f"{path.stat().st_size / 1e6:.1f} MB: {path}")
    if args.open:
        webbrowser.open(path.resolve().as_uri())


# ---- From here on: the page. A script of its own and no library: it draws boxes, lines and pictures. ----

STYLE = r"""
:root {
  color-scheme: light; --page: #f4f4f1; --card: #ffffff; --ink: #1c1c1e; --muted: #62625f; --line: #dcdcd6;
  --track: #ebebe6; --soft: #b9cfe9; --one: #1f6fce; --two: #d0561c;
}
@media (prefers-color-scheme: dark) {
  :root:not([data-theme="light"]) {
    color-scheme: dark; --page: #141413; --card: #1e1e1d; --ink: #ededea; --muted: #a3a39d; --line: #3a3a36;
    --track: #31312e; --soft: #34506f; --one: #5a9ff0; --two: #f08650;
  }
}
:root[data-theme="dark"] {
  color-scheme: dark; --page: #141413; --card: #1e1e1d; --ink: #ededea; --muted: #a3a39d; --line: #3a3a36;
  --track: #31312e; --soft: #34506f; --one: #5a9ff0; --two: #f08650;
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.4 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
header { display: flex; gap: 12px; align-items: baseline; padding: 12px 16px 0; max-width: 1500px;
  margin: auto; }
h1 { font-size: 18px; margin: 0; flex: 1; overflow-wrap: anywhere; }
main { display: grid; gap: 12px; padding: 12px 16px; max-width: 1500px; margin: auto; }
main.two { grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px;
  min-width: 0; }
h2 { font-size: 15px; margin: 0; overflow-wrap: anywhere; }
main.one h2 { display: none; }
h3 { font-size: 13px; font-weight: 600; margin: 14px 0 6px; }
p { margin: 2px 0; }
.muted { color: var(--muted); font-size: 13px; overflow-wrap: anywhere; }
.top { display: grid; gap: 12px; margin-top: 10px; }
canvas { width: 100%; max-height: 62vh; object-fit: contain; display: block; background: var(--track);
  border-radius: 6px; border: 1px solid var(--line); }
.now { font-variant-numeric: tabular-nums; font-size: 14px; min-height: 2.8em; }
.bar { display: grid; grid-template-columns: 1fr auto; gap: 0 8px; font-size: 13px; margin: 0 0 5px;
  font-variant-numeric: tabular-nums; }
.bar .track { grid-column: 1 / 3; position: relative; height: 9px; background: var(--track);
  border-radius: 3px;
  overflow: hidden; }
.bar .track i { position: absolute; top: 0; bottom: 0; background: var(--soft); border-radius: 3px; }
.bar .track b { position: absolute; top: 0; bottom: 0; width: 5px; margin-left: -2.5px;
  background: var(--one);
  border-radius: 2px; }
.bar.taken { font-weight: 700; }
.bar.taken .track i { background: var(--one); }
.bar.taken span:first-child::before { content: "▸ "; color: var(--one); }
.bar:not(.taken) .track b.dot { background: var(--soft); }
.map { display: grid; gap: 2px; max-width: 560px; font-size: 11px; font-variant-numeric: tabular-nums; }
.map div { position: relative; background: var(--track); aspect-ratio: 1; border-radius: 3px;
  text-align: center;
  display: flex; flex-direction: column; justify-content: center; line-height: 1.15; overflow: hidden;
  min-width: 0; }
.map div { container-type: inline-size; }
.map div i { position: absolute; inset: 0; background: var(--one); }
.map div span { position: relative; }
.map div.here { outline: 3px solid var(--two); outline-offset: -3px; }
.map .arrow { font-size: 15px; }
@container (max-width: 34px) { .map div > span:not(.arrow) { display: none; } }
.curves { display: grid; gap: 8px; margin-top: 14px; }
figure { margin: 0; min-width: 0; }
figcaption { font-size: 13px; display: flex; flex-wrap: wrap; gap: 0 12px; min-height: 2.7em;
  align-content: end; }
figcaption b { font-weight: 600; width: 100%; }
figcaption span { font-variant-numeric: tabular-nums; color: var(--muted); }
figcaption span::before { content: ""; display: inline-block; width: 12px; height: 3px; border-radius: 2px;
  margin-right: 5px; vertical-align: middle; background: var(--one); }
figcaption span:nth-of-type(2)::before { background: var(--two); }
.plot { position: relative; height: 96px; border: 1px solid var(--line); border-radius: 4px;
  cursor: crosshair;
  touch-action: pan-y; }
.plot svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
.plot path { fill: none; stroke: var(--one); stroke-width: 1.7; vector-effect: non-scaling-stroke;
  stroke-linejoin: round; }
.plot path:nth-of-type(2) { stroke: var(--two); }
.plot .zero { stroke: var(--line); vector-effect: non-scaling-stroke; }
.plot .cursor { stroke: var(--ink); stroke-width: 1.2; vector-effect: non-scaling-stroke; }
.plot em { position: absolute; left: 4px; font: 11px/1.2 system-ui, sans-serif; color: var(--muted);
  background: var(--card); padding: 0 3px; border-radius: 3px; opacity: .85; pointer-events: none; }
.plot em:first-of-type { top: 2px; }
.plot em:last-of-type { bottom: 2px; }
details { font-size: 13px; margin-top: 10px; }
summary { cursor: pointer; color: var(--muted); }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 6px 0; font-size: 12px; }
footer { position: sticky; bottom: 0; background: var(--card); border-top: 1px solid var(--line);
  padding: 8px 16px;
  padding-bottom: calc(8px + env(safe-area-inset-bottom)); }
footer > div { max-width: 1500px; margin: auto; display: flex; flex-wrap: wrap; gap: 6px 8px;
  align-items: center; }
input[type="range"] { flex: 1 1 100%; accent-color: var(--one); margin: 2px 0; min-width: 0; height: 26px; }
button, select { font: inherit; color: inherit; background: var(--track); border: 1px solid var(--line);
  border-radius: 6px; min-height: 36px; min-width: 40px; padding: 2px 8px; }
button:focus-visible, select:focus-visible, input:focus-visible { outline: 2px solid var(--one); }
#play { min-width: 56px; }
#where { font-variant-numeric: tabular-nums; margin-left: auto; font-size: 14px; }
@media (min-width: 900px) {
  main.one .top { grid-template-columns: minmax(0, 5fr) minmax(0, 4fr); gap: 20px; }
  main.one .film { position: sticky; top: 12px; align-self: start; }
  main.one canvas { max-height: 78vh; }
}
@media (max-width: 600px) {
  header, main { padding-left: 8px; padding-right: 8px; }
  main { gap: 6px; }
  section { padding: 8px; }
  canvas { max-height: 44vh; }
  footer { padding-left: 8px; padding-right: 8px; }
  footer > div { gap: 4px; }
  button, select { min-width: 34px; padding: 2px 4px; }
  #play { min-width: 40px; }
  #speed { width: 58px; }
  #where { font-size: 12px; }
}
"""

SCRIPT = r"""
"use strict";
const runs = [...document.querySelectorAll("script.run")].map(block => JSON.parse(block.textContent));
const $ = id => document.getElementById(id);
const el = (tag, className, ...children) => {  // text becomes text nodes, so nothing in it can be markup
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children);
  return node;
};
const svg = (tag, attributes) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
};
const number = x => {
  if (x === null || x === undefined) return "–";
  const size = Math.abs(x), digits = size >= 1000 ? 0 : size >= 100 ? 1 : size >= 1 ? 2 : 3;
  const text = Number.isInteger(x) ? count(x) : size < 0.01 ? x.toPrecision(2) : x.toFixed(digits);
  return text.replace("-", "−");
};
const count = x => x.toLocaleString("en-US");
const MARKS = { probabilities: "probability of each action", q: "what each action is worth, Q",
  mean: "mean ± deviation of each part of the action; the ends are its bounds" };

let episode = 0;   // which one is shown
let place = 0;     // which of its moments
let wanted = 0;    // the moment asked for: its pictures may still be on their way
let playing = null;  // since when, and from where
let moments = [];  // steps, those of the longer one of two runs
let views = [];

// One run in one episode: its pictures, its bars, its curves. All are drawn by show(), in one go.
class View {
  constructor(run, section) {
    this.run = run;
    this.data = run.episodes[episode];
    this.pictures = new Map();
    this.canvas = el("canvas");
    this.now = el("div", "now");
    this.bars = [];
    const panel = el("div", "panel", this.now);
    const kind = ["probabilities", "q", "mean"].find(name => name in this.data.bars);
    if (kind) {
      panel.append(el("h3", "", MARKS[kind]));
      this.kind = kind;
      const all = this.data.bars[kind].flat().filter(x => x !== null);
      this.low = kind === "q" ? Math.min(...all) : kind === "mean" ? -1 : 0;
      this.high = kind === "q" ? Math.max(...all) : 1;
      for (const name of run.actions) {
        const value = el("span", "value");
        const fill = el("i");
        const dot = el("b", "dot");
        const track = el("div", "track", fill, ...(kind === "probabilities" ? [] : [dot]));
        const bar = el("div", "bar", el("span", "", name), value, track);
        this.bars.push({ bar, value, fill, dot });
        panel.append(bar);
      }
    }
    if (run.map) panel.append(...this.map(run.map));
    this.curves = this.data.charts.map(chart => this.curve(chart));
    const curves = el("div", "curves", ...this.curves.map(curve => curve.figure));
    const versions = Object.entries(run.versions).map(pair => pair.join(" ")).join(", ");
    const more = el("details", "", el("summary", "", "command and versions"), el("pre", "", run.command),
      el("p", "muted", versions));
    const thin = this.data.stride > 1
      ? ` One step in ${this.data.stride} is shown; rewards in between are added up.` : "";
    const endings = { terminated: "terminated", "time limit": "cut off by the time limit",
      stopped: "cut off here, where evaluations end too" };
    section.replaceChildren(
      el("h2", "", `${run.algo} on ${run.env_id}, seed ${run.seed}`),
      el("p", "muted", run.name),
      el("p", "muted", `evaluation: ${run.score}, after ${count(run.steps)} steps of training`),
      el("p", "muted", `this episode: return ${number(this.data.so_far.at(-1))} in ` +
        `${count(this.data.steps)} steps, ${endings[this.data.ended]}.${thin}`),
      el("div", "top", el("div", "film", this.canvas), el("div", "", panel, curves)), more);
  }

  map(map) {
    const ends = ["hole", "cliff", "goal"];  // where nothing is chosen any more
    const values = map.values.filter((x, state) => x !== null && !ends.includes(map.tiles[state]));
    const low = Math.min(...values), high = Math.max(...values);
    this.cells = map.tiles.map((tile, state) => {
      const shade = el("i");
      if (ends.includes(tile)) return el("div", "", el("span", "", tile));
      shade.style.opacity = high > low ? 0.55 * (map.values[state] - low) / (high - low) : 0;
      const worth = el("span", "", number(map.values[state]));
      return el("div", "", shade, el("span", "arrow", map.arrows[state]), worth);
    });
    const grid = el("div", "map", ...this.cells);
    grid.style.gridTemplateColumns = `repeat(${map.columns}, minmax(0, 1fr))`;
    return [el("h3", "", "the best action of each state and what it promises"), grid];
  }

  // Two runs have the same scales, so that their curves can be compared.
  curve(chart) {
    const charts = runs.flatMap(run => run.episodes[episode].charts);
    const alike = charts.filter(other => other.kind === chart.kind);
    const all = alike.flatMap(one => Object.values(one.lines).flat()).filter(x => x !== null);
    let low = Math.min(...all), high = Math.max(...all);
    // Values that hardly change shall look like that: noise in the third digit is no event.
    const span = 0.1 * Math.max(Math.abs(low), Math.abs(high)) || 1;
    if (high - low < span) [low, high] = [(low + high - span) / 2, (low + high + span) / 2];
    const last = Math.max(1, ...runs.map(run => run.episodes[episode].steps));
    const x = step => 1000 * step / last, y = value => 97 - 94 * (value - low) / (high - low);
    const drawing = svg("svg", { viewBox: "0 0 1000 100", preserveAspectRatio: "none" });
    const zero = { class: "zero", x1: 0, x2: 1000, y1: y(0), y2: y(0) };
    if (low < 0 && high > 0) drawing.append(svg("line", zero));
    for (const line of Object.values(chart.lines)) {
      let path = "", pen = "M";
      line.forEach((value, m) => {
        if (value === null) { pen = "M"; return; }
        path += `${pen}${x(this.data.moments[m]).toFixed(1)} ${y(value).toFixed(1)}`;
        pen = "L";
      });
      drawing.append(svg("path", { d: path }));
    }
    const cursor = svg("line", { class: "cursor", y1: 0, y2: 100 });
    drawing.append(cursor);
    const plot = el("div", "plot", drawing, el("em", "", number(high)), el("em", "", number(low)));
    const go = event => {
      const box = plot.getBoundingClientRect();
      stop();
      show(placeOf(Math.round(last * (event.clientX - box.left) / box.width)));
    };
    plot.addEventListener("pointerdown", event => { plot.setPointerCapture(event.pointerId); go(event); });
    plot.addEventListener("pointermove", event => { if (event.buttons) go(event); });
    const readings = Object.keys(chart.lines).map(name => [name, el("span")]);
    const figure = el("figure", "",
      el("figcaption", "", el("b", "", chart.title), ...readings.map(pair => pair[1])), plot);
    return { figure, readings, cursor, chart, x };
  }

  // The moment of this run at a step: a run that has ended stays at its end.
  at(step) {
    let m = this.data.moments.findLastIndex(own => own <= step);
    return Math.max(0, m);
  }

  // A picture, decoded; the last few are kept.
  picture(m) {
    const index = this.data.picture[Math.min(m, this.data.picture.length - 1)];
    if (!this.pictures.has(index)) {
      const image = new Image();
      image.src = "data:image/webp;base64," + this.data.pictures[index];
      this.pictures.set(index, image.decode().catch(() => {}).then(() => image));
      if (this.pictures.size > 120) this.pictures.delete(this.pictures.keys().next().value);
    }
    return this.pictures.get(index);
  }

  draw(m, image) {
    const data = this.data, at = data.moments[m];
    if (this.canvas.width !== image.naturalWidth || this.canvas.height !== image.naturalHeight) {
      [this.canvas.width, this.canvas.height] = [image.naturalWidth, image.naturalHeight];
      this.canvas.style.imageRendering = image.naturalWidth < 240 ? "pixelated" : "auto";
      this.canvas.style.aspectRatio = `${image.naturalWidth} / ${image.naturalHeight}`;
    }
    if (image.naturalWidth) this.canvas.getContext("2d").drawImage(image, 0, 0);
    this.canvas.dataset.moment = m;
    const taken = data.taken[m], over = m === data.moments.length - 1;
    const reward = Object.values(data.charts[0].lines)[0][m];
    this.now.replaceChildren(
      el("p", "", `step ${count(at)} of ${count(data.steps)}` + (over ? ": the end" : "")),
      el("p", "", `reward ${number(reward)}, return so far ${number(data.so_far[m])}`));
    this.now.dataset.soFar = data.so_far[m];
    const values = this.kind ? data.bars[this.kind][m] : [];
    const span = this.high - this.low || 1, part = value => 100 * (value - this.low) / span;
    this.bars.forEach(({ bar, value, fill, dot }, i) => {
      const x = values[i];
      bar.classList.toggle("taken", i === taken);
      bar.dataset.value = x;
      value.textContent = number(x);
      if (this.kind === "probabilities") fill.style.width = 100 * x + "%";
      if (this.kind === "q") {
        const behind = x - Math.max(...values);
        value.textContent += behind < 0 ? ` (${number(behind)})` : "";
        dot.style.left = part(x) + "%";
      }
      if (this.kind === "mean") {
        const sigma = data.bars.sigma ? data.bars.sigma[m][i] : 0;
        const clip = z => Math.min(100, Math.max(0, part(z)));
        bar.dataset.sigma = sigma;
        bar.classList.toggle("taken", false);
        value.textContent += sigma ? " ± " + number(sigma) : "";
        fill.style.left = clip(x - sigma) + "%";
        fill.style.width = clip(x + sigma) - clip(x - sigma) + "%";
        dot.style.left = clip(x) + "%";
        dot.style.background = "var(--one)";
      }
    });
    (this.cells || []).forEach((cell, state) => cell.classList.toggle("here", state === data.state[m]));
    for (const { readings, cursor, chart, x } of this.curves) {
      cursor.setAttribute("x1", x(at));
      cursor.setAttribute("x2", x(at));
      for (const [name, reading] of readings) {
        reading.textContent = `${name} ${number(chart.lines[name][m])}`;
        reading.dataset.value = chart.lines[name][m];
      }
    }
  }
}

const placeOf = step => {  // the nearest moment
  const after = moments.findIndex(moment => moment >= step);
  if (after <= 0) return after < 0 ? moments.length - 1 : 0;
  return step - moments[after - 1] < moments[after] - step ? after - 1 : after;
};

// Draw moment p: pictures, bars and cursors change together, once all pictures are decoded.
async function show(p) {
  wanted = Math.min(Math.max(p, 0), moments.length - 1);
  const mine = wanted;
  const at = views.map(view => view.at(moments[mine]));
  const images = await Promise.all(views.map((view, v) => view.picture(at[v])));
  if (wanted !== mine) return;  // another moment was asked for meanwhile
  place = mine;
  views.forEach((view, v) => view.draw(at[v], images[v]));
  $("slider").value = place;
  $("slider").setAttribute("aria-valuetext", `step ${moments[place]} of ${moments.at(-1)}`);
  $("where").textContent = `${count(moments[place])} / ${count(moments.at(-1))}`;
  document.body.dataset.place = place;
  document.body.dataset.step = moments[place];
  if (!("shown" in document.body.dataset)) document.body.dataset.shown = Math.round(performance.now());
  views.forEach((view, v) => {  // the next ones, so that they are decoded when their time comes
    for (let m = at[v] + 1; m < Math.min(at[v] + 12, view.data.moments.length); m++) view.picture(m);
  });
}

function choose(e) {
  stop();
  episode = e;
  const played = runs.map(run => run.episodes[e]);
  moments = played.reduce((one, other) => other.steps > one.steps ? other : one).moments;
  const sections = [...document.querySelectorAll("section")];
  views = runs.map((run, r) => new View(run, sections[r]));
  $("slider").max = moments.length - 1;
  return show(0);
}

function stop() {
  playing = null;
  $("play").textContent = "▶";
  $("play").setAttribute("aria-label", "play");
}

function play() {
  if (playing) return stop();
  playing = { since: performance.now(), from: place === moments.length - 1 ? 0 : place };
  $("play").textContent = "❚❚";
  $("play").setAttribute("aria-label", "pause");
  requestAnimationFrame(tick);
}

function tick(now) {
  if (!playing) return;
  const pace = runs[0].fps * Number($("speed").value) / views[0].data.stride;
  const due = Math.min(playing.from + Math.max(0, Math.floor((now - playing.since) / 1000 * pace)),
    moments.length - 1);
  const next = due === place ? Promise.resolve() : show(due);
  next.then(() => place === moments.length - 1 && due === place ? stop() : requestAnimationFrame(tick));
}

function faster(by) {
  const options = $("speed").options;
  $("speed").selectedIndex = Math.min(Math.max($("speed").selectedIndex + by, 0), options.length - 1);
  anchor();
}
const anchor = () => { if (playing) playing = { since: performance.now(), from: place }; };

const step = by => { stop(); return show(wanted + by); };
$("play").onclick = play;
$("first").onclick = () => { stop(); show(0); };
$("last").onclick = () => { stop(); show(moments.length - 1); };
$("back").onclick = () => step(-1);
$("on").onclick = () => step(1);
$("slider").oninput = event => { stop(); show(Number(event.target.value)); };
$("speed").onchange = anchor;
$("episode").onchange = event => choose(Number(event.target.value));
$("theme").onclick = () => {
  const dark = getComputedStyle(document.documentElement).colorScheme === "dark";
  document.documentElement.dataset.theme = dark ? "light" : "dark";
};
document.addEventListener("keydown", event => {
  const inside = event.target.tagName;
  if (event.ctrlKey || event.altKey || event.metaKey || inside === "SELECT") return;
  if (event.key === " " && ["BUTTON", "SUMMARY"].includes(inside)) return;  // presses what has the focus
  const by = event.shiftKey ? 10 : 1;
  const keys = { " ": play, ArrowLeft: () => step(-by), ArrowRight: () => step(by), Home: $("first").onclick,
    End: $("last").onclick, "+": () => faster(1), "-": () => faster(-1) };
  if (!(event.key in keys)) return;
  event.preventDefault();
  keys[event.key]();
});

document.querySelector("main").className = runs.length === 2 ? "two" : "one";
runs.forEach(() => document.querySelector("main").append(el("section")));
runs[0].episodes.forEach((one, e) => {
  const returns = runs.map(run => number(run.episodes[e].so_far.at(-1))).join(" and ");
  const option = el("option", "", `episode ${e + 1}: ${returns}`);
  option.value = e;
  $("episode").append(option);
});
$("episode").hidden = runs[0].episodes.length === 1;
choose(0);
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{{POLICY}}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{TITLE}}</title>
<style>{{STYLE}}</style>
</head>
<body>
<header><h1>{{TITLE}}</h1><button id="theme" aria-label="light or dark">◐</button></header>
<main></main>
<footer><div>
<input id="slider" type="range" min="0" value="0" step="1" aria-label="moment of the episode">
<button id="first" aria-label="first moment">|‹</button>
<button id="back" aria-label="one step back">‹</button>
<button id="play" aria-label="play">▶</button>
<button id="on" aria-label="one step on">›</button>
<button id="last" aria-label="last moment">›|</button>
<select id="speed" aria-label="speed">
<option value="0.1">×0.1</option><option value="0.25">×0.25</option><option value="0.5">×0.5</option>
<option value="1" selected>×1</option><option value="2">×2</option><option value="4">×4</option>
<option value="8">×8</option>
</select>
<select id="episode" aria-label="episode"></select>
<span id="where"></span>
</div></footer>
<noscript>This page needs JavaScript.</noscript>
{{BLOCKS}}
<script>{{SCRIPT}}</script>
</body>
</html>
"""

if __name__ == "__main__":
    main()
