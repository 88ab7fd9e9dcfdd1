"""Random walk: a row of states, a coin that says left or right, and a reward at either end.

    gym.make("envs.random_walk:RandomWalk-v0")      from a script in algos/; the import registers the id

It is the walk of Sutton and Barto's book (http://incompleteideas.net/book/the-book-2nd.html), example 6.2
with 5 states and section 7.1 with 19: the smallest task on which ways to learn a value can be compared,
because all its values are known. Nothing is to be decided: the policy that is judged tosses the coin, and the
coin is part of the environment. One action is left; its value is the value V(s) of the state.

    end   1   2   3  …  n   end        start in the middle, at (n + 1) / 2
     0                      n+1        the numbers of the two ends

    V(s) = left_reward + (right_reward − left_reward) · s / (n + 1)      without discounting              (1)
For V(s) must be the mean of its two neighbours; on a straight line every point is.

Observation, an integer: the number of the state, 0 to n + 1.
Action:  0 goes on.
Reward:  left_reward at the left end, right_reward at the right end, 0 elsewhere.
Ending:  `terminated` at either end. There is no time limit.
Options: num_states, an odd n (19), left_reward (−1), right_reward (1). Example 6.2 has 5, 0 and 1.
"""

from __future__ import annotations

import math
from typing import Any

import gymnasium as gym
import numpy as np

GREY, WHITE, GREEN, RED = (90, 90, 90), (255, 255, 255), (120, 240, 80), (240, 80, 80)
SQUARE, LINE = 20, 2  # a state's picture and the gap around it, px


class RandomWalkEnv(gym.Env[int, int]):
    """The walk as a Gymnasium environment."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}

    def __init__(
        self,
        num_states: int = 19,
        left_reward: float = -1.0,
        right_reward: float = 1.0,
        render_mode: str | None = None,
    ) -> None:
        """Raises ValueError for an even or impossible number of states, a bad reward or an unknown mode."""
        if not isinstance(num_states, int) or num_states < 1 or num_states % 2 == 0:
            raise ValueError(f"num_states must be an odd integer, for the walk has a middle: {num_states!r}")
        for reward in (left_reward, right_reward):
            if not isinstance(reward, int | float) or not math.isfinite(reward):
                raise ValueError(f"a reward must be a finite number, not {reward!r}")
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f'render_mode must be "rgb_array" or None, not {render_mode!r}')
        self.num_states = num_states
        self.left_reward = float(left_reward)
        self.right_reward = float(right_reward)
        self.render_mode = render_mode
        self.observation_space = gym.spaces.Discrete(num_states + 2)
        self.action_space = gym.spaces.Discrete(1)
        self.state = 0  # an end: nothing has begun

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[int, dict[str, Any]]:
        """Start in the middle. Returns the state and an empty info."""
        super().reset(seed=seed)
        self.state = (self.num_states + 1) // 2
        return self.state, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        """Toss the coin. Raises ValueError for an action other than 0, ResetNeeded after the end."""
        if action != 0:
            raise ValueError(f"action must be 0, not {action!r}")
        if self.state in (0, self.num_states + 1):
            raise gym.error.ResetNeeded("the walk has ended, or has not begun: call reset")
        self.state += 1 if self.np_random.random() < 0.5 else -1
        if self.state == 0:
            return 0, self.left_reward, True, False, {}
        if self.state == self.num_states + 1:
            return self.state, self.right_reward, True, False, {}
        return self.state, 0.0, False, False, {}

    def values(self, gamma: float = 1.0) -> np.ndarray:
        """V of the states 1 to n, (n,): solves V(s) = ½ (r + γ V(s−1)) + ½ (r + γ V(s+1)). (1) is γ = 1."""
        n = self.num_states
        matrix = np.eye(n) - gamma / 2 * (np.eye(n, k=1) + np.eye(n, k=-1))
        rewards = np.zeros(n)
        rewards[0] += self.left_reward / 2
        rewards[-1] += self.right_reward / 2
        return np.linalg.solve(matrix, rewards)

    def render(self) -> np.ndarray | None:
        """The row of states, (20, 20·(n+2), 3) uint8, the present one white; None without a render mode."""
        if self.render_mode is None:
            return None
        colours = np.full((self.num_states + 2, 3), GREY, dtype=np.uint8)
        colours[0] = RED
        colours[-1] = GREEN
        colours[self.state] = WHITE
        frame = colours[None].repeat(SQUARE, axis=0).repeat(SQUARE, axis=1)
        frame[:LINE] = frame[-LINE:] = 0
        frame.reshape(SQUARE, -1, SQUARE, 3)[:, :, :LINE] = 0
        return frame


gym.register(id="RandomWalk-v0", entry_point=f"{__name__}:RandomWalkEnv")
