"""Pong, PLE's version: the paddle on the left plays the computer's on the right, up to 11 points.

    gym.make("envs.pong:PongPLE-v0")                from a script in algos/; the import registers the id

The game comes from the PyGame Learning Environment (PLE, MIT licence, copyright (c) 2016 Norman Tasfi,
https://github.com/ntasfi/PyGame-Learning-Environment), where it runs on pygame. It is on no package index,
so this file is a port to NumPy, at the original's default size of 64 x 48 pixels and 30 frames a second.
y points down. It is not Atari's Pong.

Physics, per frame of Δ = 1/30 s: ball B = 36 px/s, opponent C = 28.8 px/s; the agent's velocity u in px per
frame, its thrust P = 19.2 px per frame and second
    ball      p ← p + v·Δ; a wall turns it: vy ← −0.99·vy, and y one pixel back into the field            (1)
              a paddle turns it, where the ball's way crosses the paddle's middle line:
              vx ← −(vx + B/20);  vy ← vy + 2·u (agent only) + U(−0.0005, 0.0005);  x one pixel off       (2)
    agent     u ← 0.9·(u + a·Δ), a ∈ {−P, +P, 0};  y ← y + u, stopped at the walls                        (3)
    opponent  y ← y ± C·Δ toward the ball while it comes nearer in the opponent's half, else ± C·Δ/4
              toward the middle                                                                           (4)
The opponent has its 0.96 px a frame at once. The agent has more from its second frame on, and 4.4 on the way
from wall to wall. A steep ball is faster than the opponent, and only a moving paddle makes one (2).

Observation, 7 floats:
    0  agent's y                   2  opponent's y                     3, 4  ball's x, y
    1  agent's velocity u                                              5, 6  ball's vx, vy
Action:  0 up, 1 down, 2 nothing, for one frame.
Reward:  +1 for a point, −1 for a point of the opponent; the last point of a match counts +6 or −6.
Ending:  `terminated` when somebody has 11 points. `truncated` after 5,000 frames.

As in the original: constants, order within a frame, order of random draws, and its quirks: after a point the
paddles rest for a frame, and the ball is served at the height at which it left the field. Departures: the
time limit (the original has none), the observation as a float32 vector instead of a dictionary, NumPy's
`Generator` instead of `RandomState` (another match for the same seed), no pygame.

Example:
    envs = gym.make_vec("envs.pong:PongPLE-v0", num_envs=64,
                        vectorization_mode="vector_entry_point", autoreset_mode=AutoresetMode.SAME_STEP)
After `envs.reset(seed=s)`, game i is exactly what a single environment plays after `reset(seed=s + i)`.

Symbols: N games at once.
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

W, H = 64, 48  # screen, px
DT = 1000 / 30 / 1000  # one frame, s
# Products, not decimals: 0.6·48 comes out below 28.8, and now and then the opponent's rule meets equality.
BALL_SPEED, AGENT_SPEED, OPPONENT_SPEED = 0.75 * H, 0.4 * H, 0.6 * H  # px/s; the agent's: see (3)
BALL_RADIUS = round(0.03 * H)
PADDLE_W, PADDLE_H = round(0.023 * W), round(0.15 * H)
AGENT_X, OPPONENT_X = round(0.0625 * W), W - round(0.0625 * W)
LOWEST, HIGHEST = PADDLE_H / 2, H - PADDLE_H / 2  # a paddle's y
POINTS_TO_WIN, WIN_REWARD = 11, 5.0
THRUST = np.array([-AGENT_SPEED, AGENT_SPEED, 0.0])  # of the actions up, down, nothing
AGENT, OPPONENT = 0, 1  # columns of the score

WHITE = (255, 255, 255)
SCALE = 10  # a rendered pixel is 10 x 10 pixels of the frame

# vy has no limit of its own, but 5,000 frames leave time for at most 60 hits, each worth at most 11.6 px/s.
OBSERVATION_SPACE = gym.spaces.Box(
    low=np.array([0, -6, 0, -W, -H, -1.1 * BALL_SPEED, -20 * BALL_SPEED], np.float32),
    high=np.array([H, 6, H, 2 * W, 2 * H, 1.1 * BALL_SPEED, 20 * BALL_SPEED], np.float32),
)
ACTION_SPACE = gym.spaces.Discrete(3)


class Pong:
    """N games side by side. Positions are centres, in pixels. The caller brings N random generators."""

    def __init__(self, num_envs: int) -> None:
        self.score = np.zeros((num_envs, 2), dtype=np.int64)
        self.agent_y, self.agent_v = np.zeros(num_envs), np.zeros(num_envs)  # v in px per frame
        self.opponent_y = np.zeros(num_envs)
        self.ball_x, self.ball_y = np.zeros(num_envs), np.zeros(num_envs)
        self.ball_vx, self.ball_vy = np.zeros(num_envs), np.zeros(num_envs)  # px/s
        self.last_x, self.last_y = np.zeros(num_envs), np.zeros(num_envs)  # the ball one frame ago

    def reset(self, envs: np.ndarray, rngs: Sequence[np.random.Generator]) -> None:
        """Start the games with the indices `envs` anew. `rngs` are the generators of all N games."""
        self.score[envs] = 0
        self.agent_y[envs] = self.opponent_y[envs] = self.ball_y[envs] = H / 2
        self.agent_v[envs] = 0.0
        for i in envs:
            self._serve(i, 1.0 if rngs[i].random() > 0.5 else -1.0, rngs[i])

    def step(self, actions: np.ndarray, rngs: Sequence[np.random.Generator]) -> tuple[np.ndarray, np.ndarray]:
        """Play one frame of all games. actions (N,) -> rewards (N,) float64, terminated (N,) bool."""
        self._move_ball(rngs)

        rewards = (self.ball_x >= W).astype(np.float64) - (self.ball_x <= 0)
        terminated = np.zeros(len(rewards), dtype=bool)
        paused = rewards != 0
        for i in np.flatnonzero(paused):
            winner = AGENT if rewards[i] > 0 else OPPONENT
            self.score[i, winner] += 1
            self._serve(i, rewards[i], rngs[i])  # toward the side that lost the point
            if self.score[i, winner] == POINTS_TO_WIN:
                rewards[i] *= 1 + WIN_REWARD
                terminated[i] = True

        self._move_paddles(actions, paused)
        return rewards, terminated

    def observe(self) -> np.ndarray:
        """The observations of all games in double precision, (N, 7)."""
        obs = np.empty((len(self.ball_x), 7))
        obs[:, 0] = self.agent_y
        obs[:, 1] = self.agent_v
        obs[:, 2] = self.opponent_y
        obs[:, 3] = self.ball_x
        obs[:, 4] = self.ball_y
        obs[:, 5] = self.ball_vx
        obs[:, 6] = self.ball_vy
        return obs

    def draw(self, env: int) -> np.ndarray:
        """One game's picture, (480, 640, 3) uint8."""
        frame = np.zeros((H, W, 3), dtype=np.uint8)

        def fill(x: float, y: float, width: int, height: int) -> None:
            left, top = int(x) - width // 2, int(y) - height // 2
            frame[max(0, top) : max(0, top + height), max(0, left) : max(0, left + width)] = WHITE

        fill(AGENT_X, self.agent_y[env], PADDLE_W, PADDLE_H)
        fill(OPPONENT_X, self.opponent_y[env], PADDLE_W, PADDLE_H)
        fill(self.ball_x[env], self.ball_y[env], 2 * BALL_RADIUS, 2 * BALL_RADIUS)
        return frame.repeat(SCALE, axis=0).repeat(SCALE, axis=1)

    def _serve(self, i: int, direction: float, rng: np.random.Generator) -> None:
        # y stays as it is: the ball comes in at the height at which it left.
        self.ball_x[i] = W / 2
        self.ball_vx[i] = BALL_SPEED * direction
        self.ball_vy[i] = rng.random() * BALL_SPEED - 0.5 * BALL_SPEED

    def _move_ball(self, rngs: Sequence[np.random.Generator]) -> None:
        self.ball_x += self.ball_vx * DT  # (1)
        self.ball_y += self.ball_vy * DT
        left = self.ball_x <= AGENT_X + PADDLE_W
        at_paddle = np.flatnonzero(left | (self.ball_x >= OPPONENT_X - PADDLE_W))
        if at_paddle.size:
            for i in at_paddle[self._crosses_paddle(at_paddle, left[at_paddle])]:  # (2)
                if left[i]:
                    self.ball_x[i] += BALL_RADIUS
                    self.ball_vy[i] += 2.0 * self.agent_v[i]
                else:
                    self.ball_x[i] -= BALL_RADIUS
                self.ball_vx[i] = -(self.ball_vx[i] + 0.05 * BALL_SPEED)
                self.ball_vy[i] += rngs[i].random() * 0.001 - 0.0005

        for push in (1.0, -1.0):
            wall = self.ball_y - BALL_RADIUS <= 0 if push > 0 else self.ball_y + BALL_RADIUS >= H
            self.ball_vy[wall] *= -0.99
            self.ball_y[wall] += push
        self.last_x[:], self.last_y[:] = self.ball_x, self.ball_y

    def _crosses_paddle(self, envs: np.ndarray, left: np.ndarray) -> np.ndarray:
        """Whether the ball's way in the games `envs` crosses the left (else the right) paddle's middle line.

        Segments (x₀, y₀) + t·(Δx, Δy) and (x₂, y₂) + s·(0, h) meet where 0 ≤ s ≤ 1 and 0 ≤ t ≤ 1.
        """
        x0, y0 = self.last_x[envs], self.last_y[envs]
        dx, dy = self.ball_x[envs] - x0, self.ball_y[envs] - y0
        paddle_y = np.where(left, self.agent_y[envs], self.opponent_y[envs])
        x2 = np.where(left, AGENT_X + PADDLE_W / 2, OPPONENT_X - PADDLE_W / 2)
        y2 = paddle_y - PADDLE_H / 2
        h = paddle_y + PADDLE_H / 2 - y2
        determinant = dx * h
        s = (-dy * (x0 - x2) + dx * (y0 - y2)) / determinant
        t = -h * (x0 - x2) / determinant
        return (s >= 0) & (s <= 1) & (t >= 0) & (t <= 1)

    def _move_paddles(self, actions: np.ndarray, paused: np.ndarray) -> None:
        agent_v = (self.agent_v + THRUST[actions] * DT) * 0.9  # (3)
        agent_y = self.agent_y + agent_v
        agent_v[(agent_y <= LOWEST) | (agent_y >= HIGHEST)] = 0.0
        self.agent_v = np.where(paused, self.agent_v, agent_v)
        self.agent_y = np.where(paused, self.agent_y, np.clip(agent_y, LOWEST, HIGHEST))

        chasing = (self.ball_vx >= 0) & (self.ball_x >= W / 2)  # (4)
        speed = np.where(chasing, OPPONENT_SPEED, OPPONENT_SPEED / 4)
        speed[self.opponent_y > np.where(chasing, self.ball_y, H / 2)] *= -1.0
        # It is kept inside before it moves, so it can stick out by one frame's way.
        opponent_y = np.clip(self.opponent_y, LOWEST, HIGHEST) + speed * DT
        self.opponent_y = np.where(paused, self.opponent_y, opponent_y)


class PongEnv(gym.Env[np.ndarray, int]):
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
        self.game = Pong(num_envs=1)
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
        """The current frame (480, 640, 3) uint8, or None without a render mode."""
        return self.game.draw(0) if self.render_mode == "rgb_array" else None


class PongVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
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
        self.game = Pong(num_envs)
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
    id="PongPLE-v0",
    entry_point=f"{__name__}:PongEnv",
    vector_entry_point=f"{__name__}:PongVectorEnv",
    max_episode_steps=5_000,
)
