"""Noisy television: nine rooms in a row, the reward in the last one, a screen full of noise in the first.

    gym.make("envs.noisy_tv:NoisyTV-v0")            from a script in algos/; the import registers the id

A trap for the curious. An agent that is paid for what it cannot predict gets paid for ever where chance makes
the picture. The large study of curiosity (https://arxiv.org/abs/1808.04355) hung such a screen into its maze,
and this is a small one of the kind.

    #############        A digit is a floor tile and says to which room it belongs; a door belongs to the
    #000#111#222#        room with the smaller number. The agent starts in the middle of room 1, one door
    #00001111222#        from the television in room 0. The reward lies in the last corner of room 8, 30
    #000#111#222#        steps away: a random walk of 200 steps does not get there.
    ##########2##
    #555#444#333#        In room 0 the agent sees the screen, 4 x 4 pixels that are on or off; elsewhere
    #55544443333#        it is dark, all pixels off. A fair coin decides each pixel of a new picture.
    #555#444#333#          NoisyTV-v0         a new picture at every step in room 0, whatever the agent
    ##5##########                             does: its actions make no difference to the noise
    #666#777#888#          NoisyTVRemote-v0   a new picture when the agent comes in and when it presses a
    #66667777888#                             button, which it always carries: its own action makes noise
    #666#777#888#
    #############

Observation, 105 float32: 89 numbers, 1 at the agent's tile and 0 at all others; 16 pixels, 0 or 1.
Action:  0 stays, 1 goes up, 2 right, 3 down, 4 left; a wall lets nobody pass. NoisyTVRemote-v0 has 5, which
         stays and presses the button: a new picture in room 0, nothing anywhere else.
Reward:  1 in the last corner, 0 elsewhere.
Ending:  `terminated` in that corner, `truncated` after 200 steps.
Info:    "cell", the number of the room the agent is in (NUM_CELLS: 9 of them), to measure exploration;
         "watching", whether it is in room 0.

N environments are computed in one batch; world i of its `reset(seed=s)` is the one that the single
environment makes of the seed s + i.
"""

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.error import ResetNeeded
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

MAP = """
#############
#000#111#222#
#00001111222#
#000#111#222#
##########2##
#555#444#333#
#55544443333#
#555#444#333#
##5##########
#666#777#888#
#66667777888#
#666#777#888#
#############
""".split()
START, GOAL = (2, 6), (11, 11)  # row and column
MAX_STEPS = 200
SCREEN = 4  # pixels a side
MOVES = np.array([(0, 0), (-1, 0), (0, 1), (1, 0), (0, -1), (0, 0)])  # rows, columns; the last one presses
PRESS = 5

TILES = [(row, column) for row, line in enumerate(MAP) for column, tile in enumerate(line) if tile != "#"]
NUMBER = {tile: number for number, tile in enumerate(TILES)}
ROOM = np.array([int(MAP[row][column]) for row, column in TILES])  # (89,) of each tile
# Where each action leads from each tile, (89, 6): into a wall nobody moves.
LEADS_TO = np.array(
    [[NUMBER.get((row + r, column + c), here) for r, c in MOVES] for here, (row, column) in enumerate(TILES)]
)
ONE_HOT = np.eye(len(TILES), dtype=np.float32)

PIXELS = 16  # of a tile in the picture
WALL_COLOUR, FLOOR, ROOM_0, GOLD, BLUE = (
    (70, 75, 85),
    (238, 235, 228),
    (250, 225, 215),
    (245, 200, 20),
    (30, 90, 220),
)


