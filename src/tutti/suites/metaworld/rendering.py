"""Renders a MuJoCo scene fast: cameras placed freely, thinned meshes, one OpenGL context kept open.

At 96 px a picture costs about 4 CPU ms, against 100 for the default renderer (measured, software EGL):
shadows, reflections and multisampling are off, and meshes keep one vertex in a cell of 1 cm. "shaded", with
coarse shadows and reflections and two pixels for one, costs 20 and is what "full" pictures of 480 px, 160 ms
each, look like at 96 px: the mean of |difference| is 1.2 of 255, against 7.6 when drawn fast.

MuJoCo and Meta-World are imported here, on first use and not when `tutti` is, so training on a machine
without a simulator works; their environment variables are set first, and what is missing is explained.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import functools
import importlib
import math
import os
import sys
import warnings
import weakref
from types import ModuleType
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from tutti.errors import UserError

MESH_CELL = 0.01
SHADOWS, SHADED_SCALE = 512, 2  # "shaded": the edge of the shadow map (of "full": 4096), pixels for one
Drawing = Literal["fast", "shaded", "full"]
LARGEST_THINNED_SIZE = 128  # Above this edge in pixels the thinned arm begins to show gaps.
_MIN_FACES = 200

# (where a camera stands, where it looks, both in metres in the world frame; its vertical field in degrees)
VIEWS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float], float]] = {
    "right": ((0.75, 0.45, 0.75), (0.0, 0.72, 0.08), 32.0),
    "left": ((-0.75, 0.45, 0.75), (0.0, 0.72, 0.08), 32.0),
    "close": ((0.55, 0.15, 0.65), (0.0, 0.72, 0.10), 50.0),
    "front": ((0.0, 1.55, 0.75), (0.0, 0.70, 0.10), 32.0),
    "top": ((0.0, 0.72, 1.5), (0.0, 0.721, 0.0), 24.0),
}

CORNER2 = "corner2"
FIXED_VIEWS: dict[str, tuple[tuple[float, float, float] | None, tuple[int, int]]] = {
    "corner2_moved": ((0.75, 0.075, 0.7), (1, 1)),  # as LeRobot moves it
    "corner2_cropped": (None, (2, 3)),  # as starVLA sees it: the middle of it, 2/3 of each edge
}
"""Views of Meta-World's own camera, both axes flipped, for it hangs upside down: where it is moved to, and
the part of each edge that is kept. A cropped one is drawn at 15/7 of its size, 480 for 224, and reduced."""
DRAWN_CROPPED = (15, 7)

# Read by mujoco when it is imported, and by Mesa when it opens its first context. LP_NUM_THREADS=0 makes
# the software rasteriser work in the calling thread: several processes render, none waits for threads.
if sys.platform == "linux":  # elsewhere there is no EGL, and mujoco's own choice is right
    os.environ.setdefault("MUJOCO_GL", "egl")
os.environ.setdefault("LP_NUM_THREADS", "0")

INSTALL = "pip install 'tutti-vla[simulation]'"
CURE = (
    "On Linux rendering needs EGL, in software is enough. On Debian or Ubuntu:\n"
    "    apt-get install --no-install-recommends libegl1 libgl1-mesa-dri\n"
    "and the environment variable MUJOCO_GL=egl, set before Python first imports mujoco "
    "(tutti sets it if it is unset)."
)


@functools.cache
def load_mujoco() -> ModuleType:
    """The module `mujoco`, imported with the settings above.

    Raises:
        UserError: it is not installed, or the OpenGL library that MUJOCO_GL names cannot be loaded.
    """
    try:
        return importlib.import_module("mujoco")
    except ModuleNotFoundError as error:
        raise UserError(f"The simulator is not installed ({error}). Install it with: {INSTALL}") from error
    except Exception as error:
        # PyOpenGL reports a missing libEGL as an AttributeError or an ImportError, by version.
        raise UserError(
            f"mujoco could not be imported with MUJOCO_GL={os.environ.get('MUJOCO_GL')!r}: "
            f"{type(error).__name__}: {error}\n{CURE}"
        ) from error


@functools.cache
def load_metaworld() -> tuple[dict[str, type], dict[str, type]]:
    """Meta-World's environment classes and its scripted experts, both by name ("reach-v3").

    Raises:
        UserError: Meta-World or the simulator under it is not installed or cannot be loaded.
    """
    load_mujoco()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            environments = importlib.import_module("metaworld.env_dict").ALL_V3_ENVIRONMENTS
            experts = importlib.import_module("metaworld.policies").ENV_POLICY_MAP
    except ImportError as error:
        # Meta-World 3.1.1 imports `packaging` but does not ask pip for it.
        raise UserError(f"Meta-World could not be imported ({error}). Install it with: {INSTALL}") from error
    return dict(environments), dict(experts)


def _thin_meshes(model: Any) -> None:
    """Removes most triangles of every mesh of 200 faces or more, in place; for a model that is only drawn.

    Vertices are grouped in cubes of edge `MESH_CELL` (metres); each becomes its cube's real vertex nearest to
    the cube's mean. Triangles that collapse or repeat go; the rest move to the front of the mesh's range.
    """
    for mesh in range(model.nmesh):
        start, count = int(model.mesh_faceadr[mesh]), int(model.mesh_facenum[mesh])
        if count < _MIN_FACES:
            continue
        first, total = int(model.mesh_vertadr[mesh]), int(model.mesh_vertnum[mesh])
        nearest = _nearest_to_mean(np.asarray(model.mesh_vert[first : first + total]))
        faces = nearest[model.mesh_face[start : start + count]]
        solid = (faces[:, 0] != faces[:, 1]) & (faces[:, 1] != faces[:, 2]) & (faces[:, 0] != faces[:, 2])
        _, unique = np.unique(np.sort(faces, axis=1), axis=0, return_index=True)
        seen_first = np.zeros(count, dtype=bool)
        seen_first[unique] = True
        kept = np.flatnonzero(solid & seen_first)
        model.mesh_face[start : start + len(kept)] = faces[kept]
        for corners in (model.mesh_facenormal, model.mesh_facetexcoord):
            corners[start : start + len(kept)] = corners[start : start + count][kept].copy()
        model.mesh_facenum[mesh] = len(kept)


def _nearest_to_mean(vertices: np.ndarray) -> np.ndarray:
    """For each vertex, the index of the vertex of its cube that is nearest to the cube's mean."""
    cubes = np.floor(vertices / MESH_CELL).astype(np.int64)
    cube_of = np.unique(cubes, axis=0, return_inverse=True)[1].ravel()
    members = np.bincount(cube_of)
    mean = np.stack([np.bincount(cube_of, vertices[:, axis]) / members for axis in range(3)], axis=1)
    distance = ((vertices - mean[cube_of]) ** 2).sum(axis=1)
    order = np.lexsort((distance, cube_of))
    leaders = order[np.unique(cube_of[order], return_index=True)[1]]
    return leaders[cube_of]


