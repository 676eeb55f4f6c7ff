"""Forms of a rotation: Euler angles, quaternion, axis-angle, 6-D and matrix, by way of unit quaternions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float, Float64

# fmt: off
RotationForm = Literal[
    "axis_angle", "quaternion_wxyz", "quaternion_xyzw", "rotation_6d", "matrix",
    "euler_xyz", "euler_xzy", "euler_yxz", "euler_yzx", "euler_zxy", "euler_zyx",
    "euler_XYZ", "euler_XZY", "euler_YXZ", "euler_YZX", "euler_ZXY", "euler_ZYX",
    "euler_xyx", "euler_xzx", "euler_yxy", "euler_yzy", "euler_zxz", "euler_zyz",
    "euler_XYX", "euler_XZX", "euler_YXY", "euler_YZY", "euler_ZXZ", "euler_ZYZ",
]
# fmt: on
"""Euler orders as scipy names them: lower case turns about the fixed axes (xyz: roll, pitch, yaw), upper case
about those that turn with the body. 6-D and matrix: the first two, or all columns, one behind the other."""
FORMS: tuple[RotationForm, ...] = get_args(RotationForm)
_SIZES = {"quaternion_wxyz": 4, "quaternion_xyzw": 4, "rotation_6d": 6, "matrix": 9}
Quaternions = Float64[np.ndarray, "*n 4"]
"""Unit quaternions, w first; q and -q are the same rotation."""
IDENTITY = (1.0, 0.0, 0.0, 0.0)
_LOCK = 1e-7
"""Radians from a gimbal lock within which the last of three Euler angles is 0, as in scipy."""


def size_of(form: RotationForm) -> int:
    """How many numbers a rotation of this form has."""
    return _SIZES.get(form, 3)


def lengths(values: Float[np.ndarray, "*n d"], form: RotationForm) -> Float64[np.ndarray, "*n k"]:
    """What must be 1 in a proper rotation: the quaternion's length; the columns' lengths, of the second that
    at right angles to the first, and of a matrix the third one along the other two's product. Forms of
    angles have none, (*n, 0)."""
    values = np.asarray(values, np.float64)
    if form.startswith("quaternion"):
        return np.linalg.norm(values, axis=-1, keepdims=True)
    if form not in ("rotation_6d", "matrix"):
        return np.empty((*values.shape[:-1], 0))
    columns = values.reshape(*values.shape[:-1], -1, 3)
    first = np.linalg.norm(columns[..., 0, :], axis=-1)
    a, b = _orthonormal(columns)
    found = [first, _dot(b, columns[..., 1, :])[..., 0]]
    if form == "matrix":
        found.append(_dot(np.cross(a, b), columns[..., 2, :])[..., 0])
    return np.stack(found, axis=-1)


def to_quaternions(values: Float[np.ndarray, "*n d"], form: RotationForm) -> Quaternions:
    """The unit quaternions of rotations; angles are radians. 6-D by Gram-Schmidt (1812.07035), a matrix by
    its first two columns likewise. Degenerate ones, whose `lengths` are 0, have no meaning."""
    values = np.asarray(values, np.float64)
    if form == "quaternion_wxyz":
        return _unit(values)
    if form == "quaternion_xyzw":
        return _unit(np.roll(values, 1, axis=-1))
    if form == "axis_angle":
        angle = np.linalg.norm(values, axis=-1, keepdims=True)
        # sin(angle / 2) / angle, which is 1/2 at 0
        return np.concatenate([np.cos(angle / 2), np.sinc(angle / (2 * np.pi)) / 2 * values], axis=-1)
    if form in ("rotation_6d", "matrix"):
        a, b = _orthonormal(values.reshape(*values.shape[:-1], -1, 3))
        return _of_matrices(np.stack([a, b, np.cross(a, b)], axis=-1))
    axes, turning = form.removeprefix("euler_"), form[-1].isupper()
    found = np.zeros((*values.shape[:-1], 4))
    found[..., 0] = 1
    for number, axis in enumerate(axes.lower()):
        step = np.zeros_like(found)
        step[..., 0], step[..., 1 + "xyz".index(axis)] = (
            np.cos(values[..., number] / 2),
            np.sin(values[..., number] / 2),
        )
        found = product(found, step) if turning else product(step, found)
    return found


def of_quaternions(
    quaternions: Quaternions, form: RotationForm, near: Sequence[float] = IDENTITY
) -> Float64[np.ndarray, "*n d"]:
    """The inverse of `to_quaternions`. Of q and -q the one within 90 degrees of `near`, w first, is taken, a
    function of the rotation alone; it jumps only half a turn away from `near`. The angle of an axis-angle is
    at most pi, the first and last of Euler angles lie in (-pi, pi]; in a gimbal lock the last one is 0."""
    if form.startswith("quaternion"):
        found = np.where(_dot(quaternions, np.asarray(near, np.float64)) < 0, -quaternions, quaternions)
        return found if form == "quaternion_wxyz" else np.roll(found, -1, axis=-1)
    if form == "axis_angle":
        positive = np.where(quaternions[..., :1] < 0, -quaternions, quaternions)
        axis = positive[..., 1:]
        sine = np.linalg.norm(axis, axis=-1, keepdims=True)
        angle = 2 * np.arctan2(sine, positive[..., :1])
        return axis * np.where(sine > 0, angle / np.where(sine > 0, sine, 1), 2.0)
    if form in ("rotation_6d", "matrix"):
        units = np.eye(3)[: 2 if form == "rotation_6d" else 3]
        columns = [rotate(quaternions, np.broadcast_to(u, (*quaternions.shape[:-1], 3))) for u in units]
        return np.concatenate(columns, axis=-1)
    return _euler(quaternions, form.removeprefix("euler_"))


def as_near(
    values: Float64[np.ndarray, "*n d"], others: Float64[np.ndarray, "*n d"], form: RotationForm
) -> Float64[np.ndarray, "*n d"]:
    """The same rotations in those of their numbers that are near to `others`: of q and -q the nearer one, of
    an axis-angle and of each Euler angle the one that whole turns bring nearest. So a recording that counts
    on beyond half a turn goes on."""
    if form.startswith("quaternion"):
        return np.where(_dot(values, others) < 0, -values, values)
    if form in ("rotation_6d", "matrix"):
        return values
    if form == "axis_angle":
        angle = np.linalg.norm(values, axis=-1, keepdims=True)
        axis = _unit(np.where(angle > 0, values, others))
        return axis * (angle + _whole_turns(_dot(axis, others) - angle))
    return values + _whole_turns(others - values)


def _whole_turns(angle: np.ndarray) -> np.ndarray:
    return 2 * np.pi * np.round(angle / (2 * np.pi))


def product(a: Float64[np.ndarray, "*#n 4"], b: Float64[np.ndarray, "*#n 4"]) -> Float64[np.ndarray, "*#n 4"]:
    """The rotation b, and then a."""
    w, x, y, z = np.moveaxis(a, -1, 0)
    p, q, r, s = np.moveaxis(b, -1, 0)
    return np.stack(
        [
            w * p - x * q - y * r - z * s,
            w * q + x * p + y * s - z * r,
            w * r - x * s + y * p + z * q,
            w * s + x * r - y * q + z * p,
        ],
        axis=-1,
    )


def inverse(quaternions: Quaternions) -> Quaternions:
    """The rotations back."""
    return quaternions * np.array([1.0, -1.0, -1.0, -1.0])


def rotate(
    quaternions: Float64[np.ndarray, "*#n 4"], vectors: Float64[np.ndarray, "*#n 3"]
) -> Float64[np.ndarray, "*#n 3"]:
    """The vectors, turned."""
    axis = quaternions[..., 1:]
    twice = 2 * np.cross(axis, vectors)
    return vectors + quaternions[..., :1] * twice + np.cross(axis, twice)


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(axis=-1, keepdims=True)


def _unit(vectors: np.ndarray) -> Any:
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(length == 0, 1, length)


def _orthonormal(columns: Float64[np.ndarray, "*n c 3"]) -> tuple[np.ndarray, np.ndarray]:
    """Gram-Schmidt of the first two columns."""
    a = _unit(columns[..., 0, :])
    return a, _unit(columns[..., 1, :] - _dot(a, columns[..., 1, :]) * a)


def _of_matrices(m: Float64[np.ndarray, "*n 3 3"]) -> Quaternions:
    """Each of the four rows is the quaternion, times four of its numbers; the largest is the most exact."""
    x, y, z = m[..., 0, 0], m[..., 1, 1], m[..., 2, 2]
    a, b, c = m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]
    d, e, f = m[..., 1, 0] + m[..., 0, 1], m[..., 0, 2] + m[..., 2, 0], m[..., 2, 1] + m[..., 1, 2]
    rows = [
        [1 + x + y + z, a, b, c],
        [a, 1 + x - y - z, d, e],
        [b, d, 1 - x + y - z, f],
        [c, e, f, 1 - x - y + z],
    ]
    table = np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)
    best = np.argmax(np.diagonal(table, axis1=-2, axis2=-1), axis=-1)
    return _unit(np.take_along_axis(table, best[..., None, None], axis=-2)[..., 0, :])


def _euler(quaternions: Quaternions, axes: str) -> Float64[np.ndarray, "*n 3"]:
    """Angles about three axes, straight from the quaternion (Bernardes & Viollet 2022, as scipy has it)."""
    turning = axes.isupper()
    i, j, k = ("xyz".index(axis) for axis in (axes.lower()[::-1] if turning else axes))
    if symmetric := i == k:
        k = 3 - i - j
    sign = (i - j) * (j - k) * (k - i) // 2
    w, vector = quaternions[..., 0], quaternions[..., 1:]
    a, b, c, d = w, vector[..., i], vector[..., j], vector[..., k] * sign
    if not symmetric:
        a, b, c, d = a - c, b + d, c + a, d - b
    middle = 2 * np.arctan2(np.hypot(c, d), np.hypot(a, b))
    half_sum, half_difference = np.arctan2(b, a), np.arctan2(d, c)
    flat, turned = middle <= _LOCK, np.pi - middle <= _LOCK
    first, third = half_sum - half_difference, half_sum + half_difference
    if not symmetric:
        third, middle = third * sign, middle - np.pi / 2
    if turning:
        first, third = third, first
    locked = np.where(flat, 2 * half_sum, 2 * half_difference * (1 if turning else -1))
    found = np.stack([np.where(flat | turned, locked, first), middle, third], axis=-1)
    found[..., 2] = np.where(flat | turned, 0, found[..., 2])
    return np.where(np.abs(found) > np.pi, found - 2 * np.pi * np.sign(found), found)
