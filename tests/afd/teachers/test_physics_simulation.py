"""The world's motion against closed forms and conservation laws."""

import numpy as np
import pytest

from afd.config import PhysicsConstants
from afd.teachers.physics_scene import (
    InitialState,
    draw_initial_state,
    parse_prompt,
    training_prompts,
)
from afd.teachers.physics_simulation import MIN_REBOUND_SPEED, integrate

LONG = PhysicsConstants(duration_s=4.0, fps=50)
ELASTIC = LONG.model_copy(update={"restitution": 1.0, "ball_restitution": 1.0})


def start_of(position: list, velocity: list, radius: list) -> InitialState:
    return InitialState(np.array(position, float), np.array(velocity, float), np.array(radius, float))


def energy(motion, gravity: float) -> np.ndarray:
    """Total energy [T], mass = radius^2."""
    mass = motion.radius**2
    kinetic = 0.5 * (motion.velocity**2).sum(axis=2)
    return ((kinetic - gravity * motion.position[..., 1]) * mass).sum(axis=1)


@pytest.mark.parametrize("gravity", [-0.5, 0.0, 0.33, 1.0, 2.0])
def test_free_flight_is_the_parabola(gravity: float) -> None:
    constants = PhysicsConstants(gravity=gravity, duration_s=0.5, fps=30)
    motion = integrate(start_of([[0.3, 0.5]], [[0.4, -0.3]], [0.1]), constants)
    times = np.arange(constants.num_frames) / 30
    assert motion.impacts == ()
    np.testing.assert_allclose(motion.position[:, 0, 0], 0.3 + 0.4 * times, atol=1e-12)
    np.testing.assert_allclose(motion.position[:, 0, 1], 0.5 - 0.3 * times + gravity * times**2 / 2, atol=1e-12)
    np.testing.assert_allclose(motion.velocity[:, 0, 1], -0.3 + gravity * times, atol=1e-12)


def test_dropped_ball_bounces_when_and_as_high_as_it_must() -> None:
    motion = integrate(start_of([[0.5, 0.4]], [[0.0, 0.0]], [0.1]), LONG)
    fall = np.sqrt(2 * 0.5)
    first, second = (impact.time_s for impact in motion.impacts[:2])
    assert motion.impacts[0].surface == "floor"
    assert first == pytest.approx(fall, abs=1e-12)
    assert second - first == pytest.approx(2 * 0.8 * fall, abs=1e-12)
    times = np.arange(LONG.num_frames) / LONG.fps
    apex = motion.position[(times > first) & (times < second), 0, 1].min()
    assert 0.9 - apex == pytest.approx(0.8**2 * 0.5, abs=1e-3)


def test_energy_is_conserved_at_restitution_one() -> None:
    start = start_of([[0.3, 0.3], [0.7, 0.5]], [[0.7, 0.1], [-0.5, -0.6]], [0.1, 0.14])
    motion = integrate(start, ELASTIC)
    assert {impact.surface for impact in motion.impacts} >= {"floor", "wall", "ball"}
    total = energy(motion, 1.0)
    np.testing.assert_allclose(total, total[0], rtol=1e-9)


def test_energy_never_grows_for_any_prompt() -> None:
    constants = LONG.model_copy(update={"duration_s": 1.5})
    for seed, prompt in enumerate(training_prompts(150)):
        motion = integrate(draw_initial_state(parse_prompt(prompt), seed, prompt), constants)
        slack = MIN_REBOUND_SPEED**2 * motion.radius.max() ** 2
        assert (np.diff(energy(motion, 1.0)) <= slack).all(), prompt


def test_ball_collision_conserves_momentum_and_obeys_restitution() -> None:
    constants = PhysicsConstants(gravity=0.0, duration_s=0.4, fps=100, ball_restitution=0.7)
    motion = integrate(start_of([[0.35, 0.5], [0.65, 0.53]], [[0.8, 0.0], [-0.4, 0.0]], [0.1, 0.13]), constants)
    assert [impact.surface for impact in motion.impacts] == ["ball", "ball"]
    momentum = (motion.velocity * (motion.radius**2)[None, :, None]).sum(axis=1)
    np.testing.assert_allclose(momentum, np.broadcast_to(momentum[0], momentum.shape), atol=1e-12)
    after = motion.impacts[0].time_s
    contact = start_of([[0.35, 0.5], [0.65, 0.53]], [[0.8, 0.0], [-0.4, 0.0]], [0.1, 0.13])
    normal = (contact.position[1] + contact.velocity[1] * after) - (contact.position[0] + contact.velocity[0] * after)
    normal /= np.linalg.norm(normal)
    approach = (motion.velocity[0, 0] - motion.velocity[0, 1]) @ normal
    separation = (motion.velocity[-1, 1] - motion.velocity[-1, 0]) @ normal
    assert separation == pytest.approx(0.7 * approach, rel=1e-9)


def test_balls_stay_in_the_box_and_apart() -> None:
    for gravity in (-0.5, 0.0, 1.0, 2.5):
        constants = LONG.model_copy(update={"gravity": gravity, "duration_s": 1.5})
        for seed, prompt in enumerate(training_prompts(60)):
            motion = integrate(draw_initial_state(parse_prompt(prompt), seed, prompt), constants)
            radius = motion.radius[None, :, None]
            assert (motion.position >= radius - 1e-9).all()
            assert (motion.position <= 1 - radius + 1e-9).all()
            if len(motion.radius) == 2:
                gap = np.linalg.norm(motion.position[:, 0] - motion.position[:, 1], axis=1) - motion.radius.sum()
                assert gap.min() > -1e-9


def test_frame_rate_does_not_change_the_motion() -> None:
    start = start_of([[0.3, 0.3], [0.6, 0.5]], [[0.7, 0.1], [-0.5, -0.6]], [0.1, 0.14])
    coarse = integrate(start, PhysicsConstants(fps=10))
    fine = integrate(start, PhysicsConstants(fps=120))
    np.testing.assert_allclose(coarse.position, fine.position[::12], atol=1e-9)


def test_resting_ball_stays_on_the_floor() -> None:
    motion = integrate(start_of([[0.5, 0.9]], [[0.0, 0.0]], [0.1]), LONG)
    assert np.abs(motion.position[:, 0, 1] - 0.9).max() < 1e-3


def test_integrate_rejects_a_ball_outside_and_bad_shapes() -> None:
    with pytest.raises(ValueError, match="inside the unit box"):
        integrate(start_of([[0.05, 0.5]], [[0.0, 0.0]], [0.1]), LONG)
    with pytest.raises(ValueError, match=r"velocity \[1, 2\], got"):
        integrate(start_of([[0.5, 0.5]], [[0.0, 0.0, 0.0]], [0.1]), LONG)
