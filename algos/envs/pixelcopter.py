"""Pixelcopter: steer a helicopter through a winding tunnel and around the blocks in it.

    gym.make("envs.pixelcopter:Pixelcopter-v0")     from a script in algos/; the import registers the id

The game comes from the PyGame Learning Environment (PLE, MIT licence, copyright (c) 2016 Norman Tasfi,
https://github.com/ntasfi/PyGame-Learning-Environment), where it runs on pygame. It is on no package index,
so this file is a port to NumPy, at the original's default size of 48 x 48 pixels and 30 frames a second.
y points down.

Physics, per frame of Δ = 1000/30 ms, with the world's speed s = 0.0004·48 = 0.0192 px/ms:
    momentum ← 0.99 · (momentum + a·Δ),   a = −0.875·s when climbing, +0.09·s when falling                (1)
    y        ← y + momentum                                         the player's x stays at 16            (2)
    x        ← x − s·Δ                                              for every block and terrain piece     (3)
The tunnel is made of pieces 4 px wide with a passage of 24 px, a quarter of the height to either side of
    y = ⌊24 + 6·sin(f·x + v)⌋,  f = 4.5/48 + U(−0.01, 0.01) per batch of 48,  v ~ U(0, 0.5) per piece     (4)
One block, 4 x 9 px, is on its way at any time; the next one is drawn when it reaches the player.

Observation, 7 floats (T is the middle of the passage at the player, by the oldest piece that overlaps its x):
    0  player's y                             4  distance in x to the block ahead (its centre, > 0)
    1  player's momentum                      5  that block's y (its centre)
    2  y − (T − 12), room above               6  that block's y + 9
    3  (T + 12) − y, room below
Action:  0 climb for one frame, 1 fall.
Reward:  +1 for a terrain piece that leaves the screen, +1 for a block reached, −5 for dying; they add up.
Ending:  `terminated` when the player touches a block or the tunnel, or leaves 6 ≤ y ≤ 42.
         `truncated` after 10,000 frames.

As in the original: constants, order within a frame, order of random draws, collisions of whole-pixel
rectangles. Departures: the time limit (the original has none), the observation as a float32 vector instead of
a dictionary, NumPy's `Generator` instead of `RandomState` (another course for the same seed), no pygame.

Example:
    envs = gym.make_vec("envs.pixelcopter:Pixelcopter-v0", num_envs=64,
                        vectorization_mode="vector_entry_point", autoreset_mode=AutoresetMode.SAME_STEP)
After `envs.reset(seed=s)`, game i is exactly what a single environment plays after `reset(seed=s + i)`.

Symbols: N games at once, P terrain pieces that a game has room for.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

W = H = 48  # screen, px
DT = 1000 / 30  # one frame, ms
SPEED = 0.0004 * W  # px/ms
CLIMB = 0  # the action; the other one falls
LIFT, FALL = -0.875 * SPEED * DT, 0.09 * SPEED * DT  # px/frame, per frame

PLAYER_X, PLAYER_SIZE = int(0.35 * W), int(0.05 * W)
BLOCK_W, BLOCK_H = int(0.1 * W), int(0.2 * H)
PIECE_W = int(0.1 * W)  # as wide as a block, so both overlap the player over the same range of x
HALF_PASSAGE = 0.25 * H
BATCH = len(range(PIECE_W // 2, 4 * W + PIECE_W // 2, PIECE_W))  # pieces in a batch of terrain
FEW = 13  # with so few pieces left, the next batch is drawn
GONE = -100.0  # x of a block that is not there

# Rectangles span whole pixels: left = int(x) − w//2, right = left + w. Two of them overlap where left < the
# other's right and right > the other's left. For the player and a block or piece that means 13 < int(x) < 19.
NEAR_LEFT = PLAYER_X - PLAYER_SIZE // 2 - (PIECE_W - PIECE_W // 2) + 1
NEAR_RIGHT = PLAYER_X - PLAYER_SIZE // 2 + PLAYER_SIZE + PIECE_W // 2

WHITE, GREEN = (255, 255, 255), (120, 240, 80)
SCALE = 10  # a rendered pixel is 10 x 10 pixels of the frame

# No game leaves these bounds: it ends at the first frame outside 6 ≤ y ≤ 42, and no frame moves 7 px.
OBSERVATION_SPACE = gym.spaces.Box(
    low=np.array([-H, -H, -2 * H, -2 * H, 0, 0, 0], np.float32),
    high=np.array([2 * H, H, 2 * H, 2 * H, 1.5 * W, H, 2 * H], np.float32),
)
ACTION_SPACE = gym.spaces.Discrete(2)


class Pixelcopter:
    """N games side by side. Positions are centres, in pixels. The caller brings N random generators."""

    def __init__(self, num_envs: int) -> None:
        self.y = np.zeros(num_envs)
        self.momentum = np.zeros(num_envs)
        # Row 0 is the block ahead; row 1 the one before it, which can still be hit while it passes.
        self.block_x = np.full((2, num_envs), GONE)
        self.block_y = np.zeros((2, num_envs))
        # Oldest piece first; entries from `num_pieces` on are meaningless.
        self.num_pieces = np.zeros(num_envs, dtype=np.int64)
        self.piece_x = np.zeros((FEW + BATCH, num_envs))  # (P, N)
        self.piece_y = np.zeros((FEW + BATCH, num_envs))  # (P, N)
        self.passage_y = np.zeros(num_envs)  # T of the observation

    def reset(self, envs: np.ndarray, rngs: Sequence[np.random.Generator]) -> None:
        """Start the games with the indices `envs` anew. `rngs` are the generators of all N games."""
        self.y[envs] = H / 2
        self.momentum[envs] = 0.0
        self.block_x[:, envs] = GONE
        self._add_block(envs, rngs)
        self.num_pieces[envs] = 0
        self._add_terrain(envs, 0, rngs)
        self.passage_y[envs] = self.piece_y[3, envs]  # pieces start at x = 2, 6, 10, 14: the first to overlap

    def step(self, actions: np.ndarray, rngs: Sequence[np.random.Generator]) -> tuple[np.ndarray, np.ndarray]:
        """Play one frame of all games. actions (N,) -> rewards (N,) float64, terminated (N,) bool."""
        self.momentum += np.where(actions == CLIMB, LIFT, FALL)  # (1)
        self.momentum *= 0.99
        self.y += self.momentum  # (2)
        self.block_x -= SPEED * DT  # (3)
        # One common offset would be cheaper, but rounds differently, and whole pixels decide over collisions.
        self.piece_x -= SPEED * DT

        player_top = np.trunc(self.y) - PLAYER_SIZE // 2
        block_top = self.block_y - BLOCK_H // 2
        hit_block = (self.block_x >= NEAR_LEFT) & (self.block_x < NEAR_RIGHT)
        hit_block &= (block_top < player_top + PLAYER_SIZE) & (block_top + BLOCK_H > player_top)

        # The oldest piece is now at −4.64 < x ≤ 1.36, the others follow 4 px apart, 2 px where batches meet.
        # So those at the player are among the entries 4 to 6. They are taller than the screen: only x counts.
        near_x, near_y = self.piece_x[4:7], self.piece_y[4:7]  # (3, N)
        over_player = (near_x >= NEAR_LEFT) & (near_x < NEAR_RIGHT)
        hit_terrain = self.y - 0.05 * H <= near_y - HALF_PASSAGE
        hit_terrain |= self.y >= near_y + HALF_PASSAGE
        hit_terrain &= over_player
        self.passage_y = near_y[over_player.argmax(axis=0), np.arange(len(self.y))]

        terminated = hit_block.any(axis=0) | hit_terrain.any(axis=0)
        # With terrain drawn by (4), the player meets it before these limits. The original asks nonetheless.
        terminated |= (self.y < 0.125 * H) | (self.y > 0.875 * H)

        passed = self.block_x[0] <= PLAYER_X
        # Never two at once: pieces are further apart than a frame's way.
        dropped = self.piece_x[0] <= -PIECE_W
        rewards = passed.astype(np.float64)
        rewards += dropped
        rewards[terminated] -= 5.0

        if passed.any():
            self._add_block(np.flatnonzero(passed), rngs)
        if dropped.any():
            envs = np.flatnonzero(dropped)
            self.piece_x[:-1, envs] = self.piece_x[1:, envs]
            self.piece_y[:-1, envs] = self.piece_y[1:, envs]
            self.num_pieces[envs] -= 1
            short = envs[self.num_pieces[envs] <= FEW]
            if short.size:
                self._add_terrain(short, W, rngs)
        return rewards, terminated

    def observe(self) -> np.ndarray:
        """The observations of all games in double precision, (N, 7)."""
        obs = np.empty((len(self.y), 7))
        obs[:, 0] = self.y
        obs[:, 1] = self.momentum
        obs[:, 2] = self.y - (self.passage_y - HALF_PASSAGE)
        obs[:, 3] = (self.passage_y + HALF_PASSAGE) - self.y
        obs[:, 4] = self.block_x[0] - PLAYER_X
        obs[:, 5] = self.block_y[0]
        obs[:, 6] = self.block_y[0] + BLOCK_H
        return obs

    def draw(self, env: int) -> np.ndarray:
        """One game's picture, (480, 480, 3) uint8."""
        frame = np.zeros((H, W, 3), dtype=np.uint8)

        def fill(x: float, top: float, bottom: float, width: int, colour: tuple[int, int, int]) -> None:
            left = int(x) - width // 2
            frame[max(0, int(top)) : max(0, int(bottom)), max(0, left) : max(0, left + width)] = colour

        for piece in range(self.num_pieces[env]):
            x, y = self.piece_x[piece, env], self.piece_y[piece, env]
            fill(x, 0, y - HALF_PASSAGE, PIECE_W, GREEN)
            fill(x, y + HALF_PASSAGE, H, PIECE_W, GREEN)
        for x, y in zip(self.block_x[:, env], self.block_y[:, env], strict=True):
            top = y - BLOCK_H // 2
            fill(x, top, top + BLOCK_H, BLOCK_W, GREEN)
        top = int(self.y[env]) - PLAYER_SIZE // 2
        fill(PLAYER_X, top, top + PLAYER_SIZE, PLAYER_SIZE, WHITE)
        return frame.repeat(SCALE, axis=0).repeat(SCALE, axis=1)

    def _add_block(self, envs: np.ndarray, rngs: Sequence[np.random.Generator]) -> None:
        self.block_x[1, envs], self.block_y[1, envs] = self.block_x[0, envs], self.block_y[0, envs]
        for i in envs:
            self.block_x[0, i] = rngs[i].integers(W, int(1.5 * W))
            self.block_y[0, i] = rngs[i].integers(int(0.25 * H), int(0.75 * H))

    def _add_terrain(self, envs: np.ndarray, start: int, rngs: Sequence[np.random.Generator]) -> None:
        """Append a batch to games that hold equally many pieces: none at a reset, `FEW` later on."""
        x = start + PIECE_W // 2 + PIECE_W * np.arange(BATCH, dtype=np.float64)
        frequency = np.empty(len(envs))
        phase = np.empty((BATCH, len(envs)))
        for j, i in enumerate(envs):
            frequency[j] = 4.5 / W + rngs[i].uniform(-0.01, 0.01)
            phase[:, j] = rngs[i].uniform(0.0, 0.5, BATCH)
        jitter = 0.125 * H * np.sin(frequency * x[:, None] + phase)  # (4)
        first = self.num_pieces[envs[0]]
        self.piece_x[first : first + BATCH, envs] = x[:, None]
        self.piece_y[first : first + BATCH, envs] = np.trunc(H / 2 + jitter)
        self.num_pieces[envs] += BATCH


