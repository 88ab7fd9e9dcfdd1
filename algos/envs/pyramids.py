"""Pyramids: press a switch, topple the pyramid that appears elsewhere, touch the gold that falls from it.

A reward that chance does not find: a random agent presses the switch now and then and gets no further. The
task is that of Unity ML-Agents ("Pyramids", https://github.com/Unity-Technologies/ml-agents, Apache License
2.0), to whose authors all credit for its design belongs. This file re-creates it in plain NumPy, seen from
above, without a game engine: the same rooms, actions, rewards and observation layout, no binary, tens of
thousands of decisions a second.

From the original's files: arena, walls, spawn areas; sizes of the things; actions, turning speed, thrust and
drag; rewards; length of a decision and of an episode; the rays, their tags and the observation's layout.

Estimated by simulation: friction of the ground (0.118 m/s a step); the 30 steps until the new pyramid stands
firm; the 15 m/s that topple it and the 95 to 180 steps this takes; how far away the gold comes to lie.

Our abstraction: a flat world of axis-aligned boxes in which the agent is a disc.
  - The disc slides along what it meets: velocity into the surface is lost, the tangential part stays.
  - The brick pyramid is a single box. It topples when the agent hits it with at least 15 m/s at right angles
    to its surface, or at the 10th forward step (not necessarily in a row) that it blocks. It is seen from the
    moment the switch goes on and looks the same while it topples, but blocks the way only from 30 steps after
    the switch until it topples. Whoever stands where it appears may walk out of it. In the end its bricks
    vanish and the gold lies on the ground, clear of walls and of everything else that is solid.
  - A climbing ray has width but no height: it hits a thing only if it arrives no higher than its top and no
    lower than its foot.

World. x points right, z forward, in metres, the origin in the middle; inner faces of the outer walls at
±49.5. Four crosses and eight side walls make nine rooms. A reset shuffles nine areas: one for the agent, one
for the switch, one for the pyramid to come, six for pyramids of stone. Headings are in degrees, clockwise
from z. A step is 0.02 s.

Actions, `Discrete(5)`, held for the 5 steps of a decision: 0 nothing, 1 forward, 2 backward, 3 turn right, 4
turn left (4° a step). Turning does not turn the velocity: the agent drifts. From rest it reaches 8.3 m/s
after 5 steps, 15.1 after 10, 28.8 after 25, 39.2 after 50.

Reward. −1/5000 a step, so −0.001 a decision; the step that touches the gold gives 2 instead and ends the
episode (`terminated`). After 5,000 steps = 1,000 decisions it is `truncated`, with a return of −1. The
original's authors give 1.75 as the mean return of a trained agent.

Observation, 172 float32. A ray is a circle of radius 0.5 m sent 35 m far; as in the original's engine, it
does not see what it starts inside of. Rays of a fan: straight ahead, then right and left in turn at δ, 2δ and
3δ.

  index       content
  0–55        fan 0, level,                δ = 70/3°: 7 rays of 8 numbers
  56–111      fan 1, climbs 1 m every 7 m, δ = 65/3°: the same
  112–167     fan 2, climbs 2 m every 7 m, δ = 25°:   the same
              a ray: what it hit, one-hot over 0 block (brick), 1 wall, 2 goal (gold), 3 switchOff, 4
              switchOn, 5 stone; then 6: 1 if it hit nothing; 7: distance / 35 (1 if it hit nothing)
  168         1 if the switch is on, else 0
  169–171     velocity as the agent sees it, m/s: to its right, 0 (upward), forward

Heights in m: walls 4.52, pyramids and switch 4, gold 4 to 6 on top of its pyramid, 0 to 2 on the ground. The
climbing fans look over walls and can see the gold before it falls: fan 1 from 28 to 35 m away, fan 2 from 14
to 21 m.

`info["cell"]`: which of 9 × 9 squares of 11 m the agent is in (0 to 80; a room is 3 × 3 of them), to measure
exploration; `NUM_CELLS` is their number. `info["switch_on"]`: whether the switch is on.

    import gymnasium as gym
    from gymnasium.vector import AutoresetMode

    env = gym.make("envs.pyramids:Pyramids-v0", render_mode="rgb_array")  # the folder algos/ is on the path
    # The fast way, 64 worlds in one batch; world i is the one that env.reset(seed=1 + i) makes.
    envs = gym.make_vec("envs.pyramids:Pyramids-v0", num_envs=64, vectorization_mode="vector_entry_point",
                        autoreset_mode=AutoresetMode.SAME_STEP)
    observations, infos = envs.reset(seed=1)
    observations, rewards, terminated, truncated, infos = envs.step(envs.action_space.sample())

Shapes: N worlds, B boxes (all things there are), R = 21 rays. Coordinates come first: (2, …) is x, z.
"""

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.error import ResetNeeded
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

