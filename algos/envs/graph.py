"""Graph: walk from node to node along arrows to a goal, and be there in time.

    gym.make("envs.graph:Graph-v0")                 from a script in algos/; the import registers the id

The shortest way through a graph is the example with which the paper of the decision transformer begins
(https://arxiv.org/abs/2106.01345, section 1 and figure 2): all that is known are random walks, few of which
arrive, and hardly one by the shortest way.

The graph is drawn by chance, and stays the same for one graph_seed: an arrow leads from one node to another
with the probability edge_probability, independently of all others. Node 0 is the goal. Graphs are drawn until
every node has a way to the goal of at most max_steps arrows, so d(s), the length of the shortest one, is at
most max_steps:

    d(0) = 0,    d(s) = 1 + min d(s') over the arrows s → s'                                              (1)

Observation, an integer: the number of the node, 0 to n − 1.
Action:  the number of the node to go to. If no arrow leads there, the walker stays where it is.
Reward:  −1 a step, so a way of k steps that arrives returns −k; late_reward on top if the time is up.
Ending:  `terminated` at the goal, or elsewhere after max_steps steps: to be late is part of the task, as bad
         as late_reward says. (In the paper, a walk that does not arrive has the return −∞.)
Start:   any node but the goal, all equally likely; reset(options={"start": s}) starts at s.
Info:    "action_mask", (n,) int8, is 1 for the nodes to which an arrow leads, so that a random walk needs no
         luck to move: action_space.sample(info["action_mask"]). At the reset, "best_return" is −d(start).
Options: num_nodes n (20), edge_probability (0.1), max_steps (10), late_reward (−10), graph_seed (1).
"""

from __future__ import annotations

import math
from typing import Any

import gymnasium as gym
import numpy as np

GREY, DARK, WHITE, GREEN = (110, 110, 110), (30, 30, 34), (255, 255, 255), (120, 240, 80)
COLUMN, HEIGHT, RADIUS = 44, 320, 8  # of the picture, px
MAX_DRAWS = 100_000  # graphs of up to 20 nodes that are drawn before the options are said to be impossible


def distances_to(goal: int, arrows: np.ndarray) -> np.ndarray:
    """d(s) of equation (1) for every node, (n,) float: breadth first from the goal, against the arrows.

    arrows: (n, n) bool, true where an arrow leads from the row's node to the column's. Without a way: inf.
    """
    distances = np.full(len(arrows), np.inf)
    reached = np.zeros(len(arrows), dtype=bool)
    reached[goal] = True
    steps = 0
    frontier = reached.copy()
    while frontier.any():
        distances[frontier] = steps
        frontier = arrows[:, frontier].any(1) & ~reached  # nodes with an arrow into the frontier
        reached |= frontier
        steps += 1
    return distances


