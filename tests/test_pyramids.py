"""Pyramids: motion, rays, the course of an episode, endings, the batch against the single world."""

import heapq
import math
import sys
import warnings

import gymnasium as gym
import numpy as np
import pytest
from envs import pyramids as p
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import RecordEpisodeStatistics

ENV_ID = "envs.pyramids:Pyramids-v0"
NOTHING, FORWARD, BACKWARD, RIGHT, LEFT = range(5)


def make_batch(num_envs, seed=0, autoreset_mode=AutoresetMode.DISABLED, max_episode_steps=None):
    envs = p.PyramidsVectorEnv(num_envs, autoreset_mode=autoreset_mode, max_episode_steps=max_episode_steps)
    envs.reset(seed=seed)
    return envs


def empty_world(position=(0.0, 0.0), heading=0, velocity=(0.0, 0.0)):
    """One world in which only walls stand, the agent where it is wanted."""
    envs = make_batch(1)
    envs.centres[:, p.NUM_WALLS :] = p.NOWHERE
    place(envs, position, heading, velocity)
    return envs


def place(envs, position, heading=0, velocity=(0.0, 0.0), i=0):
    envs.position[:, i], envs.heading[i], envs.velocity[:, i] = position, heading, velocity


def with_brick(position=(0.0, 0.0), solid=True):
    """One world whose brick pyramid stands at `position`, the switch on and out of the way."""
    envs = empty_world()
    envs.phase[:], envs.timer[:] = p.STANDING, 0 if solid else p.SOLID_AFTER
    envs.brick_spot[:, 0] = position
    envs.centres[:, [p.BRICK, p.GOLD], 0] = np.array(position)[:, None]
    return envs


def physics(envs, action, steps=1):
    for _ in range(steps):
        at_gold = envs._physics_step(np.array([action]), np.ones(1, dtype=bool))
    return at_gold


def overlaps(envs, boxes):
    """Which agents' circles reach into which boxes, by the distance from circle to box: (B, N) bool."""
    gap = np.abs(envs.centres[:, boxes] - envs.position[:, None]) - p.HALF[:, boxes, None]
    return np.hypot(*np.maximum(gap, 0)) < 0.5


def pressing_world(seed=0):
    """A world in which the next forward decision presses the switch."""
    envs = make_batch(1, seed)
    place(envs, envs.centres[:, p.SWITCH, 0] + [0, -3.0], heading=0)
    return envs


# --- the arena -----------------------------------------------------------------------------------------


def test_arena_has_four_crosses_eight_side_walls_and_doorways():
    points = np.arange(-49.25, 49.5, 0.5)
    x, z = np.meshgrid(points, points, indexing="ij")
    inside = np.zeros_like(x, dtype=bool)
    for cx, cz, hx, hz in p.WALLS:
        inside |= (np.abs(x - cx) < hx) & (np.abs(z - cz) < hz)
    bar = lambda c, length: np.abs(c) < length  # noqa: E731
    expected = np.zeros_like(inside)
    for cx in (-16.5, 16.5):
        for cz in (-16.5, 16.5):
            expected |= bar(x - cx, 15.15 / 2) & bar(z - cz, 0.5) | bar(x - cx, 0.5) & bar(z - cz, 7.5)
    for c in (-16.5, 16.5):
        expected |= (np.abs(x) > 35) & bar(z - c, 0.5) | (np.abs(z) > 35) & bar(x - c, 0.5)
    np.testing.assert_array_equal(inside, expected)
    for doorway in [(-35, -24.1), (-9, 9), (24.1, 35)]:
        open_there = (points > doorway[0]) & (points < doorway[1])
        row = np.argmin(np.abs(points - 16.25))
        assert not inside[open_there, row].any() and not inside[row, open_there].any()
    # The outer walls close the arena at 49.5.
    outer = p.WALLS[-4:]
    assert sorted((np.abs(outer[:, :2]) - outer[:, 2:]).max(axis=1)) == [49.5] * 4


def test_reset_fills_the_nine_areas():
    envs = make_batch(400, seed=5)
    spots = np.concatenate(
        [
            envs.position[:, None],
            envs.centres[:, [p.SWITCH]],
            envs.brick_spot[:, None],
            envs.centres[:, p.STONES],
        ],
        axis=1,
    )  # (2, 9, N)
    column, row = np.round(spots / 30).astype(int)
    assert (np.abs(spots - 30 * np.stack([column, row])) <= 11.905).all()
    assert (np.abs(spots - 30 * np.stack([column, row])) > 11.5).any()
    area = 3 * column + row
    assert (np.sort(area, axis=0) == np.arange(-4, 5)[:, None]).all()
    for role in range(9):
        assert len(np.unique(area[role])) == 9
    assert set(envs.heading) <= set(range(360)) and len(set(envs.heading)) > 200
    assert (envs.velocity == 0).all() and (envs.phase == p.OFF).all()
    assert (envs.centres[:, [p.BRICK, p.GOLD]] == p.NOWHERE).all()
    assert not overlaps(envs, slice(0, p.GOLD)).any()


# --- motion --------------------------------------------------------------------------------------------