# Motion
STEP_SECONDS = 0.02
STEPS_PER_DECISION = 5
MAX_DECISIONS = 1000
TURN = np.array([0, 0, 0, 4, -4])  # degrees a step, by action
THRUST = np.array([0.0, 2.0, -2.0, 0.0, 0.0])  # m/s a step, by action
FORWARD = 1
DRAG = 0.96
FRICTION = 0.118  # m/s a step
# The body is 1 mm wider than the rays, so that a ray sent along a wall which the agent touches passes it.
RAY_RADIUS = 0.5
BODY_RADIUS = 0.501

# Every thing is an axis-aligned box: 20 walls, 6 stone pyramids, the switch, the brick pyramid, the gold.
INNER_FACE = 49.5
WALLS = np.array(  # centre x, centre z, half-extent x, half-extent z
    [bar for x in (-16.5, 16.5) for z in (-16.5, 16.5) for bar in ((x, z, 7.575, 0.5), (x, z, 0.5, 7.5))]
    + [(x, z, 7.25, 0.5) for x in (-42.25, 42.25) for z in (-16.5, 16.5)]
    + [(x, z, 0.5, 7.25) for x in (-16.5, 16.5) for z in (-42.25, 42.25)]
    + [(x, 0.0, 0.5, 50.5) for x in (-50.0, 50.0)]
    + [(0.0, z, 50.5, 0.5) for z in (-50.0, 50.0)]
)
NUM_WALLS, NUM_STONES = len(WALLS), 6
STONES = slice(NUM_WALLS, NUM_WALLS + NUM_STONES)
SWITCH, BRICK, GOLD = range(NUM_WALLS + NUM_STONES, NUM_WALLS + NUM_STONES + 3)
PYRAMID_HALF, SWITCH_HALF, GOLD_HALF = (2.27, 2.34), (2.0, 2.0), (1.0, 1.0)
# Half-extents x, z of every box: (2, B).
HALF = np.array([*WALLS[:, 2:], *[PYRAMID_HALF] * NUM_STONES, SWITCH_HALF, PYRAMID_HALF, GOLD_HALF]).T
BODY_HALF = HALF[:, :GOLD, None] + BODY_RADIUS + 1e-3  # what stops the agent, inflated by it, and a bit more
# Things that are not there lie where no ray reaches, which spares every computation a mask.
NOWHERE = 1000.0
AREA_CENTRES = np.array([(x, z) for x in (-30.0, 0.0, 30.0) for z in (-30.0, 0.0, 30.0)])  # (9, 2)
SPAWN_RANGE = 11.905

# The course of an episode
OFF, STANDING, TOPPLING, FALLEN = range(4)
SOLID_AFTER = 30  # steps from the switch to a brick pyramid that stands firm
TOPPLE_SPEED = 15.0  # m/s into the surface
TOPPLE_PUSHES = 10  # forward steps that the pyramid blocks
TOPPLE_STEPS = (95, 180)
GOLD_DISTANCE = (3.8, 7.0)
STEP_REWARD, GOLD_REWARD = -1 / 5000, 2.0

