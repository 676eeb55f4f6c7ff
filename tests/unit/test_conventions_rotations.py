"""Forms of a rotation against scipy's, with the error bounds that docs/how-to/conventions.md promises."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial.transform import Rotation

from tutti.data.conventions.rotations import (
    FORMS,
    RotationForm,
    inverse,
    lengths,
    of_quaternions,
    product,
    rotate,
    size_of,
    to_quaternions,
)

EXACT, NEAR_LOCK, FLOAT32 = 1e-13, 3e-7, 6e-7
"""Radians: in float64, in float64 within 1e-7 of a gimbal lock of Euler angles, and in float32."""
COUNT = 64
UNIT = arrays(np.float64, (COUNT, 3), elements=st.floats(-1, 1, width=32))


def reference(rotation: Rotation, form: RotationForm) -> np.ndarray:
    """The numbers of a rotation by scipy."""
    if form == "axis_angle":
        return rotation.as_rotvec()
    if form.startswith("quaternion"):
        return np.roll(rotation.as_quat(), form == "quaternion_wxyz", axis=-1)
    columns = rotation.as_matrix().transpose(0, 2, 1).reshape(-1, 9)
    if form in ("rotation_6d", "matrix"):
        return columns[:, : size_of(form)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a gimbal lock
        return rotation.as_euler(form.removeprefix("euler_"))


def quaternions(rotation: Rotation) -> np.ndarray:
    return np.roll(rotation.as_quat(), 1, axis=-1)


def angle_between(mine: np.ndarray, rotation: Rotation) -> float:
    return float((Rotation.from_quat(np.roll(mine, -1, axis=-1)) * rotation.inv()).magnitude().max())


@st.composite
def rotations(draw: st.DrawFn) -> tuple[Rotation, float]:
    """Rotations of all kinds with the bound that holds for them: random ones, near the identity, near half a
    turn, near a gimbal lock of xyz."""
    kind = draw(st.sampled_from(["random", "identity", "half turn", "lock"]))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    axes = draw(UNIT) + generator.normal(size=(COUNT, 3))
    axes /= np.linalg.norm(axes, axis=1, keepdims=True)
    small = 10.0 ** generator.uniform(-12, -2, (COUNT, 1))
    if kind == "random":
        return Rotation.from_quat(generator.normal(size=(COUNT, 4))), EXACT
    if kind == "lock":
        middle = generator.choice([-1, 1], (COUNT, 1)) * (np.pi / 2 - small)
        ends = generator.uniform(-3, 3, (COUNT, 2))
        return Rotation.from_euler("xyz", np.hstack([ends[:, :1], middle, ends[:, 1:]])), NEAR_LOCK
    angle = small if kind == "identity" else np.pi - small
    # Proper Euler angles, such as zxz, are in a lock at the identity, and at some half turns.
    return Rotation.from_rotvec(axes * angle), NEAR_LOCK


@settings(max_examples=40, deadline=None)
@given(rotations())
def test_each_form_is_that_of_scipy_and_leads_back(made: tuple[Rotation, float]) -> None:
    rotation, bound = made
    for form in FORMS:
        limit = bound if form.startswith("euler") else EXACT
        theirs = reference(rotation, form)
        assert angle_between(to_quaternions(theirs, form), rotation) < limit, form
        mine = of_quaternions(quaternions(rotation), form)
        assert mine.shape == theirs.shape and np.isfinite(mine).all(), form
        assert angle_between(to_quaternions(mine, form), rotation) < limit, form
        assert angle_between(to_quaternions(mine.astype(np.float32), form), rotation) < FLOAT32 + limit, form
        assert np.abs(lengths(mine, form) - 1).max(initial=0) < EXACT


@pytest.mark.parametrize("form", FORMS)
def test_the_numbers_are_scipys_own(form: RotationForm) -> None:
    rotation = Rotation.random(200, rng=0)
    mine, theirs = of_quaternions(quaternions(rotation), form), reference(rotation, form)
    if form.startswith("quaternion"):
        theirs = theirs * np.sign((mine * theirs).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(mine, theirs, atol=1e-12)


def test_products_turn_as_scipys() -> None:
    a, b = Rotation.random(50, rng=1), Rotation.random(50, rng=2)
    points = np.random.default_rng(3).normal(size=(50, 3))
    assert angle_between(product(quaternions(a), quaternions(b)), a * b) < EXACT
    assert angle_between(inverse(quaternions(a)), a.inv()) < EXACT
    np.testing.assert_allclose(rotate(quaternions(a), points), a.apply(points), atol=1e-12)


def test_a_predicted_6d_becomes_the_nearest_by_gram_schmidt() -> None:
    """The first column keeps its direction, the second one its plane (1812.07035, equation 15)."""
    generator = np.random.default_rng(0)
    raw = generator.normal(size=(100, 6)) * 3
    found = of_quaternions(to_quaternions(raw, "rotation_6d"), "matrix").reshape(-1, 3, 3)
    a, b, c = found[:, 0], found[:, 1], found[:, 2]
    first, second = raw[:, :3], raw[:, 3:]
    np.testing.assert_allclose(a, first / np.linalg.norm(first, axis=1, keepdims=True), atol=1e-12)
    for one, other in ((a, b), (a, c), (b, c), (c, first), (c, second)):
        np.testing.assert_allclose((one * other).sum(axis=1), 0, atol=1e-12)
    assert ((b * second).sum(axis=1) > 0).all()
    np.testing.assert_allclose(np.linalg.det(np.stack([a, b, c], axis=-1)), 1)


def test_the_sign_of_a_quaternion_is_continuous_and_a_function_of_the_rotation() -> None:
    """Along a hand that points down, whose w changes its sign, none jumps once `near` points down too."""
    angles = np.linspace(np.pi - 1, np.pi + 1, 200)
    path = Rotation.from_rotvec(np.stack([angles, 0.2 * np.sin(angles), 0 * angles], axis=1))
    signs = np.where(np.arange(200) % 3, 1, -1)[:, None]  # as a driver may give them
    recorded = np.roll(path.as_quat(), 1, axis=1) * signs
    down = (0.0, 1.0, 0.0, 0.0)

    def steps(near: tuple[float, float, float, float]) -> float:
        found = of_quaternions(to_quaternions(recorded, "quaternion_wxyz"), "quaternion_wxyz", near)
        return float(np.linalg.norm(np.diff(found, axis=0), axis=1).max())

    assert steps(down) < 0.01
    assert steps((1.0, 0.0, 0.0, 0.0)) > 1
    both = [of_quaternions(sign * recorded, "quaternion_xyzw", down) for sign in (1, -1)]
    np.testing.assert_array_equal(*both)


def test_lengths_tell_what_is_no_rotation() -> None:
    assert lengths(np.zeros((1, 4)), "quaternion_wxyz").tolist() == [[0]]
    assert lengths(np.array([[1.0, 0, 0, 2, 0, 0]]), "rotation_6d").tolist() == [[1, 0]]  # parallel columns
    mirrored = np.array([[1.0, 0, 0, 0, 1, 0, 0, 0, -1]])
    assert lengths(mirrored, "matrix").tolist() == [[1, 1, -1]]
    assert lengths(np.zeros((2, 3)), "euler_xyz").shape == (2, 0)