def test_speed_from_rest_and_at_most():
    envs = empty_world((40.0, -34.0))
    speeds, z = [], -34.0
    for _ in range(2000):
        physics(envs, FORWARD)
        speeds.append(float(np.hypot(*envs.velocity[:, 0])))
        z += 0.02 * speeds[-1]
        assert envs.position[1, 0] == pytest.approx(-34 + (z + 34))
        envs.position[1, 0] = z = -34.0  # never at a wall
    for steps, speed in [(1, 1.802), (5, 8.3), (10, 15.1), (25, 28.8), (50, 39.2)]:
        assert speeds[steps - 1] == pytest.approx(speed, abs=0.06)
    assert 45 <= max(speeds) <= 48
    physics(envs, BACKWARD)
    assert np.hypot(*envs.velocity[:, 0]) == pytest.approx((speeds[-1] - 2) * 0.96 - 0.118)


def test_friction_stops_the_agent_and_does_not_turn_it_back():
    envs = empty_world(velocity=(0.3, 0.4))
    physics(envs, NOTHING)
    np.testing.assert_allclose(envs.velocity[:, 0], np.array([0.6, 0.8]) * (0.5 * 0.96 - 0.118))
    physics(envs, NOTHING, 10)
    assert (envs.velocity == 0).all()


def test_turning_is_four_degrees_a_step_and_leaves_the_velocity_alone():
    envs = empty_world(heading=358, velocity=(3.0, 10.0))
    physics(envs, RIGHT)
    assert envs.heading[0] == 2
    assert envs.velocity[0, 0] / envs.velocity[1, 0] == pytest.approx(0.3)
    physics(envs, LEFT, 3)
    assert envs.heading[0] == 350
    envs.step(np.array([LEFT]))
    assert envs.heading[0] == 330
    place(envs, (0, 0), heading=90)
    physics(envs, FORWARD)
    np.testing.assert_allclose(envs.velocity[:, 0], [1.802, 0], atol=1e-12)  # clockwise: 90° is right


def test_a_wall_takes_the_velocity_into_it_and_keeps_the_rest():
    envs = empty_world((40.0, 48.5), heading=0, velocity=(10.0, 30.0))
    for _ in range(3):
        before = envs.velocity[0, 0]
        physics(envs, NOTHING)
    assert envs.velocity[1, 0] == 0
    assert envs.velocity[0, 0] == pytest.approx(before * 0.96 - 0.118)
    assert 49.5 - envs.position[1, 0] == pytest.approx(0.501, abs=1e-9)
    # Pushing into the wall does not stop the slide.
    x = envs.position[0, 0]
    physics(envs, FORWARD)
    assert envs.position[0, 0] - x == pytest.approx(0.02 * envs.velocity[0, 0], rel=0.02)


def test_touching_a_wall_does_not_hold_the_agent_back():
    # Whatever rounding leaves of the gap: along the four walls, in both directions and from many places.
    rng, n = np.random.default_rng(0), 800
    envs = make_batch(n)
    everyone, still = np.ones(n, dtype=bool), np.zeros(n, dtype=int)
    envs.centres[:, p.NUM_WALLS :] = p.NOWHERE
    axis, side, i = rng.integers(2, size=n), rng.choice([-1, 1], n), np.arange(n)
    envs.position[axis, i], envs.position[1 - axis, i] = 48.9 * side, rng.uniform(20, 30, n)
    envs.velocity[axis, i], envs.velocity[1 - axis, i] = (
        rng.uniform(8, 40, n) * side,
        rng.choice([-20, 20], n),
    )
    envs._physics_step(still, everyone)
    assert (envs.velocity[axis, i] == 0).all()
    for _ in range(5):
        before = envs.position.copy()
        envs._physics_step(still, everyone)
        moved = envs.position - before
        np.testing.assert_allclose(moved, 0.02 * envs.velocity, atol=1e-9)
        assert (np.abs(moved[1 - axis, i]) > 0.2).all()
    # And away from the wall it goes at once.
    envs.velocity[axis, i] = -10 * side
    before = envs.position.copy()
    envs._physics_step(still, everyone)
    np.testing.assert_allclose(envs.position - before, 0.02 * envs.velocity, atol=1e-9)


def test_a_corner_between_two_walls_stops_both_parts():
    envs = empty_world((48.0, 48.0), heading=40, velocity=(40.0, 35.0))
    physics(envs, FORWARD, 5)
    np.testing.assert_allclose(envs.position[:, 0], 49.5 - 0.501, atol=1e-9)
    np.testing.assert_allclose(envs.velocity[:, 0], 0, atol=1e-9)


def test_the_corner_of_a_box_is_round():
    # Along z past the stone's corner at (2.27, -2.34), 0.3 m beside it: they touch 0.501 m from the corner.
    envs = empty_world((2.57, -4.0), velocity=(0.0, 45.0))
    envs.centres[:, p.NUM_WALLS, 0] = 0
    while envs.velocity[0, 0] == 0:
        physics(envs, NOTHING)
    normal = np.array([0.3, -math.sqrt(0.501**2 - 0.3**2)]) / 0.501
    # What is left is tangential, and the agent slides round the corner instead of sticking to it.
    assert envs.velocity[:, 0] @ normal == pytest.approx(0, abs=1e-9)
    assert envs.velocity[1, 0] > 10 and envs.velocity[0, 0] > 10
    physics(envs, NOTHING, 10)
    assert envs.position[1, 0] > -1