class NoisyTVVectorEnv(VectorEnv):
    """N mazes at once; see the module's docstring for the task.

    Endings, `info` and `final_obs` are laid out as `gymnasium.vector.SyncVectorEnv` does it.

    Attributes:
        NUM_CELLS: how many different values `info["cell"]` can take.
    """

    NUM_CELLS = ROOM.max() + 1
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10, "autoreset_mode": AutoresetMode.NEXT_STEP}

    def __init__(
        self,
        num_envs: int = 1,
        remote: bool = False,
        render_mode: str | None = None,
        autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
        max_episode_steps: int | None = MAX_STEPS,
    ) -> None:
        """remote: with the button. max_episode_steps: None for never. Raises ValueError for unknown modes."""
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f'render_mode must be "rgb_array" or None, not {render_mode!r}')
        self.num_envs = num_envs
        self.remote = remote
        self.render_mode = render_mode
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = self.metadata | {"autoreset_mode": self.autoreset_mode}
        self.max_episode_steps = np.inf if max_episode_steps is None else max_episode_steps
        self.single_observation_space = spaces.Box(0, 1, (len(TILES) + SCREEN**2,), np.float32)
        self.single_action_space = spaces.Discrete(6 if remote else 5)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.rngs = [None] * num_envs
        self.tile = np.full(num_envs, NUMBER[START])
        self.screen = np.zeros((num_envs, SCREEN**2), dtype=np.float32)
        self.steps = np.zeros(num_envs, dtype=int)
        self.ended = np.zeros(num_envs, dtype=bool)  # by the previous step, and no reset has followed

    @property
    def np_random(self) -> tuple:
        """The random generators, one for each environment."""
        return tuple(self.rngs)

    def reset(self, *, seed=None, options=None):
        """Start new episodes. Returns observations (N, 105) and infos.

        seed: an integer s for s, s + 1, …; or a list; or None to go on with the generators there are.
        options: {"reset_mask": (N,) bool} resets only some. Raises ValueError for sizes other than N.
        """
        seeds = [None] * self.num_envs if seed is None else seed
        if np.ndim(seeds) == 0:
            seeds = [int(seed) + i for i in range(self.num_envs)]
        mask = np.asarray((options or {}).get("reset_mask", np.ones(self.num_envs, dtype=bool)))
        if len(seeds) != self.num_envs or mask.shape != (self.num_envs,) or mask.dtype != bool:
            raise ValueError(
                f"need a seed and a boolean of the mask for each of {self.num_envs} environments"
            )
        for i in np.flatnonzero(mask):
            if seeds[i] is not None or self.rngs[i] is None:
                self.rngs[i], _ = seeding.np_random(seeds[i])
        self._begin(mask)
        self.ended = self.ended & ~mask
        return self._observe(), self._info(mask)

    def step(self, actions):
        """One step in each environment. actions: (N,) integers.

        Returns observations (N, 105), rewards (N,), terminated (N,), truncated (N,) and infos. Raises
        ValueError for other actions, ResetNeeded before the first reset or, without autoreset, after an end.
        """
        if None in self.rngs:
            raise ResetNeeded("call reset before the first step")
        actions = np.asarray(actions)
        if (
            actions.shape != (self.num_envs,)
            or not ((actions >= 0) & (actions < self.single_action_space.n)).all()
        ):
            raise ValueError(
                f"need {self.num_envs} actions from 0 to {self.single_action_space.n - 1}: {actions}"
            )
        if self.autoreset_mode == AutoresetMode.DISABLED and self.ended.any():
            raise ResetNeeded(f"episodes have ended, reset them first: {np.flatnonzero(self.ended)}")
        starting = self.ended & (self.autoreset_mode == AutoresetMode.NEXT_STEP)
        before = ROOM[self.tile]
        self.tile = LEADS_TO[self.tile, actions]
        self.steps += 1
        watching = ROOM[self.tile] == 0
        new_picture = watching & ((before != 0) | (actions == PRESS)) if self.remote else watching
        for i in np.flatnonzero(new_picture & ~starting):
            self.screen[i] = self.rngs[i].integers(2, size=SCREEN**2)
        self.screen[~watching] = 0
        terminated = (self.tile == NUMBER[GOAL]) & ~starting
        truncated = (self.steps >= self.max_episode_steps) & ~starting
        self._begin(starting)
        self.ended = terminated | truncated
        observations = self._observe()
        infos = {}
        if self.autoreset_mode == AutoresetMode.SAME_STEP and self.ended.any():
            final = np.full(self.num_envs, None, dtype=object)
            for i in np.flatnonzero(self.ended):
                final[i] = observations[i]
            infos = {"final_info": self._info(self.ended), "final_obs": final}
            infos |= {"_final_info": self.ended.copy(), "_final_obs": self.ended.copy()}
            self._begin(self.ended)
            observations = self._observe()
            self.ended = np.zeros_like(self.ended)
        everywhere = np.ones(self.num_envs, dtype=bool)
        return observations, terminated.astype(float), terminated, truncated, infos | self._info(everywhere)

    def render(self):
        """Pictures from above, N uint8 (208, 208, 3) with the screen in the wall over room 0, or None."""
        if self.render_mode is None:
            return None
        return tuple(self._draw(i) for i in range(self.num_envs))

    def _begin(self, who: np.ndarray) -> None:
        """New episodes in the environments of the mask `who` (N,)."""
        self.tile[who] = NUMBER[START]
        self.screen[who] = 0
        self.steps[who] = 0

    def _observe(self) -> np.ndarray:
        return np.concatenate([ONE_HOT[self.tile], self.screen], axis=1)

    def _info(self, mask: np.ndarray) -> dict:
        """The info of the environments in `mask` (N,); 0 for the others."""
        room = np.where(mask, ROOM[self.tile], 0)
        return {"cell": room, "_cell": mask.copy(), "watching": mask & (room == 0), "_watching": mask.copy()}

    def _draw(self, i: int) -> np.ndarray:
        colours = np.full((len(MAP), len(MAP[0]), 3), WALL_COLOUR, dtype=np.uint8)
        for tile, room in zip(TILES, ROOM, strict=True):
            colours[tile] = ROOM_0 if room == 0 else FLOOR
        colours[GOAL] = GOLD
        colours[TILES[self.tile[i]]] = BLUE
        picture = colours.repeat(PIXELS, axis=0).repeat(PIXELS, axis=1)
        side = 12  # of a screen's pixel: it covers the three tiles of wall over room 0
        screen = 255 * self.screen[i].reshape(SCREEN, SCREEN, 1).astype(np.uint8)
        picture[2 : 2 + 3 * SCREEN, PIXELS : PIXELS + side * SCREEN] = screen.repeat(3, axis=0).repeat(
            side, axis=1
        )
        return picture


