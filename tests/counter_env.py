"""A tiny environment whose right answers are known: it counts its steps and ends as it is told."""

import gymnasium as gym
import numpy as np


class CounterEnv(gym.Env):
    """Observes [episode, step]; pays 1, 2, 3, … for the steps of an episode; ends after `length` steps.

    ending: "terminated", "truncated", "both" or "neither" (the episode never ends). The reward does not
    depend on the action, so that returns are known whatever the policy does.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, ending: str = "terminated", length: int = 3, render_mode: str | None = None) -> None:
        self.ending, self.length, self.render_mode = ending, length, render_mode
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = gym.spaces.Discrete(2)
        self.episode = -1

    def observe(self) -> np.ndarray:
        return np.array([self.episode, self.step_count], dtype=np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode += 1
        self.step_count = 0
        return self.observe(), {}

    def step(self, action):
        self.step_count += 1
        end = self.step_count == self.length
        terminated = end and self.ending in ("terminated", "both")
        truncated = end and self.ending in ("truncated", "both")
        return self.observe(), float(self.step_count), terminated, truncated, {}

    def render(self):
        return np.full((64, 64, 3), 10 * self.step_count % 256, dtype=np.uint8)


class BrokenEnv(CounterEnv):
    """Pays NaN from its 40th step on."""

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        self.total_steps = getattr(self, "total_steps", 0) + 1
        return obs, reward if self.total_steps < 40 else float("nan"), terminated, truncated, info


class BrokenBoxEnv(BrokenEnv):
    """The same with continuous actions."""

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.action_space = gym.spaces.Box(-1, 1, (1,), np.float32)


class TupleEnv(CounterEnv):
    """Observes a pair of integers."""

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.observation_space = gym.spaces.Tuple((gym.spaces.Discrete(2), gym.spaces.Discrete(3)))


class DictEnv(CounterEnv):
    """Observes a dictionary, which no script reads."""

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.observation_space = gym.spaces.Dict({"x": gym.spaces.Discrete(2)})


class From1Env(CounterEnv):
    """States and actions are counted from 1, or vectors observed and actions counted from 1."""

    def __init__(self, vectors=False, **kwargs) -> None:
        super().__init__(**kwargs)
        self.action_space = gym.spaces.Discrete(2, start=1)
        if not vectors:
            self.observation_space = gym.spaces.Discrete(2, start=1)


class ImageEnv(CounterEnv):
    """Observes pixels."""

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.observation_space = gym.spaces.Box(0, 255, (84, 84, 3), np.uint8)


class PointEnv(CounterEnv):
    """Observes one number, without an axis."""

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.observation_space = gym.spaces.Box(-1, 1, (), np.float32)


class BlindEnv(CounterEnv):
    """Draws nothing."""

    metadata = {"render_modes": []}

    def render(self):
        return None


for ending in ("terminated", "truncated", "both", "neither"):
    gym.register(f"Counter-{ending}-v0", entry_point="counter_env:CounterEnv", kwargs={"ending": ending})
gym.register("Broken-v0", entry_point="counter_env:BrokenEnv")
gym.register("BrokenBox-v0", entry_point="counter_env:BrokenBoxEnv")
gym.register("Tuple-v0", entry_point="counter_env:TupleEnv")
gym.register("Dict-v0", entry_point="counter_env:DictEnv")
gym.register("From1-v0", entry_point="counter_env:From1Env")
gym.register("From1Box-v0", entry_point="counter_env:From1Env", kwargs={"vectors": True})
gym.register("Image-v0", entry_point="counter_env:ImageEnv")
gym.register("Blind-v0", entry_point="counter_env:BlindEnv")
gym.register("Point-v0", entry_point="counter_env:PointEnv")