@pytest.mark.parametrize("speed", [None, 48.0, 300.0])
def test_nothing_ever_gets_into_or_through_anything(speed):
    # Persistent random actions; with a forced speed the velocity is set anew before each step.
    rng, n = np.random.default_rng(1), 500
    envs = make_batch(n, seed=100)
    everyone = np.ones(n, dtype=bool)
    actions = rng.integers(5, size=n)
    blocks = np.r_[0 : p.SWITCH + 1]
    contacts = 0
    for _ in range(2000 if speed is None else 300):
        fresh = rng.random(n) < 0.03
        actions[fresh] = rng.choice(5, size=fresh.sum(), p=[0.05, 0.6, 0.15, 0.1, 0.1])
        if speed is not None:
            angle = rng.uniform(0, 2 * np.pi, n)
            envs.velocity[:] = speed * np.sin(angle), speed * np.cos(angle)
        was, solid = envs.position.copy(), (envs.phase == p.STANDING) & (envs.timer <= 1)
        was_inside = overlaps(envs, [p.BRICK])[0]
        envs._physics_step(actions, everyone)
        assert not overlaps(envs, blocks).any()
        assert np.abs(envs.position).max() <= 49.5 - 0.5
        # Only who stood where the pyramid came down may be inside of it.
        assert not (overlaps(envs, [p.BRICK])[0] & solid & (envs.phase == p.STANDING) & ~was_inside).any()
        contacts += (np.hypot(*(envs.position - was)) < 0.019 * np.hypot(*envs.velocity)).sum()
        # The middle of the path is not inside a wall either: nobody jumped.
        middle = (envs.position + was) / 2
        gap = np.abs(envs.centres[:, blocks] - middle[:, None]) - p.HALF[:, blocks, None]
        if speed is None or speed < 50:
            assert not (gap.max(axis=0) < 0).any()
    assert speed is not None or (envs.phase > p.OFF).sum() > 10


def test_a_cast_does_not_pass_a_wall_at_any_speed():
    for speed in (10.0, 48.0, 1000.0, 1e5):
        envs = empty_world((5.0, 12.0), velocity=(0.0, speed))
        envs.position[0, 0] = 12.0  # below the bar of a cross, z from 16 to 17
        physics(envs, NOTHING, 30)
        assert envs.position[1, 0] <= 16 - 0.5


# --- rays ----------------------------------------------------------------------------------------------


def march(origin, direction, boxes, climb):
    """The slow tracer: (tag, distance) of the first thing met, by walking as far as is surely free.

    `boxes` is a list of tag, centre, half-extents, bottom, top. A circle of radius 0.5 is free to go by the
    distance from its centre to the box, less 0.5, in any direction.
    """
    best = (p.TAG_NOTHING, 35.0)
    for tag, centre, half, bottom, top in boxes:
        t, gap = 0.0, np.inf
        for _ in range(20000):
            x, z = origin + t * direction - centre
            gap = math.hypot(max(abs(x) - half[0], 0), max(abs(z) - half[1], 0)) - 0.5
            if gap < 1e-7 or t > 35:
                break
            t += gap
        if t == 0.0 or t >= best[1] or gap >= 1e-7:  # it starts inside, comes too late, or passes
            continue
        if bottom <= t * climb < top:
            best = (tag, t)
    return best


