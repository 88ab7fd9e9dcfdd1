"""Rally, a pixel game for DQN's ablation: long enough to need looking ahead, small enough for minutes.

A ball falls through 12 × 12 cells of 7 pixels, one row and one column a step, off the side walls. A paddle
of two cells on the lowest row stays (action 0), moves left (1) or right (2). A catch gives 1 and a new ball
from a random column; a miss gives −1 and ends the game (`terminated`); after 20 catches it is `truncated`. A
fall takes 11 steps, so the best return is 20 after 220 steps; who never moves averages about −0.8.

Registered as ALE/Rally-v5, with the options of `AtariVectorEnv` that dqn_atari.py sets and SAME_STEP.
"""

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode

CELLS, PIXELS, BALLS = 12, 7, 20


class Rally(gym.vector.VectorEnv):
    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(self, num_envs, autoreset_mode=None, reward_clipping=None, **options):
        assert autoreset_mode is AutoresetMode.SAME_STEP and reward_clipping is False
        self.num_envs = num_envs
        self.single_observation_space = gym.spaces.Box(0, 255, (4, CELLS * PIXELS, CELLS * PIXELS), np.uint8)
        self.single_action_space = gym.spaces.Discrete(3)
        self.action_space = gym.spaces.MultiDiscrete([3] * num_envs)
        self.stacks = np.zeros((num_envs, 4, CELLS * PIXELS, CELLS * PIXELS), dtype=np.uint8)
        self.ball, self.drift, self.paddle, self.caught = (np.zeros(num_envs, dtype=int) for _ in range(4))

    def reset(self, *, seed=None, options=None):
        self.rng = np.random.default_rng(seed)
        self.row = np.zeros(self.num_envs, dtype=int)
        self.begin(np.ones(self.num_envs, dtype=bool))
        return self.stacks.copy(), {"lives": np.zeros(self.num_envs, dtype=np.int32)}

    def begin(self, who):
        """New games in the environments of the mask `who` (N,)."""
        self.serve(who)
        self.paddle[who] = self.rng.integers(CELLS - 1, size=who.sum())
        self.caught[who], self.stacks[who] = 0, 0
        self.draw(who)

    def serve(self, who):
        self.row[who] = 0
        self.ball[who] = self.rng.integers(CELLS, size=who.sum())
        self.drift[who] = self.rng.choice((-1, 1), size=who.sum())

    def draw(self, who):
        self.stacks[who] = np.roll(self.stacks[who], -1, axis=1)
        cells = np.zeros((self.num_envs, CELLS, CELLS), dtype=np.uint8)
        envs = np.arange(self.num_envs)
        cells[envs, self.row, self.ball] = 255
        cells[envs, -1, self.paddle] = cells[envs, -1, self.paddle + 1] = 255
        self.stacks[who, -1] = cells[who].repeat(PIXELS, axis=1).repeat(PIXELS, axis=2)

    def step(self, actions):
        everyone = np.ones(self.num_envs, dtype=bool)
        self.paddle = np.clip(self.paddle + np.array([0, -1, 1])[actions], 0, CELLS - 2)
        self.drift[(self.ball + self.drift < 0) | (self.ball + self.drift >= CELLS)] *= -1
        self.ball += self.drift
        self.row += 1
        landed = self.row == CELLS - 1
        hit = landed & ((self.ball == self.paddle) | (self.ball == self.paddle + 1))
        self.draw(everyone)
        self.caught += hit
        terminated, truncated = landed & ~hit, self.caught == BALLS
        info = {"lives": np.zeros(self.num_envs, dtype=np.int32)}
        self.serve(hit)
        if (ended := terminated | truncated).any():
            info["final_obs"] = self.stacks.copy()
            self.begin(ended)
        return self.stacks.copy(), hit - 1.0 * terminated, terminated, truncated, info


gym.register("ALE/Rally-v5", vector_entry_point=Rally)