class FastRenderer:
    """Draws the scene of one physics model from several views; keeps its context until `close`.

    It draws a copy of the model, so physics keeps its own meshes, and takes positions from the physics'
    `MjData`, which it never changes. Goal dots are sites and always drawn. Several renderers can live in
    one process: each makes its own context current before it draws.
    """

    max_geoms = 1000

    def __init__(
        self,
        model: Any,
        views: tuple[str, ...],
        image_size: int,
        samples: int = 0,
        *,
        drawing: Drawing = "fast",
    ) -> None:
        """Opens the context. `samples` is the multisampling of edges (0 off, 4 for videos); "full" leaves
        meshes, shadows and all else as they are; "shaded" is near to it at a small size.

        Raises:
            UserError: no OpenGL context can be opened.
        """
        self.mujoco = mujoco = load_mujoco()
        self._gl: Any = None
        self.views = views
        self.image_size = image_size
        self._cameras = [self.camera_of(model, view) for view in views]
        self._scale = SHADED_SCALE if drawing == "shaded" else 1
        self._sizes = [_drawn_size(view, image_size) * self._scale for view in views]
        size = max(self._sizes)
        self._model = drawn = copy.copy(model)
        drawn.vis.global_.offwidth = drawn.vis.global_.offheight = size
        if drawing != "full":
            if image_size <= LARGEST_THINNED_SIZE:
                _thin_meshes(drawn)
            shadows = SHADOWS if drawing == "shaded" else 0
            drawn.vis.quality.offsamples, drawn.vis.quality.shadowsize = samples, shadows
        if drawing == "fast":
            drawn.mat_reflectance[:] = 0.0
        self._gl = _open_gl(mujoco, size)
        # Registered after mujoco has registered the shutdown of EGL (with the first context), so that what is
        # still open when Python ends is closed before it.
        atexit.register(_close, weakref.ref(self))
        self._context = mujoco.MjrContext(self._model, mujoco.mjtFontScale.mjFONTSCALE_100)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._scene = mujoco.MjvScene(self._model, maxgeom=self.max_geoms)
        for flag in ("mjRND_SHADOW", "mjRND_REFLECTION", "mjRND_HAZE") if drawing == "fast" else ():
            self._scene.flags[getattr(mujoco.mjtRndFlag, flag)] = 0
        self._options = self.options()
        self._pixels = {size: np.zeros((size, size, 3), dtype=np.uint8) for size in self._sizes}

    def camera_of(self, model: Any, view: str) -> tuple[Any, float]:
        """The camera of a view, and the field of view of a free one, which a fixed one ignores."""
        return _camera_of(self.mujoco, model, view)

    def options(self) -> Any:
        """What is drawn: MuJoCo's own choice."""
        return self.mujoco.MjvOption()

    def upright(self, view: str, pixels: np.ndarray) -> np.ndarray:
        """OpenGL's rows come from the bottom up: a camera upside down has them in order, but mirrored."""
        return pixels[:, ::-1] if view in FIXED_VIEWS else pixels[::-1]

    def render(self, data: Any) -> UInt8[np.ndarray, "v h w 3"]:
        """The views of the scene where `data` says everything is; row 0 is the top of the picture."""
        mujoco = self.mujoco
        if self._gl is None:
            raise ValueError("This renderer is closed.")
        self._gl.make_current()
        pictures = np.empty((len(self.views), self.image_size, self.image_size, 3), dtype=np.uint8)
        for index, (view, (camera, fovy)) in enumerate(zip(self.views, self._cameras, strict=True)):
            size = self._sizes[index]
            pixels, rectangle = self._pixels[size], mujoco.MjrRect(0, 0, size, size)
            self._model.vis.global_.fovy = fovy
            mujoco.mjv_updateScene(
                self._model, data, self._options, None, camera, mujoco.mjtCatBit.mjCAT_ALL, self._scene
            )
            mujoco.mjr_render(rectangle, self._scene, self._context)
            mujoco.mjr_readPixels(pixels, None, rectangle, self._context)
            picture = self.upright(view, pixels)
            if self._scale > 1:
                # As a policy reduces larger pictures to its own size.
                edge = size // self._scale
                picture = np.asarray(Image.fromarray(picture).resize((edge, edge), Image.Resampling.BILINEAR))
            same = len(picture) == self.image_size
            pictures[index] = picture if same else _cropped(picture, view, self.image_size)
        return pictures

    def close(self) -> None:
        """Frees the context; once is enough, twice does no harm."""
        gl, self._gl = self._gl, None
        if gl is not None:
            gl.make_current()
            self._context.free()
            gl.free()

    def __del__(self) -> None:
        # Freed by itself, MuJoCo's context would delete its textures in whichever context is current.
        with contextlib.suppress(Exception):
            self.close()