def test_rays_against_the_slow_tracer():
    rng, n = np.random.default_rng(3), 400
    envs = make_batch(n, seed=7)
    # Worlds in all phases; most agents look at the gold, from where climbing fans may see it.
    envs.phase[:] = rng.integers(4, size=n)
    for i in range(n):
        if envs.phase[i] in (p.STANDING, p.TOPPLING):
            envs.centres[:, [p.BRICK, p.GOLD], i] = envs.brick_spot[:, i, None]
        elif envs.phase[i] == p.FALLEN:
            envs.centres[:, p.GOLD, i] = envs._gold_spot(i)
        target = envs.centres[:, p.SWITCH if envs.phase[i] == p.OFF else p.GOLD, i]
        while True:
            angle, distance = rng.uniform(0, 2 * np.pi), rng.uniform(2.5, 34)
            spot = target + distance * np.array([np.sin(angle), np.cos(angle)])
            envs.position[:, i] = spot
            if np.abs(spot).max() < 49 and not overlaps(envs, slice(0, p.GOLD + 1))[:, i].any():
                heading = round(np.degrees(angle)) + 180 + rng.choice([0, 0, 25, -25, 50, -65, 90])
                envs.heading[i] = heading % 360
                break
    tags, distances = envs._cast_rays(np.arange(n))
    assert tags.shape == distances.shape == (n, 21)
    fan = [[0, d, -d, 2 * d, -2 * d, 3 * d, -3 * d] for d in (70 / 3, 65 / 3, 25)]
    climbs = np.repeat([0, 1 / 7, 2 / 7], 7)
    disagree, seen = 0, set()
    for i in range(n):
        on, fallen = envs.phase[i] != p.OFF, envs.phase[i] == p.FALLEN
        c = envs.centres[:, :, i].T
        boxes = [(p.TAG_WALL, np.array(w[:2]), w[2:], 0, 4.52) for w in p.WALLS]
        boxes += [(p.TAG_STONE, s, (2.27, 2.34), 0, 4) for s in c[p.STONES]]
        boxes += [(p.TAG_ON if on else p.TAG_OFF, c[p.SWITCH], (2, 2), 0, 4)]
        if on and not fallen:
            boxes += [(p.TAG_BRICK, c[p.BRICK], (2.27, 2.34), 0, 4), (p.TAG_GOLD, c[p.GOLD], (1, 1), 4, 6)]
        if fallen:
            boxes += [(p.TAG_GOLD, c[p.GOLD], (1, 1), 0, 2)]
        near = [
            b for b in boxes if math.hypot(*np.maximum(np.abs(b[1] - envs.position[:, i]) - b[2], 0)) < 36
        ]
        for k, angle in enumerate(np.ravel(fan)):
            a = math.radians(envs.heading[i] + angle)
            tag, t = march(envs.position[:, i], np.array([math.sin(a), math.cos(a)]), near, climbs[k])
            seen.add((int(tag), k // 7))
            # What a ray just touches, at a corner or an upper edge, float32 may decide either way.
            disagree += tag != tags[i, k] or abs(t - distances[i, k]) > 2e-3
    assert disagree <= 2, f"{disagree} of {n * 21} rays"
    assert seen == {(tag, f) for tag in range(7) for f in range(3)}


def test_the_standing_gold_is_seen_only_by_climbing_fans_at_the_right_distance():
    for distance, fans in [(10, ()), (18, (2,)), (24, ()), (31, (1,)), (34.9, (1,))]:
        envs = with_brick((30.0, 30.0))
        place(envs, (30.0, 30.0 - distance - 1.5))  # the gold's outline is met `distance` m ahead
        tags, distances = envs._cast_rays(np.arange(1))
        seen = tuple(f for f in range(3) if tags[0, 7 * f] == p.TAG_GOLD)
        assert seen == fans, distance
        for f in fans:
            assert distances[0, 7 * f] == pytest.approx(distance, abs=1e-4)
        if distance < 35 - 1.34:
            assert tags[0, 0] == p.TAG_BRICK


def test_a_climbing_ray_passes_over_walls_and_pyramids():
    envs = empty_world((0.0, 30.0), heading=180)
    envs.centres[:, p.NUM_WALLS, 0] = 0.0, 0.0
    tags, distances = envs._cast_rays(np.arange(1))
    assert distances[0, 0] == pytest.approx(30 - 2.84, abs=1e-4) and tags[0, 0] == p.TAG_STONE
    assert tags[0, 7] == p.TAG_STONE  # 3.88 m up
    assert tags[0, 14] == p.TAG_NOTHING and distances[0, 14] == 35
    place(envs, (12.0, 33.5), heading=180)  # the bar of a cross, from 17 down, 16 m away: 4.57 m up in fan 2
    tags, distances = envs._cast_rays(np.arange(1))
    assert tags[0, 7] == p.TAG_WALL and tags[0, 14] == p.TAG_NOTHING
    place(envs, (12.0, 33.2), heading=180)
    assert envs._cast_rays(np.arange(1))[0][0, 14] == p.TAG_WALL  # 4.49 m


def test_a_touched_wall_does_not_blind_the_rays_that_leave_it():
    envs = empty_world((40.0, 48.0), heading=0, velocity=(0.0, 40.0))
    physics(envs, FORWARD, 10)
    envs.heading[0] = 90  # the middle ray runs along the wall
    tags, distances = envs._cast_rays(np.arange(1))
    assert distances[0, 0] == pytest.approx(49.5 - 0.5 - 40, abs=1e-3)
    assert distances[0, 1] == pytest.approx(8.999 / math.cos(math.radians(70 / 3)), abs=0.01)  # away from it
    assert tags[0, 2] == p.TAG_WALL and distances[0, 2] < 0.01  # into it


# --- observation ---------------------------------------------------------------------------------------


def test_observation_layout():
    envs = empty_world((8.0, 0.0), heading=90, velocity=(3.0, -5.0))
    envs.centres[:, p.SWITCH, 0] = 18.0, 0.0
    a = math.radians(70 / 3)
    envs.centres[:, p.NUM_WALLS, 0] = (
        8 + 20 * math.cos(a),
        -20 * math.sin(a),
    )  # right of straight ahead: smaller z
    observation = envs._observe()[0]
    assert observation.shape == (172,) and observation.dtype == np.float32
    rays = observation[:168].reshape(3, 7, 8)
    np.testing.assert_array_equal(rays[0, 0, :7], np.eye(7)[3])
    assert rays[0, 0, 7] == pytest.approx(7.5 / 35, abs=1e-6)
    np.testing.assert_array_equal(rays[0, 1, :7], np.eye(7)[5])
    assert (rays[..., :7].sum(axis=-1) == 1).all()
    assert (rays[..., 7][rays[..., 6] == 1] == 1).all() and (rays[..., 7][rays[..., 6] == 0] < 1).all()
    # Looking along +x, right is -z.
    np.testing.assert_allclose(observation[168:], [0, 5.0, 0, 3.0], atol=1e-6)
    envs.phase[0] = p.STANDING
    observation = envs._observe()[0]
    np.testing.assert_array_equal(observation[:7], np.eye(7)[4])
    assert observation[168] == 1


def test_observations_stay_inside_the_space_and_info_names_the_cell():
    envs = make_batch(40, seed=3)
    rng = np.random.default_rng(0)
    cells = set()
    for _ in range(150):
        observations, _, _, _, infos = envs.step(rng.choice(5, 40, p=[0.1, 0.6, 0.1, 0.1, 0.1]))
        assert envs.observation_space.contains(observations)
        column, row = np.floor((envs.position + 49.5) / 11).astype(int)
        np.testing.assert_array_equal(infos["cell"], 9 * row + column)
        np.testing.assert_array_equal(infos["switch_on"], observations[:, 168] == 1)
        assert infos["_cell"].all() and infos["_switch_on"].all()
        cells |= set(infos["cell"])
    assert 50 < len(cells) <= envs.NUM_CELLS == p.PyramidsEnv.NUM_CELLS == 81


# --- the course of an episode --------------------------------------------------------------------------


def test_the_switch_goes_on_by_touch_and_a_pyramid_appears_in_the_kept_area():
    for seed in range(20):
        envs = pressing_world(seed)
        kept = envs.brick_spot[:, 0].copy()
        for _ in range(10):
            _, _, terminated, _, infos = envs.step(np.array([FORWARD]))
            if infos["switch_on"][0]:
                break
        assert infos["switch_on"][0] and not terminated[0]
        assert overlaps(envs, [p.SWITCH]).sum() == 0
        np.testing.assert_array_equal(envs.centres[:, p.BRICK, 0], kept)
        used = np.round(np.c_[envs.centres[:, p.STONES, 0], envs.centres[:, [p.SWITCH], 0]] / 30)
        assert not (np.round(kept / 30)[:, None] == used).all(axis=0).any()
        # It stays on.
        envs.step(np.array([FORWARD]))
        assert envs.phase[0] == p.STANDING


def test_pressing_the_switch_gives_no_reward():
    envs = pressing_world()
    for _ in range(8):
        _, reward, _, _, infos = envs.step(np.array([FORWARD]))
        assert reward[0] == pytest.approx(-0.001)
    assert infos["switch_on"][0]


def test_the_new_pyramid_is_solid_after_thirty_steps():
    envs = pressing_world()
    while envs.phase[0] == p.OFF:
        physics(envs, FORWARD)
    spot = envs.brick_spot[:, 0]
    for wait, blocked in [(28, False), (30, True)]:
        envs.timer[0] = p.SOLID_AFTER - wait
        place(envs, spot + [0, -2.9], velocity=(0.0, 10.0))
        physics(envs, NOTHING)
        assert (envs.velocity[1, 0] == 0) == blocked
    assert p.SOLID_AFTER == 30


def test_who_stands_where_the_pyramid_comes_down_walks_out():
    envs = with_brick((0.0, 0.0))
    place(envs, (0.5, 0.0), heading=90)
    physics(envs, FORWARD, 40)
    assert envs.position[0, 0] > 2.27 + 0.5 and envs.phase[0] == p.STANDING


@pytest.mark.parametrize("speed, topples", [(14.5, False), (15.5, True), (40.0, True)])
def test_toppling_by_speed(speed, topples):
    for heading, action in [(0, NOTHING), (180, NOTHING), (0, FORWARD)]:
        envs = with_brick()
        thrust = 2.0 if action == FORWARD else 0.0
        # Chosen so that the speed after drag and friction, at the hit, is `speed`.
        place(envs, (0.0, -2.9), heading, (0.0, (speed + 0.118) / 0.96 - thrust))
        physics(envs, action)
        assert (envs.phase[0] == p.TOPPLING) == topples
        assert envs.velocity[1, 0] == 0


def test_a_glancing_hit_does_not_topple():
    envs = with_brick()
    place(envs, (0.0, -2.9), 0, (35.0, 10.0))
    physics(envs, NOTHING, 2)
    assert envs.velocity[1, 0] == 0 and envs.phase[0] == p.STANDING


def test_toppling_by_pushing_takes_ten_blocked_forward_steps():
    envs = with_brick()
    place(envs, (0.0, -2.34 - 0.501), heading=0)
    physics(envs, FORWARD, 5)
    physics(envs, NOTHING, 5)
    physics(envs, FORWARD, 4)
    assert envs.phase[0] == p.STANDING
    physics(envs, FORWARD)
    assert envs.phase[0] == p.TOPPLING
    # Pushing backwards does not count.
    envs = with_brick()
    place(envs, (0.0, -2.34 - 0.501), heading=180)
    physics(envs, BACKWARD, 50)
    assert envs.phase[0] == p.STANDING


def test_toppling_lasts_95_to_180_steps_is_passable_and_gold_comes_to_lie_nearby():
    n = 1500
    envs = make_batch(n, seed=11)
    envs.phase[:], envs.timer[:] = p.STANDING, 0
    envs.centres[:, [p.BRICK, p.GOLD]] = envs.brick_spot[:, None]
    envs.position[:] = envs.brick_spot + np.array([[0.0], [-2.9]])
    envs.heading[:], envs.velocity[:] = 0, [[0.0], [20.0]]
    everyone, still = np.ones(n, dtype=bool), np.zeros(n, dtype=int)
    envs._physics_step(still, everyone)
    toppling = envs.phase == p.TOPPLING
    assert toppling.mean() > 0.95  # the others had a wall in the way
    duration, passed = np.zeros(n, dtype=int), np.zeros(n, dtype=bool)
    for t in range(1, 200):
        actions = np.full(n, FORWARD if t < 60 else NOTHING)
        assert (envs.centres[:, p.BRICK][:, envs.phase == p.TOPPLING] != p.NOWHERE).all()
        envs._physics_step(actions, everyone)
        passed |= overlaps(envs, [p.BRICK])[0] & (envs.phase == p.TOPPLING)
        duration[(envs.phase == p.FALLEN) & (duration == 0)] = t
    assert passed[toppling].mean() > 0.95
    duration = duration[toppling]
    assert duration.min() == 95 and duration.max() == 180
    assert duration.mean() == pytest.approx(137.5, abs=3)
    assert (envs.centres[:, p.BRICK, toppling] == p.NOWHERE).all()
    gold = envs.centres[:, p.GOLD, toppling]
    distance = np.hypot(*(gold - envs.brick_spot[:, toppling]))
    assert distance.min() >= 3.8 and distance.max() <= 7 and distance.min() < 3.9 and distance.max() > 6.9
    assert distance.mean() == pytest.approx(5.4, abs=0.15)
    angle = np.arctan2(*(gold - envs.brick_spot[:, toppling]))
    assert abs(np.exp(1j * angle).mean()) < 0.1
    assert np.abs(gold).max() <= 49.5 - 1
    gap = np.abs(envs.centres[:, : p.BRICK, toppling] - gold[:, None]) - p.HALF[:, : p.BRICK, None]
    assert (gap.max(axis=0) >= 1).all()  # the square of side 2 overlaps nothing


def gold_world(step_of_touch):
    """The agent reaches the gold on the ground in that step of the decision."""
    envs = empty_world()
    envs.phase[0] = p.FALLEN
    # 0.5 m a step at the outset, the gold's lower edge at 0: touched from 0.5 m away.
    place(envs, (0.0, 0.0), velocity=(0.0, 25.0))
    path = 0.0
    speed = 25.0
    for _ in range(step_of_touch):
        speed = speed * 0.96 - 0.118
        path += 0.02 * speed
    envs.centres[:, p.GOLD, 0] = 0.0, path + 1.5 - 0.01
    return envs


@pytest.mark.parametrize("step_of_touch", [1, 3, 5])
def test_gold_sets_the_reward_of_its_step_to_two_and_terminates(step_of_touch):
    envs = gold_world(step_of_touch)
    observations, rewards, terminated, truncated, _ = envs.step(np.array([NOTHING]))
    assert rewards[0] == pytest.approx(2 - (step_of_touch - 1) / 5000, abs=1e-9)
    assert terminated[0] and not truncated[0]
    # Time stands still after the gold.
    assert envs.centres[1, p.GOLD, 0] - envs.position[1, 0] == pytest.approx(1.5 - 0.01, abs=1e-6)
    with pytest.raises(ResetNeeded):
        envs.step(np.array([NOTHING]))
    envs = gold_world(step_of_touch)
    envs.step(np.array([RIGHT]))
    assert envs.heading[0] == 4 * step_of_touch


def test_gold_that_still_stands_on_its_pyramid_is_out_of_reach():
    envs = with_brick(solid=False)
    place(envs, (0.0, 0.0))
    for _ in range(4):
        _, rewards, terminated, _, _ = envs.step(np.array([NOTHING]))
        assert not terminated[0] and rewards[0] == pytest.approx(-0.001)


def test_ending_by_gold_at_the_last_decision_is_both():
    envs = gold_world(2)
    envs.max_episode_steps = 1
    _, _, terminated, truncated, _ = envs.step(np.array([NOTHING]))
    assert terminated[0] and truncated[0]


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_time_limit_truncates_after_1000_decisions(mode):
    envs = gym.make_vec(ENV_ID, num_envs=2, vectorization_mode="vector_entry_point", autoreset_mode=mode)
    assert envs.metadata["autoreset_mode"] is mode
    envs.reset(seed=1)
    total = np.zeros(2)
    for t in range(1, 1001):
        _, rewards, terminated, truncated, infos = envs.step(np.zeros(2, dtype=int))
        total += rewards
        assert not terminated.any()
        assert truncated.all() == truncated.any() == (t == 1000)
        assert ("final_obs" in infos) == (mode == AutoresetMode.SAME_STEP and t == 1000)
    np.testing.assert_allclose(total, -1)


def test_single_environment_is_truncated_by_the_registered_limit():
    env = gym.make(ENV_ID)
    env.reset(seed=1)
    for t in range(1, 1001):
        _, reward, terminated, truncated, _ = env.step(NOTHING)
        assert reward == pytest.approx(-0.001) and not terminated and truncated == (t == 1000)


# --- Gymnasium -----------------------------------------------------------------------------------------


def test_check_env_passes_without_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gym.make(ENV_ID, render_mode="rgb_array").unwrapped)


def test_bad_arguments_are_refused():
    envs = p.PyramidsVectorEnv(2)
    with pytest.raises(ResetNeeded):
        envs.step(np.zeros(2, dtype=int))
    envs.reset()
    for actions in ([5, 0], [-1, 0], [0], [[0, 0]]):
        with pytest.raises(ValueError):
            envs.step(np.array(actions))
    with pytest.raises(ValueError):
        envs.reset(seed=[1, 2, 3])
    with pytest.raises(ValueError):
        p.PyramidsVectorEnv(2, render_mode="human")


def shortcut(envs, i):
    """Put the agent of world i in front of the next thing to run into, so that every phase occurs."""
    thing = {p.OFF: p.SWITCH, p.STANDING: p.BRICK, p.FALLEN: p.GOLD}.get(envs.phase[i])
    if thing is not None:
        place(envs, envs.centres[:, thing, i] - [0, 3.2], velocity=(0.0, 30.0), i=i)


def assert_same_infos(ours, theirs):
    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        if isinstance(value, dict):
            assert_same_infos(ours[key], value)
        elif value.dtype == object:
            for a, b in zip(ours[key], value, strict=True):
                assert (a is None) == (b is None)
                np.testing.assert_array_equal(a, b)
        else:
            assert ours[key].dtype == value.dtype
            np.testing.assert_array_equal(ours[key], value)


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP])
def test_batch_equals_single_worlds_step_by_step(mode):
    # The batch against SyncVectorEnv over single worlds: observations, rewards, endings, infos, resets.
    n, limit = 6, 90
    single = lambda: gym.make(ENV_ID, max_episode_steps=limit)  # noqa: E731
    theirs = SyncVectorEnv([single] * n, autoreset_mode=mode)
    ours = p.PyramidsVectorEnv(n, autoreset_mode=mode, max_episode_steps=limit)
    np.testing.assert_array_equal(ours.reset(seed=40)[0], theirs.reset(seed=40)[0])
    rng, endings = np.random.default_rng(2), np.zeros(2, dtype=int)
    for t in range(500):
        actions = rng.choice(5, n, p=[0.1, 0.6, 0.1, 0.1, 0.1])
        for i in range(2, n):  # the first two run into the time limit
            if (t + 3 * i) % 15 == 14:
                shortcut(ours, i)
                shortcut(theirs.envs[i].unwrapped.batch, 0)
        a, b = ours.step(actions), theirs.step(actions)
        for x, y in zip(a[:4], b[:4], strict=True):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)
        assert_same_infos(a[4], b[4])
        endings += a[2].sum(), a[3].sum()
    assert endings[0] >= 10 and endings[1] >= 10, endings