# Rays
RAY_LENGTH = 35.0
FAN_ANGLES = np.array([[0, d, -d, 2 * d, -2 * d, 3 * d, -3 * d] for d in (70 / 3, 65 / 3, 25.0)])  # (3, 7)
RAY_CLIMB = np.repeat([0, 1 / 7, 2 / 7], 7).astype(np.float32)  # (R,) metres up per metre
RAY_HEADINGS = np.radians(FAN_ANGLES.reshape(-1, 1) + np.arange(360))  # (R, 360)
RAY_DIRECTIONS = np.stack([np.sin(RAY_HEADINGS), np.cos(RAY_HEADINGS)]).astype(np.float32)  # (2, R, 360)
HEADINGS = np.stack([np.sin(np.radians(np.arange(360))), np.cos(np.radians(np.arange(360)))])  # (2, 360)
HALF32 = HALF.astype(np.float32)
RAY_HALF = HALF32 + np.float32(RAY_RADIUS)
TAG_BRICK, TAG_WALL, TAG_GOLD, TAG_OFF, TAG_ON, TAG_STONE, TAG_NOTHING = range(7)
TAGS = np.array([TAG_WALL] * NUM_WALLS + [TAG_STONE] * NUM_STONES + [TAG_OFF, TAG_BRICK, TAG_GOLD])  # (B,)
# Heights from which and to which the boxes reach, (B,) in m; for the gold, while it is on top of its pyramid.
BOTTOM = np.array([0.0] * GOLD + [4.0])
TOP = np.array([4.52] * NUM_WALLS + [4.0] * (GOLD - NUM_WALLS) + [6.0])
ONE_HOT = np.eye(7, dtype=np.float32)

# Picture
PICTURE_SIZE = 560  # pixels
SCALE = PICTURE_SIZE / 101  # pixels per metre: the arena with its outer walls
FLOOR, BLUE, DARK, LIGHT = (238, 235, 228), (30, 90, 220), (45, 45, 55), (175, 175, 168)
BRICK_COLOUR, WALL_COLOUR, GOLD_COLOUR = (205, 105, 40), (70, 75, 85), (245, 200, 20)
RED, GREEN, STONE_COLOUR = (215, 40, 40), (40, 170, 70), (150, 150, 150)
TAG_COLOURS = np.array([BRICK_COLOUR, WALL_COLOUR, GOLD_COLOUR, RED, GREEN, STONE_COLOUR, LIGHT])  # by tag


def slab(offset, direction, half):
    """Where straight lines enter and leave boxes: inside both their x-range and their z-range.

    Args:
        offset: centres of the boxes, seen from the lines' starting points, (2, …) in metres.
        direction: of the lines, unit length, (2, …).
        half: half-extents of the boxes, (2, …). The three broadcast against each other.

    Returns:
        Two distances, (…) each, in m, negative behind the start. A line that misses leaves before it enters.
    """
    # A direction of exactly 0 would give 0 / 0 on the rim; 1e-9 is off by less than a µm in 35 m.
    inverse = 1 / np.where(np.abs(direction) < 1e-9, np.asarray(1e-9, direction.dtype), direction)
    (middle_x, reach_x), (middle_z, reach_z) = (
        (o * i, h * np.abs(i)) for o, i, h in zip(offset, inverse, half, strict=True)
    )
    enter = np.maximum(middle_x - reach_x, middle_z - reach_z)
    leave = np.minimum(middle_x + reach_x, middle_z + reach_z)
    return enter, leave


def cast(offset, direction, half, radius):
    """How far circles can travel before they touch boxes: exact, rounded corners included.

    A circle meets a box where its centre meets the box inflated by the radius, whose corners are round. A
    line that enters the inflated box over one of the four little corner squares meets the quarter disc in it,
    or nothing at all, for whoever leaves that square without touching the disc leaves the whole inflated box.
    Any other line meets it where it would with square corners.

    Args:
        offset: centres of the boxes, seen from the circles', (2, P) in metres.
        direction: of travel, unit length, (2, P).
        half: half-extents of the boxes, (2, P).
        radius: of the circles, in metres.

    Returns:
        Distances, (P,) in metres; inf where the circle passes by, moves away or starts inside.
    """
    enter, leave = slab(offset, direction, half + radius)
    entry = direction * np.maximum(enter, 0) - offset  # seen from the middle of the box
    over_corner = np.logical_and(*(np.abs(entry) > half))
    corner_x, corner_z = offset + np.copysign(half, entry)
    miss = corner_x * direction[1] - corner_z * direction[0]  # by how much the line misses the disc's centre
    chord = radius**2 - miss**2  # half its length, squared
    to_disc = corner_x * direction[0] + corner_z * direction[1] - np.sqrt(np.maximum(chord, 0))
    distance = np.maximum(np.where(over_corner, to_disc, enter), 0)
    hit = (enter < leave) & (leave > 0) & ~(over_corner & (chord <= 0))

    # After a contact the circle may be inside the surface by a rounding error. Then it must still be stopped,
    # unlike one that starts well inside, and must not be held back when it moves along the surface or away.
    contact = direction * distance - offset
    outward = contact - np.clip(contact, -half, half)  # from the box's nearest point, as long as the radius
    approaching = outward[0] * direction[0] + outward[1] * direction[1] < -1e-7
    outside = outward[0] ** 2 + outward[1] ** 2 > (radius - 1e-4) ** 2
    return np.where(hit & approaching & outside, distance, np.inf)