class GraphEnv(gym.Env[int, int]):
    """The graph as a Gymnasium environment. arrows: (n, n) bool; distances: (n,), d(s) of equation (1)."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 2}
    GOAL = 0

    def __init__(
        self,
        num_nodes: int = 20,
        edge_probability: float = 0.1,
        max_steps: int = 10,
        late_reward: float = -10.0,
        graph_seed: int = 1,
        render_mode: str | None = None,
    ) -> None:
        """Raises ValueError for options out of range, or if they hardly ever give a graph that will do."""
        if not isinstance(num_nodes, int) or not 2 <= num_nodes <= 1000:
            raise ValueError(f"num_nodes must be an integer from 2 to 1000, not {num_nodes!r}")
        if not isinstance(edge_probability, int | float) or not 0 < edge_probability <= 1:
            raise ValueError(f"edge_probability must be above 0 and at most 1, not {edge_probability!r}")
        if not isinstance(max_steps, int) or max_steps < 1:
            raise ValueError(f"max_steps must be a positive integer, not {max_steps!r}")
        if not isinstance(late_reward, int | float) or not math.isfinite(late_reward):
            raise ValueError(f"late_reward must be a finite number, not {late_reward!r}")
        if not isinstance(graph_seed, int) or graph_seed < 0:
            raise ValueError(f"graph_seed must be an integer of at least 0, not {graph_seed!r}")
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f'render_mode must be "rgb_array" or None, not {render_mode!r}')
        self.num_nodes = num_nodes
        self.max_steps = max_steps
        self.late_reward = float(late_reward)
        self.render_mode = render_mode
        self.observation_space = gym.spaces.Discrete(num_nodes)
        self.action_space = gym.spaces.Discrete(num_nodes)
        self.arrows = self._draw(edge_probability, graph_seed)
        self.distances = distances_to(self.GOAL, self.arrows)
        self._masks = self.arrows.astype(np.int8)
        self.node = self.GOAL
        self.steps = max_steps  # nothing has begun
        self.path: list[int] = []  # nodes of this episode

    def _draw(self, edge_probability: float, graph_seed: int) -> np.ndarray:
        """The first of the seed's graphs in which every node has a way to the goal in time."""
        rng = np.random.default_rng(graph_seed)
        # A large graph takes longer to draw: after so many, all sizes are refused within seconds.
        draws = min(MAX_DRAWS, max(100, MAX_DRAWS * 400 // self.num_nodes**2))
        for _ in range(draws):
            arrows = rng.random((self.num_nodes, self.num_nodes)) < edge_probability
            np.fill_diagonal(arrows, False)
            # The cheap half of the condition first: most graphs have a node that no arrow leaves.
            if arrows[1:].any(1).all() and distances_to(self.GOAL, arrows).max() <= self.max_steps:
                arrows[self.GOAL] = False  # nobody leaves the goal
                return arrows
        raise ValueError(f"of {draws:,} graphs, none had a way to the goal in time from every node")

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[int, dict[str, Any]]:
        """Start at a random node or at options["start"], ValueError if that is the goal or no node."""
        super().reset(seed=seed)
        start = (options or {}).get("start")
        if start is None:
            start = self.np_random.integers(1, self.num_nodes)
        elif start not in range(1, self.num_nodes):
            raise ValueError(f"start must be a node from 1 to {self.num_nodes - 1}, not {start!r}")
        self.node = int(start)
        self.steps = 0
        self.path = [self.node]
        best = -float(self.distances[self.node])
        return self.node, {"action_mask": self._masks[self.node].copy(), "best_return": best}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        """Go on. Raises ValueError for an action that is no node, ResetNeeded after the end."""
        if not self.action_space.contains(action):
            raise ValueError(f"action must be a node from 0 to {self.num_nodes - 1}, not {action!r}")
        if self.node == self.GOAL or self.steps == self.max_steps:
            raise gym.error.ResetNeeded("the walk has ended, or has not begun: call reset")
        if self.arrows[self.node, action]:
            self.node = int(action)
        self.steps += 1
        self.path.append(self.node)
        arrived = self.node == self.GOAL
        late = not arrived and self.steps == self.max_steps
        reward = -1.0 + (self.late_reward if late else 0.0)
        return self.node, reward, arrived or late, False, {"action_mask": self._masks[self.node].copy()}

    def render(self) -> np.ndarray | None:
        """The graph, (HEIGHT, width, 3) uint8: a column for each distance from the goal (green, right).

        Grey lines are arrows, brighter at their head; white is the way so far and, filled, the walker.
        """
        if self.render_mode is None:
            return None
        columns = int(self.distances.max()) + 1
        frame = np.full((HEIGHT, COLUMN * columns, 3), DARK, dtype=np.uint8)
        places = np.zeros((self.num_nodes, 2))  # x, y
        for distance in range(columns):
            nodes = np.flatnonzero(self.distances == distance)
            places[nodes, 0] = COLUMN * (columns - distance - 0.5)
            # Half a place lower in every other column, so that few lines run through a node.
            places[nodes, 1] = HEIGHT * (np.arange(len(nodes)) + 0.4 + 0.2 * (distance % 2)) / len(nodes)
        for tail, head in np.argwhere(self.arrows):
            self._line(frame, places[tail], places[head], GREY)
        for tail, head in zip(self.path, self.path[1:], strict=False):
            self._line(frame, places[tail], places[head], WHITE)
        y, x = np.mgrid[: frame.shape[0], : frame.shape[1]]
        for node, (node_x, node_y) in enumerate(places):
            distance = np.hypot(x - node_x, y - node_y)
            frame[distance <= RADIUS] = GREEN if node == self.GOAL else GREY
            if node in self.path:
                frame[(distance <= RADIUS) & (distance > RADIUS - 3)] = WHITE
            if node == self.node:
                frame[distance <= RADIUS - 3] = WHITE
        return frame

    @staticmethod
    def _line(frame: np.ndarray, tail: np.ndarray, head: np.ndarray, colour: tuple[int, int, int]) -> None:
        """A line of one pixel from tail to head, each (2,), that grows from 40% to full brightness."""
        share = np.linspace(0, 1, 2 * max(frame.shape))[:, None]  # of the way
        x, y = (tail + share * (head - tail)).astype(int).T
        frame[y, x] = np.array(DARK) + (0.4 + 0.6 * share) * (np.array(colour) - DARK)


gym.register(id="Graph-v0", entry_point=f"{__name__}:GraphEnv")