def test_final_obs_is_the_last_of_the_old_episode():
    envs = make_batch(3, seed=4, autoreset_mode=AutoresetMode.SAME_STEP, max_episode_steps=20)
    envs.decisions[1] = 10
    rng = np.random.default_rng(0)
    for _ in range(9):
        envs.step(rng.integers(5, size=3))
    twin = make_batch(3, seed=4)
    for name in ("position", "velocity", "heading", "centres"):
        getattr(twin, name)[:] = getattr(envs, name)
    actions = np.array([FORWARD, FORWARD, RIGHT])
    before_reset = twin.step(actions)[0]
    observations, _, _, truncated, infos = envs.step(actions)
    np.testing.assert_array_equal(truncated, [False, True, False])
    np.testing.assert_array_equal(infos["_final_obs"], truncated)
    assert infos["final_obs"][0] is None and infos["final_obs"][2] is None
    np.testing.assert_array_equal(infos["final_obs"][1], before_reset[1])
    np.testing.assert_array_equal(observations[[0, 2]], before_reset[[0, 2]])
    np.testing.assert_array_equal(observations[1], envs._observe()[1])
    assert (envs.velocity[:, 1] == 0).all() and envs.decisions[1] == 0 and envs.decisions[0] == 10
    kept = observations.copy()
    envs.step(actions)
    np.testing.assert_array_equal(observations, kept)  # handed-out arrays are not written to again