class PyramidsVectorEnv(VectorEnv):
    """N independent Pyramids worlds in one batch; see the module's docstring for the task.

    Endings, `info` and `final_obs` are laid out as `gymnasium.vector.SyncVectorEnv` does it.

    Attributes:
        NUM_CELLS: how many different values `info["cell"]` can take.
    """

    GRID = 9
    NUM_CELLS = GRID * GRID
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10, "autoreset_mode": AutoresetMode.NEXT_STEP}

    def __init__(
        self,
        num_envs=1,
        render_mode=None,
        autoreset_mode=AutoresetMode.NEXT_STEP,
        max_episode_steps=MAX_DECISIONS,
    ):
        """Build the batch; call `reset` before the first `step`.

        Args:
            num_envs: N, how many worlds.
            render_mode: None or "rgb_array".
            autoreset_mode: an `AutoresetMode` or its name.
            max_episode_steps: decisions until an episode is truncated; None for never.

        Raises:
            ValueError: for an unknown render or autoreset mode.
        """
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode must be None or 'rgb_array', not {render_mode!r}")
        self.num_envs = num_envs
        self.render_mode = render_mode
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        self.max_episode_steps = np.inf if max_episode_steps is None else max_episode_steps

        high = np.r_[np.ones(21 * 8 + 1), [50.0] * 3].astype(np.float32)
        low = np.r_[np.zeros(21 * 8 + 1), [-50.0] * 3].astype(np.float32)
        self.single_observation_space = spaces.Box(low, high, dtype=np.float32)
        self.single_action_space = spaces.Discrete(5)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

        self.rngs = [None] * num_envs
        self.position = np.zeros((2, num_envs))  # m
        self.velocity = np.zeros((2, num_envs))  # m/s
        self.heading = np.zeros(num_envs, dtype=int)  # degrees
        self.centres = np.full((2, HALF.shape[1], num_envs), NOWHERE)  # (2, B, N)
        self.centres[:, :NUM_WALLS] = WALLS[:, :2].T[:, :, None]
        self.brick_spot = np.zeros((2, num_envs))  # where the brick pyramid will appear
        self.phase = np.full(num_envs, OFF)
        self.timer = np.zeros(num_envs, dtype=int)  # steps until the brick pyramid is solid, or has toppled
        self.pushes = np.zeros(num_envs, dtype=int)
        self.decisions = np.zeros(num_envs, dtype=int)
        # whether the previous step ended the episode, and no reset followed
        self.ended = np.zeros(num_envs, dtype=bool)

    @property
    def np_random(self):
        """The random generators, one for each world."""
        return tuple(self.rngs)

    def reset(self, *, seed=None, options=None):
        """Start new episodes.

        Args:
            seed: s to give world i the random stream of seed s + i; a list with one seed (or None) for each
                world; or None, which goes on with the streams there are.
            options: {"reset_mask": (N,) bool} resets only some of the worlds.

        Returns:
            Observations (N, 172) and infos.

        Raises:
            ValueError: if the number of seeds or the mask's shape is not N.
        """
        seeds = [None] * self.num_envs if seed is None else seed
        if np.ndim(seeds) == 0:
            seeds = [int(seed) + i for i in range(self.num_envs)]
        mask = np.asarray((options or {}).get("reset_mask", np.ones(self.num_envs, dtype=bool)))
        if len(seeds) != self.num_envs or mask.shape != (self.num_envs,) or mask.dtype != bool:
            raise ValueError(
                f"need one seed and one boolean of the reset mask for each of {self.num_envs} worlds"
            )
        for i in np.flatnonzero(mask):
            if seeds[i] is not None or self.rngs[i] is None:
                self.rngs[i], _ = seeding.np_random(seeds[i])
            self._reset_world(i)
        self.ended = self.ended & ~mask
        return self._observe(), self._info(mask)

    def step(self, actions):
        """Let every world take one decision, of 5 steps.

        Args:
            actions: (N,) integers 0 to 4.

        Returns:
            Observations (N, 172), rewards (N,), terminated (N,), truncated (N,) and infos.

        Raises:
            ValueError: for actions of another shape or range.
            ResetNeeded: before the first reset, or, without autoreset, in a world whose episode has ended.
        """
        if None in self.rngs:
            raise ResetNeeded("call reset before the first step")
        actions = np.asarray(actions)
        if actions.shape != (self.num_envs,) or actions.min() < 0 or actions.max() > 4:
            raise ValueError(f"actions must be {self.num_envs} integers from 0 to 4, got {actions}")
        if self.autoreset_mode == AutoresetMode.DISABLED and self.ended.any():
            raise ResetNeeded(
                f"the episodes of worlds {np.flatnonzero(self.ended)} have ended: reset them first"
            )

        starting = self.ended if self.autoreset_mode == AutoresetMode.NEXT_STEP else np.zeros_like(self.ended)
        rewards = np.zeros(self.num_envs)
        terminated = np.zeros(self.num_envs, dtype=bool)
        for _ in range(STEPS_PER_DECISION):
            active = ~(terminated | starting)
            at_gold = self._physics_step(actions, active)
            rewards += np.where(at_gold, GOLD_REWARD, STEP_REWARD) * active
            terminated |= at_gold
        self.decisions += 1
        truncated = (self.decisions >= self.max_episode_steps) & ~starting
        for i in np.flatnonzero(starting):
            self._reset_world(i)

        observations, infos = self._observe(), {}
        self.ended = terminated | truncated
        if self.autoreset_mode == AutoresetMode.SAME_STEP and self.ended.any():
            infos = {"final_info": self._info(self.ended), "_final_info": self.ended.copy()}
            infos |= {
                "final_obs": np.full(self.num_envs, None, dtype=object),
                "_final_obs": self.ended.copy(),
            }
            done = np.flatnonzero(self.ended)
            for i in done:
                infos["final_obs"][i] = observations[i].copy()
                self._reset_world(i)
            observations[done] = self._observe(done)
            self.ended = np.zeros_like(self.ended)
        return observations, rewards, terminated, truncated, infos | self._info()

    def render(self):
        """Pictures from above with the rays of fan 0, N uint8 (560, 560, 3); None without a render mode."""
        if self.render_mode is None:
            return None
        tags, distances = self._cast_rays(np.arange(self.num_envs))
        return tuple(self._draw(i, tags[i, :7], distances[i, :7]) for i in range(self.num_envs))

    def _reset_world(self, i):
        """Shuffle the areas and place everything anew in world i."""
        rng = self.rngs[i]
        areas = AREA_CENTRES[rng.permutation(9)]
        spots = (areas + rng.uniform(-SPAWN_RANGE, SPAWN_RANGE, areas.shape)).T  # (2, 9)
        self.position[:, i], self.centres[:, SWITCH, i], self.brick_spot[:, i] = spots[:, :3].T
        self.centres[:, STONES, i] = spots[:, 3:]
        self.centres[:, [BRICK, GOLD], i] = NOWHERE
        self.heading[i] = rng.integers(360)
        self.velocity[:, i] = 0.0
        self.phase[i], self.timer[i], self.pushes[i], self.decisions[i] = OFF, 0, 0, 0

    def _physics_step(self, actions, active):
        """Advance the `active` worlds (N,) by 0.02 s, not the others. Returns who touches the gold, (N,)."""
        heading = (self.heading + TURN[actions]) % 360
        velocity = (self.velocity + THRUST[actions] * HEADINGS[:, heading]) * DRAG
        speed = np.sqrt(velocity[0] ** 2 + velocity[1] ** 2)
        velocity *= np.maximum(speed - FRICTION, 0) / np.maximum(speed, FRICTION)
        position, velocity, at_switch, at_brick, impact = self._move(velocity)
        np.copyto(self.heading, heading, where=active)
        np.copyto(self.velocity, velocity, where=active)
        np.copyto(self.position, position, where=active)

        self.timer -= 1
        self.pushes += at_brick & active & (actions == FORWARD)
        pressed = at_switch & active & (self.phase == OFF)
        toppled = at_brick & active & ((impact >= TOPPLE_SPEED) | (self.pushes >= TOPPLE_PUSHES))
        fallen = active & (self.phase == TOPPLING) & (self.timer <= 0)
        for i in np.flatnonzero(pressed):
            self.phase[i], self.timer[i] = STANDING, SOLID_AFTER
            self.centres[:, [BRICK, GOLD], i] = self.brick_spot[:, i, None]
        for i in np.flatnonzero(toppled):
            self.phase[i], self.timer[i] = TOPPLING, self.rngs[i].integers(*TOPPLE_STEPS, endpoint=True)
        for i in np.flatnonzero(fallen):
            self.phase[i] = FALLEN
            self.centres[:, BRICK, i] = NOWHERE
            self.centres[:, GOLD, i] = self._gold_spot(i)

        gap = np.maximum(np.abs(self.position - self.centres[:, GOLD]) - HALF[:, GOLD, None], 0)
        return (self.phase == FALLEN) & (gap[0] ** 2 + gap[1] ** 2 <= BODY_RADIUS**2) & active

    def _move(self, velocity):
        """Move every agent for 0.02 s, sliding along what is in its way.

        The path is cast like a ray, so no speed leads through a wall: up to the first contact, then along
        that surface up to a second one.

        Args:
            velocity: (2, N) in m/s.

        Returns:
            Position (2, N); velocity (2, N) without its part into surfaces; who ran into the switch (N,); who
            ran into the brick pyramid (N,); how fast at right angles to its surface (N,) in m/s.
        """
        position, velocity = self.position.copy(), velocity.copy()
        at_switch, at_brick = np.zeros(self.num_envs, dtype=bool), np.zeros(self.num_envs, dtype=bool)
        impact = np.zeros(self.num_envs)
        passable = (self.phase != STANDING) | (self.timer > 0)

        who, path = np.arange(self.num_envs), velocity * STEP_SECONDS
        for _ in range(2):
            length = np.sqrt(path[0] ** 2 + path[1] ** 2)
            direction = path / np.maximum(length, 1e-12)
            offset = self.centres[:, :GOLD, who] - position[:, None, who]
            # Casting is for the few boxes that such a short path can reach at all.
            box, k = np.nonzero(np.logical_and(*(np.abs(offset) < BODY_HALF + length)))
            distances = np.full(offset.shape[1:], np.inf)  # (B - 1, len(who))
            distances[box, k] = cast(offset[:, box, k], direction[:, k], HALF[:, box], BODY_RADIUS)
            distances[BRICK, passable[who]] = np.inf
            distance = distances.min(axis=0)
            position[:, who] += direction * np.minimum(distance, length)
            hit = np.flatnonzero(distance < length)
            if len(hit) == 0:
                break

            box, who = distances[:, hit].argmin(axis=0), who[hit]
            from_middle = position[:, who] - self.centres[:, box, who]
            normal = from_middle - np.clip(from_middle, -HALF[:, box], HALF[:, box])
            normal /= np.sqrt(normal[0] ** 2 + normal[1] ** 2)
            into = -(velocity[0, who] * normal[0] + velocity[1, who] * normal[1])
            velocity[:, who] += normal * into
            path = direction[:, hit] * (length - distance)[hit]
            path -= normal * (path[0] * normal[0] + path[1] * normal[1])
            at_switch[who[box == SWITCH]] = True
            at_brick[who[box == BRICK]] = True
            impact[who[box == BRICK]] = np.maximum(impact[who], into)[box == BRICK]
        return position, velocity, at_switch, at_brick, impact

    def _gold_spot(self, i):
        """A place (2,) for the gold of world i: around the brick pyramid and clear of everything solid."""
        rng = self.rngs[i]
        while True:
            angle, distance = rng.uniform(0, 2 * np.pi), rng.uniform(*GOLD_DISTANCE)
            spot = self.brick_spot[:, i] + distance * np.array([np.sin(angle), np.cos(angle)])
            apart = np.abs(self.centres[:, :GOLD, i] - spot[:, None]) > HALF[:, :GOLD] + HALF[:, GOLD, None]
            if apart.any(axis=0).all():
                return spot

    def _cast_rays(self, who):
        """What the rays of worlds `who` (n,) hit.

        Returns:
            Tags (n, R), 6 for nothing, and distances (n, R) in metres, at most 35.
        """
        offset = (self.centres[:, :, who] - self.position[:, None, who]).astype(np.float32)
        direction = RAY_DIRECTIONS[:, :, self.heading[who]]  # (2, R, n)
        # Two thirds of the boxes are too far away, and of the rest few are in a ray's way: lists get shorter.
        box, k = np.nonzero(np.logical_and(*(np.abs(offset) < RAY_HALF[:, :, None] + RAY_LENGTH)))
        enter, leave = slab(offset[:, None, box, k], direction[:, :, k], RAY_HALF[:, None, box])
        ray, pair = np.nonzero((enter < leave) & (leave > 0) & (enter < RAY_LENGTH))
        box, k = box[pair], k[pair]
        distance = cast(offset[:, box, k], direction[:, ray, k], HALF32[:, box], np.float32(RAY_RADIUS))

        tag, phase = TAGS[box], self.phase[who[k]]
        tag[(box == SWITCH) & (phase != OFF)] = TAG_ON
        on_ground = (box == GOLD) & (phase == FALLEN)
        low, high = BOTTOM[box], TOP[box]
        low[on_ground], high[on_ground] = 0, 2
        height = np.minimum(distance, RAY_LENGTH) * RAY_CLIMB[ray]
        distance[(height < low) | (height >= high)] = np.inf
        nearest = np.full((7, *direction.shape[1:]), np.inf, dtype=np.float32)
        nearest[TAG_NOTHING] = RAY_LENGTH
        np.minimum.at(nearest, (tag, ray, k), distance)
        return nearest.argmin(axis=0).T, nearest.min(axis=0).T

    def _observe(self, who=None):
        """Observations (n, 172) of worlds `who` (n,), by default of all."""
        who = np.arange(self.num_envs) if who is None else who
        tags, distances = self._cast_rays(who)
        observations = np.zeros((len(who), 172), dtype=np.float32)
        rays = observations[:, :168].reshape(len(who), 21, 8)  # a view
        rays[..., :7] = ONE_HOT[tags]
        rays[..., 7] = distances / np.float32(RAY_LENGTH)
        (sin, cos), (vx, vz) = HEADINGS[:, self.heading[who]], self.velocity[:, who]
        observations[:, 168] = self.phase[who] != OFF
        observations[:, 169] = vx * cos - vz * sin
        observations[:, 171] = vx * sin + vz * cos
        return observations

    def _info(self, mask=None):
        """The info of the worlds in `mask` (N,), by default of all; 0 for the others."""
        mask = np.ones(self.num_envs, dtype=bool) if mask is None else mask
        column, row = ((self.position + INNER_FACE) // (2 * INNER_FACE / self.GRID)).astype(int)
        cell, switch_on = np.where(mask, self.GRID * row + column, 0), mask & (self.phase != OFF)
        return {"cell": cell, "_cell": mask.copy(), "switch_on": switch_on, "_switch_on": mask.copy()}

    def _draw(self, i, tags, distances):
        """The picture of world i; `tags` and `distances` (7,) are those of fan 0."""
        picture = np.full((PICTURE_SIZE, PICTURE_SIZE, 3), FLOOR, dtype=np.uint8)

        def pixel(spots):
            """Columns and rows (2, …) of spots (2, …) in metres, kept inside the picture."""
            x, z = spots
            return np.clip(np.array([x, -z]) * SCALE + PICTURE_SIZE / 2, 0, PICTURE_SIZE - 1).astype(int)

        def box(middle, half, colour):
            if np.abs(middle).max() < NOWHERE:
                (left, bottom), (right, top) = pixel(middle - half), pixel(middle + half)
                picture[top : bottom + 1, left : right + 1] = colour

        def pyramid(middle, colour):
            # Steps that get lighter towards the top.
            for share in (1.0, 0.7, 0.4):
                box(middle, HALF[:, BRICK] * share, 255 - (255 - np.array(colour)) * (0.5 + 0.5 * share))

        def disc(middle, radius, colour):
            (left, bottom), (right, top) = pixel(middle - radius), pixel(middle + radius)
            rows, columns = np.ogrid[top : bottom + 1, left : right + 1]
            from_middle = columns - (left + right) / 2, rows - (top + bottom) / 2
            inside = from_middle[0] ** 2 + from_middle[1] ** 2 <= (radius * SCALE) ** 2
            picture[top : bottom + 1, left : right + 1][inside] = colour

        middles, on = self.centres[:, :, i].T, self.phase[i] != OFF
        for k in range(NUM_WALLS):
            box(middles[k], HALF[:, k], WALL_COLOUR)
        for middle in middles[STONES]:
            pyramid(middle, STONE_COLOUR)
        box(middles[SWITCH], HALF[:, SWITCH], DARK)
        box(middles[SWITCH], HALF[:, SWITCH] - 0.4, GREEN if on else RED)
        pyramid(middles[BRICK], BRICK_COLOUR)
        box(middles[GOLD], HALF[:, GOLD], DARK)
        box(middles[GOLD], HALF[:, GOLD] - 0.2, GOLD_COLOUR)

        position, heading = self.position[:, i], self.heading[i]
        for k, (tag, distance) in enumerate(zip(tags, distances, strict=True)):
            direction = RAY_DIRECTIONS[:, k, heading]
            column, row = pixel(position[:, None] + direction[:, None] * np.arange(0, distance, 0.5 / SCALE))
            picture[row, column] = TAG_COLOURS[tag]
            if tag != TAG_NOTHING:
                disc(position + direction * distance, 0.6, TAG_COLOURS[tag])
        # Larger than it is, or the agent would be five pixels wide: a drop whose tip shows the heading.
        for share in np.linspace(0, 1, 12):
            disc(position + HEADINGS[:, heading] * 3.4 * share, 1.4 * (1 - 0.85 * share), BLUE)
        return picture


class PyramidsEnv(gym.Env):
    """One Pyramids world: a batch of one without its batch axis. `gym.make` adds the time limit."""

    NUM_CELLS = PyramidsVectorEnv.NUM_CELLS
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, render_mode=None):
        """Build the world; `render_mode` is None or "rgb_array"."""
        self.batch = PyramidsVectorEnv(1, render_mode, AutoresetMode.DISABLED, max_episode_steps=None)
        self.render_mode = render_mode
        self.observation_space = self.batch.single_observation_space
        self.action_space = self.batch.single_action_space

    def reset(self, *, seed=None, options=None):
        """Start a new episode; returns the observation (172,) and the info."""
        super().reset(seed=seed)
        self.batch.rngs = [self.np_random]
        observations, infos = self.batch.reset()
        return observations[0], self._single(infos)

    def step(self, action):
        """Take one decision; returns observation (172,), reward, terminated, truncated (False here), info."""
        observations, rewards, terminated, truncated, infos = self.batch.step(np.array([action]))
        info = self._single(infos)
        return observations[0], float(rewards[0]), bool(terminated[0]), bool(truncated[0]), info

    def render(self):
        """The picture from above, uint8 (560, 560, 3); None without a render mode."""
        pictures = self.batch.render()
        return pictures[0] if pictures else None

    @staticmethod
    def _single(infos):
        return {"cell": int(infos["cell"][0]), "switch_on": bool(infos["switch_on"][0])}


gym.register(
    id="Pyramids-v0",
    entry_point=f"{__name__}:PyramidsEnv",
    vector_entry_point=f"{__name__}:PyramidsVectorEnv",
    max_episode_steps=MAX_DECISIONS,
)
