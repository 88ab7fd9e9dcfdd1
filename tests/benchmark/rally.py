"""Rally, a pixel game for DQN's ablation: long enough to need looking ahead, small enough for minutes.

A ball falls through 12 × 12 cells of 7 pixels, one row and one column a step, off the side walls. A paddle
of two cells on the lowest row stays (action 0), moves left (1) or right (2). A catch gives 1 and a new ball
from a random column; a miss gives −1 and ends the game (`terminated`); after 20 catches it is `truncated`. A
fall takes 11 steps, so the best return is 20 after 220 steps; who never moves averages about −0.8. An
evaluation replaces one move in a hundred by a random one: then even who goes straight to where the ball will
land falls short of 20, as this shows:

    python tests/benchmark/rally.py

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

    def best_actions(self):
        """Straight to where the ball will land, (N,): the paddle can always be there in time."""
        last = CELLS - 1
        # As if the ball went to the far wall and back, round and round, without ever turning.
        place = (np.where(self.drift > 0, self.ball, 2 * last - self.ball) + last - self.row) % (2 * last)
        landing = np.where(place <= last, place, 2 * last - place)
        return np.where(self.paddle > landing, 1, np.where(self.paddle + 1 < landing, 2, 0))


def best_play(epsilon: float, games: int) -> np.ndarray:
    """Returns (games,) of who takes the best actions, but random ones with probability epsilon."""
    envs = Rally(games, AutoresetMode.SAME_STEP, reward_clipping=False)
    envs.reset(seed=0)
    rng = np.random.default_rng(1)
    returns = np.zeros(games)
    ended = np.zeros(games, dtype=bool)
    while not ended.all():
        at_random = rng.random(games) < epsilon
        actions = np.where(at_random, rng.integers(3, size=games), envs.best_actions())
        _, rewards, terminated, truncated, _ = envs.step(actions)
        returns += rewards * ~ended
        ended |= terminated | truncated
    return returns


gym.register("ALE/Rally-v5", vector_entry_point=Rally)

if __name__ == "__main__":
    for epsilon in (0.0, 0.01):
        returns = best_play(epsilon, games=2000)
        share = np.mean(returns == BALLS)
        print(f"{epsilon:.0%} of random moves: mean return {returns.mean():.2f}, {share:.1%} reach {BALLS}")