def test_record_episode_statistics_counts_decisions_and_returns():
    envs = gym.make_vec(
        ENV_ID,
        num_envs=3,
        vectorization_mode="vector_entry_point",
        autoreset_mode=AutoresetMode.SAME_STEP,
        max_episode_steps=30,
    )
    envs = RecordEpisodeStatistics(envs)
    envs.reset(seed=1)
    for t in range(1, 91):
        infos = envs.step(np.zeros(3, dtype=int))[4]
        assert ("episode" in infos) == (t % 30 == 0)
        if t % 30 == 0:
            np.testing.assert_allclose(infos["episode"]["r"], -0.03)
            np.testing.assert_array_equal(infos["episode"]["l"], 30)


def test_seeds():
    def rollout(seed, n=4):
        envs = make_batch(n, seed, AutoresetMode.SAME_STEP, 15)
        rng = np.random.default_rng(0)
        return np.stack([envs.step(rng.integers(5, size=n))[0] for _ in range(40)])

    first, again, other = rollout(1), rollout(1), rollout(2)
    np.testing.assert_array_equal(first, again)
    assert (first != other).any(axis=(0, 2)).all()
    assert (first[:, 0] != first[:, 1]).any()
    # The next episode is another one, and a list of seeds gives each world its own.
    assert (first[14, 0] != first[29, 0]).any()
    envs = p.PyramidsVectorEnv(3)
    a = envs.reset(seed=[7, 3, 7])[0]
    np.testing.assert_array_equal(a[0], a[2])
    assert (a[0] != a[1]).any()
    envs.step(np.array([FORWARD, RIGHT, LEFT]))
    np.testing.assert_array_equal(envs.reset(seed=[7, 3, 7])[0], a)
    b = envs.reset()[0]
    np.testing.assert_array_equal(b[0], b[2])
    assert (a[0] != b[0]).any()


