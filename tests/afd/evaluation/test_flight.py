"""Contacts, runs and fits on exact positions."""

import numpy as np
import pytest

from afd.config import PhysicsConstants
from afd.evaluation.flight import find_contacts, fit_polynomial, flight_runs
from afd.teachers.physics import simulate, training_prompts


@pytest.mark.parametrize("gravity", [0.0, 0.33, 1.0, 1.5])
def test_impacts_are_marked_and_nearly_every_ball_keeps_a_flight(gravity: float) -> None:
    constants = PhysicsConstants(fps=10, gravity=gravity)
    is_marked, has_flight = [], []
    for seed, prompt in enumerate(training_prompts(200)):
        motion = simulate(prompt, seed, constants).motion
        tracked = np.ones(motion.position.shape[:2], dtype=bool)
        nominal = np.where(motion.radius < 0.115, 0.095, 0.135)
        contacts = find_contacts(motion.position, tracked, nominal, fps=10)
        for impact in motion.impacts:
            interval = int(impact.time_s * 10)
            if interval < len(contacts.floor):
                is_marked.append(getattr(contacts, impact.surface)[interval, impact.ball])
        for i in range(len(motion.radius)):
            blocked = contacts.floor[:, i] | contacts.ceiling[:, i] | contacts.ball[:, i]
            has_flight.append(bool(flight_runs(tracked[:, i], blocked, min_frames=4)))
    assert np.mean(is_marked) >= 0.99
    assert np.mean(has_flight) >= 0.99


def test_runs_are_maximal_and_split_at_contacts_and_gaps() -> None:
    tracked = np.array([1, 1, 1, 1, 0, 1, 1, 1, 1, 1], dtype=bool)
    contact = np.array([0, 0, 0, 0, 0, 0, 1, 0, 0], dtype=bool)
    assert flight_runs(tracked, contact, min_frames=1) == [slice(0, 4), slice(5, 7), slice(7, 10)]
    assert flight_runs(tracked, contact, min_frames=3) == [slice(0, 4), slice(7, 10)]
    assert flight_runs(np.zeros(4, dtype=bool), np.zeros(3, dtype=bool), min_frames=1) == []


def test_a_jump_in_mid_air_is_no_contact() -> None:
    position = np.full((10, 1, 2), 0.5)
    position[5:, 0, 0] = 0.3
    contacts = find_contacts(position, np.ones((10, 1), dtype=bool), np.array([0.095]), fps=10)
    assert not (contacts.floor | contacts.ceiling | contacts.wall | contacts.ball).any()


def test_fit_recovers_a_parabola() -> None:
    times = np.arange(7) / 24
    fit = fit_polynomial(0.3 - 0.2 * times + 0.45 * times**2, 2, fps=24)
    np.testing.assert_allclose(fit.coefficients, [0.3, -0.2, 0.45], atol=1e-10)
    assert np.abs(fit.residual).max() < 1e-12
    assert fit.degrees_of_freedom == 4