class PixelcopterEnv(gym.Env[np.ndarray, int]):
    """One game as a Gymnasium environment. The time limit is the wrapper's that `gym.make` adds."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}
    observation_space = OBSERVATION_SPACE
    action_space = ACTION_SPACE

    def __init__(self, render_mode: str | None = None) -> None:
        """Raises ValueError for a render mode other than "rgb_array" or None."""
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f'render_mode must be "rgb_array" or None, not {render_mode!r}')
        # Spaces carry their own random state, so every environment needs its own.
        self.observation_space = copy.deepcopy(OBSERVATION_SPACE)
        self.action_space = copy.deepcopy(ACTION_SPACE)
        self.render_mode = render_mode
        self.game = Pixelcopter(num_envs=1)
        self._waiting = True  # for a reset: not started yet, or ended

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode. Returns the observation (7,) float32 and an empty info."""
        super().reset(seed=seed)
        self.game.reset(np.array([0]), [self.np_random])
        self._waiting = False
        return self.game.observe()[0].astype(np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Play one frame. Raises ValueError for an action outside its space, ResetNeeded after the end."""
        if not self.action_space.contains(action):
            raise ValueError(f"action must be an integer in {self.action_space}, not {action!r}")
        if self._waiting:
            raise ResetNeeded("call reset() before step(): the game has not started or is over")
        rewards, terminated = self.game.step(np.array([action]), [self.np_random])
        self._waiting = bool(terminated[0])
        obs = self.game.observe()[0].astype(np.float32)
        return obs, float(rewards[0]), self._waiting, False, {}

    def render(self) -> np.ndarray | None:
        """The current frame (480, 480, 3) uint8, or None without a render mode."""
        return self.game.draw(0) if self.render_mode == "rgb_array" else None


class PixelcopterVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """N games in one batch; what it returns is what `SyncVectorEnv` over N single environments returns."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30, "autoreset_mode": AutoresetMode.NEXT_STEP}

    def __init__(
        self,
        num_envs: int = 1,
        max_episode_steps: int | None = None,
        render_mode: str | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
    ) -> None:
        """Without `max_episode_steps` there is no time limit. Raises ValueError for an unknown mode."""
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f'render_mode must be "rgb_array" or None, not {render_mode!r}')
        self.num_envs = num_envs
        self.max_episode_steps = max_episode_steps
        self.render_mode = render_mode
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        self.single_observation_space = copy.deepcopy(OBSERVATION_SPACE)
        self.single_action_space = copy.deepcopy(ACTION_SPACE)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.game = Pixelcopter(num_envs)
        self._steps = np.zeros(num_envs, dtype=np.int64)
        self._waiting = np.ones(num_envs, dtype=bool)  # for a reset: not started yet, or ended
        streams = [seeding.np_random() for _ in range(num_envs)]
        self._rngs, self._seeds = [rng for rng, _ in streams], [seed for _, seed in streams]
        self._unseen = np.random.default_rng(0)

    @property
    def np_random(self) -> tuple[np.random.Generator, ...]:
        """The N random streams, one for each game."""
        return tuple(self._rngs)

    @np_random.setter
    def np_random(self, value: Sequence[np.random.Generator]) -> None:
        self._rngs, self._seeds = list(value), [-1] * self.num_envs

    @property
    def np_random_seed(self) -> tuple[int, ...]:
        """The seed of each game's stream; -1 where the stream was set from outside."""
        return tuple(self._seeds)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start all games, or those where `options["reset_mask"]`, (N,) bool, is true.

        An integer `seed` seeds game i with seed + i, a list each game with its own entry; None leaves the
        random streams where they are. Returns observations (N, 7) float32 and an empty info.
        Raises ValueError for a list or mask of the wrong length.
        """
        seeds = [seed + i for i in range(self.num_envs)] if isinstance(seed, int) else seed
        seeds = [None] * self.num_envs if seeds is None else list(seeds)
        mask = (options or {}).get("reset_mask", np.ones(self.num_envs, dtype=bool))
        if len(seeds) != self.num_envs or np.shape(mask) != (self.num_envs,):
            raise ValueError(
                f"seeds and reset_mask must have one entry for each of the {self.num_envs} games"
            )
        envs = np.flatnonzero(mask)
        for i in envs:
            if seeds[i] is not None:
                self._rngs[i], self._seeds[i] = seeding.np_random(seeds[i])
        self._start(envs)
        return self.game.observe().astype(np.float32), {}

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Play one frame of all games.

        actions (N,) -> observations (N, 7) float32, rewards (N,), terminated (N,), truncated (N,), infos.
        SAME_STEP: a game that ended returns the first observation of its next episode; the last one of the
        old episode is `infos["final_obs"][i]`, and `infos["_final_obs"][i]` is true. NEXT_STEP: the next call
        resets it and ignores its action. DISABLED: the caller resets it, with a `reset_mask`.
        Raises ResetNeeded where that is missing, and ValueError for actions of a wrong shape, type or value.
        """
        actions = np.asarray(actions)
        if actions.shape != (self.num_envs,) or not self._valid(actions):
            raise ValueError(f"actions must be {self.num_envs} integers, each in {self.single_action_space}")
        resetting, rngs = np.flatnonzero(self._waiting), self._rngs
        if resetting.size:
            if self.autoreset_mode != AutoresetMode.NEXT_STEP:
                raise ResetNeeded(
                    f"call reset() before step(): games {resetting.tolist()} have not started or are over"
                )
            # These games play one more frame that nobody sees. It must not touch their random streams.
            rngs = [
                self._unseen if waiting else rng for waiting, rng in zip(self._waiting, rngs, strict=True)
            ]

        rewards, terminated = self.game.step(actions, rngs)
        self._steps += 1
        if self.max_episode_steps is None:
            truncated = np.zeros(self.num_envs, dtype=bool)
        else:
            truncated = self._steps >= self.max_episode_steps
        if resetting.size:
            rewards[resetting], terminated[resetting], truncated[resetting] = 0.0, False, False
            self._start(resetting)

        infos: dict[str, Any] = {}
        ended = terminated | truncated
        obs = self.game.observe().astype(np.float32)
        if not ended.any():
            return obs, rewards, terminated, truncated, infos
        if self.autoreset_mode == AutoresetMode.SAME_STEP:
            envs = np.flatnonzero(ended)
            final_obs = np.full(self.num_envs, None, dtype=object)
            for i in envs:
                final_obs[i] = obs[i]
            infos = {
                "final_obs": final_obs,
                "_final_obs": ended,
                "final_info": {},
                "_final_info": ended.copy(),
            }
            self._start(envs)
            obs = self.game.observe().astype(np.float32)  # a new array: final_obs holds rows of the old one
        else:
            self._waiting = ended
        return obs, rewards, terminated, truncated, infos

    def render(self) -> tuple[np.ndarray, ...] | None:
        """The N current frames, or None without a render mode."""
        if self.render_mode is None:
            return None
        return tuple(self.game.draw(i) for i in range(self.num_envs))

    def _start(self, envs: np.ndarray) -> None:
        self.game.reset(envs, self._rngs)
        self._steps[envs] = 0
        self._waiting[envs] = False

    def _valid(self, actions: np.ndarray) -> bool:
        integers = np.issubdtype(actions.dtype, np.integer)
        return bool(integers and actions.min() >= 0 and actions.max() < self.single_action_space.n)


gym.register(
    id="Pixelcopter-v0",
    entry_point=f"{__name__}:PixelcopterEnv",
    vector_entry_point=f"{__name__}:PixelcopterVectorEnv",
    max_episode_steps=10_000,
)