def test_reset_forgets_the_episode():
    envs = with_brick()
    place(envs, (0.0, -2.34 - 0.501))
    for _ in range(3):  # topples after 2
        envs.step(np.array([FORWARD]))
    assert envs.phase[0] == p.TOPPLING and envs.pushes[0] >= 10
    envs.reset(seed=1)
    fresh = make_batch(1, seed=1)
    for name in (
        "position",
        "velocity",
        "heading",
        "centres",
        "phase",
        "timer",
        "pushes",
        "decisions",
        "ended",
    ):
        np.testing.assert_array_equal(getattr(envs, name), getattr(fresh, name))


def test_reset_mask_resets_only_those_worlds():
    envs = make_batch(3, seed=1)
    envs.step(np.full(3, FORWARD))
    envs.ended[:] = [False, True, False]
    before = envs.position.copy()
    _, infos = envs.reset(options={"reset_mask": np.array([False, True, False])})
    assert (envs.position != before).any(axis=0).tolist() == [False, True, False]
    np.testing.assert_array_equal(infos["_cell"], [False, True, False])
    envs.step(np.full(3, FORWARD))


def test_picture_shows_what_there_is():
    env = gym.make(ENV_ID, render_mode="rgb_array")
    env.reset(seed=3)
    batch = env.unwrapped.batch

    def has(picture, colour):
        return (picture == colour).all(axis=-1).any()

    picture = env.render()
    assert picture.shape == (560, 560, 3) and picture.dtype == np.uint8
    assert all(has(picture, c) for c in (p.RED, p.WALL_COLOUR, p.STONE_COLOUR, p.BLUE, p.FLOOR))
    assert not any(has(picture, c) for c in (p.GREEN, p.BRICK_COLOUR, p.GOLD_COLOUR))
    batch.phase[0] = p.STANDING
    batch.centres[:, [p.BRICK, p.GOLD], 0] = batch.brick_spot[:, :1]
    picture = env.render()
    assert all(has(picture, c) for c in (p.GREEN, p.BRICK_COLOUR, p.GOLD_COLOUR)) and not has(picture, p.RED)
    # z points up, x right.
    place(batch, (-30.0, 40.0))
    row, column = np.argwhere((env.render() == p.BLUE).all(axis=-1)).mean(axis=0)
    assert row < 100 and column < 200
    assert gym.make(ENV_ID).unwrapped.render() is None