class NoisyTVEnv(gym.Env):
    """One maze: a batch of one without its batch axis. `gym.make` adds the time limit."""

    NUM_CELLS = NoisyTVVectorEnv.NUM_CELLS
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, remote: bool = False, render_mode: str | None = None) -> None:
        """remote: with the button. Raises ValueError for an unknown render mode."""
        self.batch = NoisyTVVectorEnv(1, remote, render_mode, AutoresetMode.DISABLED, max_episode_steps=None)
        self.render_mode = render_mode
        self.observation_space = self.batch.single_observation_space
        self.action_space = self.batch.single_action_space

    def reset(self, *, seed=None, options=None):
        """Start in the middle of room 1. Returns the observation (105,) and the info."""
        super().reset(seed=seed)
        self.batch.rngs = [self.np_random]
        observations, infos = self.batch.reset()
        return observations[0], self._single(infos)

    def step(self, action):
        """One step. Returns observation (105,), reward, terminated, truncated (False here) and info."""
        observations, rewards, terminated, _, infos = self.batch.step(np.array([action]))
        return observations[0], float(rewards[0]), bool(terminated[0]), False, self._single(infos)

    def render(self):
        """The picture, uint8 (208, 208, 3); None without a render mode."""
        pictures = self.batch.render()
        return pictures[0] if pictures else None

    @staticmethod
    def _single(infos: dict) -> dict:
        return {"cell": int(infos["cell"][0]), "watching": bool(infos["watching"][0])}


for name, remote in (("NoisyTV-v0", False), ("NoisyTVRemote-v0", True)):
    gym.register(
        id=name,
        entry_point=f"{__name__}:NoisyTVEnv",
        vector_entry_point=f"{__name__}:NoisyTVVectorEnv",
        max_episode_steps=MAX_STEPS,
        kwargs={"remote": remote},
    )
