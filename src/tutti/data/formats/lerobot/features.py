"""The features of a LeRobotDataset: which are cameras, states and actions, and what each number is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from tutti.data.episodes import VECTORS, Vector
from tutti.data.formats.dimensions import joined_dimensions
from tutti.data.formats.errors import data_error
from tutti.data.formats.interface import MAX_DIM, MAX_EDGE
from tutti.storage.reading import shown

_MAX_NAME, _MAX_DEPTH = 100, 8
_CHANNELS, _FIRST = (1, 3, 4), (["c"], ["channel"], ["channels"])


class Feature(BaseModel):
    """One feature of info.json. `names` are those of the axes, or of the numbers of a vector.

    Tutti writes the numbers' units beside them; LeRobot has no word for units.
    """

    model_config = ConfigDict(strict=True)

    dtype: str
    shape: list[Annotated[int, Field(gt=0, lt=2**31)]] = Field(max_length=8)
    names: Any = None
    units: Any = None
    info: Any = Field(default=None, validation_alias=AliasChoices("info", "video_info"))  # the latter in v2.0

    @property
    def is_camera(self) -> bool:
        """Whether it holds pictures, of whatever kind."""
        return self.dtype in ("image", "video")

    @property
    def is_vector(self) -> bool:
        """Whether it has one axis of numbers, of a length that can be read."""
        return len(self.shape) == 1 and self.shape[0] <= MAX_DIM

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels). The channels are the axis of 1, 3 or 4; where both ends are that, the
        one that `names` calls so, and else the last: names and shape of public sets contradict each other."""
        first, second, third = self.shape if len(self.shape) == 3 else (0, 0, 0)
        named = [str(path[-1]).lower() for path in _leaves(self.names)]
        channels_first = first in _CHANNELS and (third not in _CHANNELS or named[:1] in _FIRST)
        return (second, third, first) if channels_first else (first, second, third)

    @property
    def no_colours(self) -> str:
        """What makes its pictures no colour pictures; empty if they are."""
        info = self.info if isinstance(self.info, Mapping) else {}
        if any(info.get(key) is True for key in ("is_depth_map", "video.is_depth_map")):
            return "is a depth map"
        return "has one channel (depth or grey)" if self.image_shape[2] == 1 else ""


def find_cameras(
    features: Mapping[str, Feature], where: Path, chosen: Sequence[str] | None
) -> tuple[dict[str, tuple[int, int]], str]:
    """(height, width) of each view, and a sentence on cameras that are passed over, if any.

    Without `chosen` these are all colour cameras in the order of `where` (info.json); depth and mono cameras
    are passed over.

    Raises: UserError if a chosen one is no colour camera, or there is none.
    """
    cameras = {key: feature for key, feature in features.items() if feature.is_camera}
    without = {key: feature.no_colours for key, feature in cameras.items() if feature.no_colours}
    colour = [key for key in cameras if key not in without]
    listed = ", ".join(f"{key} {feature.shape}" for key, feature in cameras.items()) or "none"
    for view in chosen or ():
        if (chosen or ()).count(view) > 1:
            problem = f"views: {view!r} of {where} is named twice."
            raise data_error(problem, found=listed, cure="name each camera once by sources.views.")
        if view in without:
            problem = f"views: {view!r} of {where} {without[view]}; Tutti learns from colour pictures."
            cure = f"leave it out of sources.views, which may name {', '.join(colour) or 'none of this set'}."
            raise data_error(problem, expected="[height, width, 3], no depth map", found=listed, cure=cure)
        if view not in cameras:
            problem = f"views: {view!r} is no camera of {where}."
            raise data_error(problem, found=listed, cure="choose among these by sources.views.")
    if not (views := list(chosen or colour)):
        cure = "record the data set with a colour camera, or convert its pictures to 8-bit RGB."
        raise data_error(f"{where} has no colour camera.", found=f"the cameras {listed}", cure=cure)
    shapes: dict[str, tuple[int, int]] = {}
    for view in views:
        *size, channels = cameras[view].image_shape
        inside = "/" not in view and ".." not in view and "\0" not in view  # it is part of a path
        if channels != 3 or max(size) > MAX_EDGE or not inside:
            raise data_error(
                f"{where}: features[{view!r}].shape is {cameras[view].shape} with names "
                f"{shown(cameras[view].names)}; expected [height, width, 3], up to {MAX_EDGE}, and a name "
                "without '/' and '..'."
            )
        shapes[view] = (size[0], size[1])
    left_out = "; ".join(f"{key} {why}" for key, why in without.items() if chosen is None)
    text = f"cameras without colours are passed over (sources.views is auto): {left_out}"
    return shapes, text if left_out else ""