# --- the task can be solved ----------------------------------------------------------------------------


class Guide:
    """Knows the map: walks down the field of path lengths to the switch, the pyramid, the gold."""

    def __init__(self, envs):
        self.envs, self.goal = envs, None

    def field(self, thing):
        """Path lengths to a thing on a 1 m grid, around all else that is solid, by Dijkstra's algorithm."""
        n, c = 99, self.envs.centres[:, :, 0]
        points = np.arange(n) - 49.0
        x, z = np.meshgrid(points, points, indexing="ij")
        blocked = np.zeros((n, n), dtype=bool)
        for k in set(range(p.GOLD)) - {thing}:
            gap_x, gap_z = np.abs(x - c[0, k]) - p.HALF[0, k], np.abs(z - c[1, k]) - p.HALF[1, k]
            blocked |= np.hypot(np.maximum(gap_x, 0), np.maximum(gap_z, 0)) < 1.0
        length = np.full((n, n), np.inf)
        start = tuple(np.round(c[:, thing] + 49).astype(int))
        length[start], queue = 0, [(0.0, start)]
        while queue:
            d, (i, j) = heapq.heappop(queue)
            if d > length[i, j]:
                continue
            for di, dj in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1)):
                a, b, new = i + di, j + dj, d + math.hypot(di, dj)
                if 0 <= a < n and 0 <= b < n and not blocked[a, b] and new < length[a, b]:
                    length[a, b] = new
                    heapq.heappush(queue, (new, (a, b)))
        return length

    def action(self):
        envs = self.envs
        position, velocity = envs.position[:, 0], envs.velocity[:, 0]
        thing = {p.OFF: p.SWITCH, p.STANDING: p.BRICK, p.FALLEN: p.GOLD}.get(envs.phase[0])
        if thing is None:
            return NOTHING
        if self.goal != thing:
            self.goal, self.lengths = thing, self.field(thing)
        i, j = np.round(position + 49).astype(int)
        for _ in range(3):  # the spot some metres down the field
            i0, j0 = max(i - 1, 0), max(j - 1, 0)
            around = self.lengths[i0 : i + 2, j0 : j + 2]
            i, j = np.array([i0, j0]) + np.unravel_index(around.argmin(), around.shape)
        way = np.array([i, j]) - 49.0 - position
        push = way / max(np.hypot(*way), 1e-6) * 15 - velocity
        error = (math.degrees(math.atan2(*push)) - envs.heading[0] + 180) % 360 - 180
        if np.hypot(*push) < 3:
            return NOTHING
        if abs(error) > 15:
            return RIGHT if error > 0 else LEFT
        return FORWARD


def play(seed, policy):
    env = gym.make(ENV_ID)
    env.reset(seed=seed)
    action, total, done = policy(env.unwrapped.batch), 0.0, False
    while not done:
        _, reward, terminated, truncated, _ = env.step(action())
        total += reward
        done = terminated or truncated
    return total, terminated


def test_a_guided_agent_collects_the_gold():
    results = [play(seed, lambda envs: Guide(envs).action) for seed in range(20)]
    assert sum(terminated for _, terminated in results) >= 19
    assert np.mean([total for total, _ in results]) >= 1.5


def test_a_random_agent_nearly_never_does():
    envs = make_batch(100, seed=0, max_episode_steps=400)
    rng, found = np.random.default_rng(0), 0
    envs.autoreset_mode = AutoresetMode.SAME_STEP
    for _ in range(400):
        _, _, terminated, _, _ = envs.step(rng.integers(5, size=100))
        found += terminated.sum()
    assert found <= 3


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q"]))