def move_cameras(model: Any, views: tuple[str, ...]) -> None:
    """Moves Meta-World's camera, in the physics model, to where one of the views has it."""
    for place in (FIXED_VIEWS[view][0] for view in views if view in FIXED_VIEWS):
        if place is not None:
            model.camera(CORNER2).pos[:] = place


def _drawn_size(view: str, image_size: int) -> int:
    """The edge that a view is drawn with, before it is cropped."""
    up, down = DRAWN_CROPPED if view in FIXED_VIEWS and FIXED_VIEWS[view][1] != (1, 1) else (1, 1)
    return round(image_size * up / down)


def _cropped(picture: np.ndarray, view: str, image_size: int) -> np.ndarray:
    """The middle of a picture, reduced to `image_size` with linear interpolation at pixel centres, as
    OpenCV's INTER_LINEAR does, which rounds otherwise in the last digit."""
    top, bottom = FIXED_VIEWS[view][1]
    edge = round(len(picture) * top / bottom)
    first = (len(picture) - edge) // 2
    kept = picture[first : first + edge, first : first + edge].astype(np.float64)
    for axis in (0, 1):
        at = np.clip((np.arange(image_size) + 0.5) * edge / image_size - 0.5, 0, edge - 1)
        low = at.astype(int)
        share = (at - low).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        high = np.minimum(low + 1, edge - 1)
        kept = kept.take(low, axis) * (1 - share) + kept.take(high, axis) * share
    return np.rint(kept).astype(np.uint8)


def _camera_of(mujoco: Any, model: Any, view: str) -> tuple[Any, float]:
    """A camera, and the field of view of free ones, which a fixed one ignores."""
    if view in VIEWS:
        return _camera(mujoco, *VIEWS[view])
    camera = mujoco.MjvCamera()
    camera.type, camera.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, model.camera(CORNER2).id
    return camera, float(model.vis.global_.fovy)


def check_rendering() -> None:
    """Opens and closes an OpenGL context.

    Raises:
        UserError: it cannot be opened; the message names the packages to install.
    """
    _open_gl(load_mujoco(), 16).free()


def _camera(
    mujoco: Any, position: tuple[float, ...], look_at: tuple[float, ...], fovy: float
) -> tuple[Any, float]:
    camera = mujoco.MjvCamera()
    camera.type = mujoco.mjtCamera.mjCAMERA_FREE
    forward = np.asarray(look_at) - np.asarray(position)
    camera.lookat[:] = look_at
    camera.distance = float(np.linalg.norm(forward))
    camera.azimuth = math.degrees(math.atan2(forward[1], forward[0]))
    camera.elevation = math.degrees(math.asin(forward[2] / camera.distance))
    return camera, fovy


def _open_gl(mujoco: Any, image_size: int) -> Any:
    """A current OpenGL context that makes no noise when Python ends."""

    class QuietContext(mujoco.GLContext):
        # The inherited one raises after a failed construction and after EGL has been shut down.
        def __del__(self) -> None:
            with contextlib.suppress(Exception):
                super().__del__()

    try:
        context = QuietContext(image_size, image_size)
        context.make_current()
    except Exception as error:
        raise UserError(f"No OpenGL context: {type(error).__name__}: {error}\n{CURE}") from error
    return context


def _close(renderer: weakref.ref[FastRenderer]) -> None:
    with contextlib.suppress(Exception):
        if (alive := renderer()) is not None:
            alive.close()