def usable(features: Mapping[str, Feature], keys: Sequence[str]) -> tuple[str, ...]:
    """`keys` where all of these features are vectors, none else: of a label that is not needed."""
    fits = all(key in features and features[key].is_vector for key in keys)
    return tuple(keys) if fits else ()


def vector_sizes(
    features: Mapping[str, Feature], where: Path, keys: Sequence[str], setting: Vector
) -> dict[str, int]:
    """How many numbers each of these features has. `setting` is the config key that names them.

    Raises: UserError with the features that would do, if one of them is none.
    """
    floats = {
        key: feature.shape
        for key, feature in features.items()
        if feature.dtype.startswith("float") and len(feature.shape) == 1 and key != "timestamp"
    }
    none = ", or none for a policy without proprioception" if setting == "state" else ""
    for key in keys:
        if key not in features or not features[key].is_vector:
            wrong = f"has the shape {features[key].shape}" if key in features else "is missing"
            raise data_error(
                f"{where}: the feature {key!r} {wrong}.",
                expected=f"one axis of up to {MAX_DIM} numbers",
                found=", ".join(f"{name} {shape}" for name, shape in floats.items())
                or "no float feature in this data set",
                cure=f"name one or several of these by sources.{setting}{none}; or train on this set "
                f"without {VECTORS[setting]} (sources.labels.{VECTORS[setting]}=false).",
            )
    return {key: features[key].shape[0] for key in keys}


def describe_dimensions(
    features: Mapping[str, Feature], keys: Sequence[str], what: str
) -> dict[str, tuple[str, ...]]:
    """Names and units of the numbers of these features, joined (`joined_dimensions`)."""
    sizes = {key: features[key].shape[0] for key in keys}
    names = {key: number_names(features[key]) for key in keys}
    units = {key: number_units(features[key]) for key in keys}
    return joined_dimensions(sizes, names, units, what)


def number_names(feature: Feature) -> list[str]:
    """The names of a vector's numbers; none where info.json does not have one for each."""
    return _names(feature.names, feature.shape[0])


def number_units(feature: Feature) -> list[str]:
    """The units of a vector's numbers; none where info.json does not have one for each."""
    given = feature.units
    fits = isinstance(given, list) and len(given) == feature.shape[0] and all(map(_is_text, given))
    return given if fits else []


def _names(given: Any, count: int) -> list[str]:
    """Names of `count` numbers from what info.json has: a list, nested or in a dict of groups, or a dict from
    name to place. Empty where they are not one name a number."""
    if isinstance(given, dict) and sorted(map(str, given.values())) == sorted(map(str, range(count))):
        given = sorted(given, key=lambda name: int(given[name]))
    paths = list(_leaves(given))
    names = [path[-1] for path in paths]
    if len(set(names)) < len(names):  # the joints of a left and of a right arm
        names = [".".join(path) for path in paths]
    fits = len(names) == count == len(set(names)) and all(_is_text(name) and name.strip() for name in names)
    return names if fits else []


def _leaves(given: Any, path: tuple[str, ...] = (), depth: int = 0) -> Iterator[tuple[Any, ...]]:
    """Each innermost value behind the keys of the groups that it lies in."""
    if isinstance(given, dict | list) and depth < _MAX_DEPTH:
        for key, value in given.items() if isinstance(given, dict) else ((None, one) for one in given):
            yield from _leaves(value, path if key is None else (*path, key), depth + 1)
    elif given is not None:
        yield (*path, given)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _MAX_NAME and value.isprintable()
