"""Renders a MuJoCo scene fast: cameras placed freely, thinned meshes, one OpenGL context kept open.

At 96 px a picture costs about 3 CPU ms, against 115 for the default renderer (measured, software EGL):
shadows, reflections and multisampling are off, and meshes keep one vertex in a cell of 1 cm.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import math
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8

from tutti.errors import UserError
from tutti.suites.metaworld.mujoco import CURE, load_mujoco

MESH_CELL = 0.01
LARGEST_THINNED_SIZE = 128  # Above this edge in pixels the thinned arm begins to show gaps.
_MIN_FACES = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """A camera: where it stands and where it looks (metres, world frame), its vertical field (degrees)."""

    position: tuple[float, float, float]
    look_at: tuple[float, float, float]
    fovy: float


VIEWS: dict[str, View] = {
    "right": View(position=(0.75, 0.45, 0.75), look_at=(0.0, 0.72, 0.08), fovy=32.0),
    "left": View(position=(-0.75, 0.45, 0.75), look_at=(0.0, 0.72, 0.08), fovy=32.0),
    "close": View(position=(0.55, 0.15, 0.65), look_at=(0.0, 0.72, 0.10), fovy=50.0),
    "front": View(position=(0.0, 1.55, 0.75), look_at=(0.0, 0.70, 0.10), fovy=32.0),
    "top": View(position=(0.0, 0.72, 1.5), look_at=(0.0, 0.721, 0.0), fovy=24.0),
}


def find_views(names: tuple[str, ...]) -> tuple[View, ...]:
    """The cameras of these names.

    Raises:
        UserError: a name is unknown.
    """
    for name in names:
        if name not in VIEWS:
            raise UserError(f"views: {name!r} is not a camera view. Known: {', '.join(VIEWS)}.")
    return tuple(VIEWS[name] for name in names)


def thin_meshes(model: Any, cell: float = MESH_CELL) -> None:
    """Removes most triangles of every mesh of 200 faces or more, in place; for a model that is only drawn.

    Vertices are grouped in cubes of edge `cell` (metres); each becomes its cube's real vertex nearest to
    the cube's mean. Triangles that collapse or repeat go; the rest move to the front of the mesh's range.
    """
    for mesh in range(model.nmesh):
        start, count = int(model.mesh_faceadr[mesh]), int(model.mesh_facenum[mesh])
        if count < _MIN_FACES:
            continue
        first, total = int(model.mesh_vertadr[mesh]), int(model.mesh_vertnum[mesh])
        nearest = _nearest_to_mean(np.asarray(model.mesh_vert[first : first + total]), cell)
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


def _nearest_to_mean(vertices: np.ndarray, cell: float) -> np.ndarray:
    """For each vertex, the index of the vertex of its cube that is nearest to the cube's mean."""
    cubes = np.floor(vertices / cell).astype(np.int64)
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

    def __init__(
        self,
        model: Any,
        views: tuple[str, ...],
        image_size: int,
        *,
        mesh_cell: float | None = MESH_CELL,
        samples: int = 0,
    ) -> None:
        """Opens the context.

        `mesh_cell` None keeps every triangle; `samples` is the multisampling of edges (0 off, 4 for videos).

        Raises:
            UserError: a view is unknown, or no OpenGL context can be opened.
        """
        mujoco = load_mujoco()
        self._gl: Any = None
        self.views = views
        self.image_size = image_size
        self._cameras = [_camera(mujoco, view) for view in find_views(views)]
        self._model = _drawn_copy(model, image_size, mesh_cell, samples)
        self._gl = _open_gl(mujoco, image_size)
        _close_at_exit(self)
        self._context = mujoco.MjrContext(self._model, mujoco.mjtFontScale.mjFONTSCALE_100)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._scene = mujoco.MjvScene(self._model, maxgeom=1000)
        for flag in ("mjRND_SHADOW", "mjRND_REFLECTION", "mjRND_HAZE"):
            self._scene.flags[getattr(mujoco.mjtRndFlag, flag)] = 0
        self._options = mujoco.MjvOption()
        self._rectangle = mujoco.MjrRect(0, 0, image_size, image_size)
        self._pixels = np.zeros((image_size, image_size, 3), dtype=np.uint8)
        self._mujoco = mujoco

    def render(self, data: Any) -> UInt8[np.ndarray, "v h w 3"]:
        """The views of the scene where `data` says everything is; row 0 is the top of the picture."""
        mujoco = self._mujoco
        if self._gl is None:
            raise ValueError("This renderer is closed.")
        self._gl.make_current()
        pictures = np.empty((len(self.views), self.image_size, self.image_size, 3), dtype=np.uint8)
        for index, (camera, fovy) in enumerate(self._cameras):
            self._model.vis.global_.fovy = fovy
            mujoco.mjv_updateScene(
                self._model, data, self._options, None, camera, mujoco.mjtCatBit.mjCAT_ALL, self._scene
            )
            mujoco.mjr_render(self._rectangle, self._scene, self._context)
            mujoco.mjr_readPixels(self._pixels, None, self._rectangle, self._context)
            pictures[index] = self._pixels[::-1]
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


def check_rendering() -> None:
    """Opens and closes an OpenGL context.

    Raises:
        UserError: it cannot be opened; the message names the packages to install.
    """
    _open_gl(load_mujoco(), 16).free()


def _camera(mujoco: Any, view: View) -> tuple[Any, float]:
    camera = mujoco.MjvCamera()
    camera.type = mujoco.mjtCamera.mjCAMERA_FREE
    forward = np.asarray(view.look_at) - np.asarray(view.position)
    camera.lookat[:] = view.look_at
    camera.distance = float(np.linalg.norm(forward))
    camera.azimuth = math.degrees(math.atan2(forward[1], forward[0]))
    camera.elevation = math.degrees(math.asin(forward[2] / camera.distance))
    return camera, view.fovy


def _drawn_copy(model: Any, image_size: int, mesh_cell: float | None, samples: int) -> Any:
    drawn = copy.copy(model)
    if mesh_cell is not None:
        thin_meshes(drawn, mesh_cell)
    drawn.vis.quality.offsamples = samples
    drawn.vis.quality.shadowsize = 0
    drawn.vis.global_.offwidth = drawn.vis.global_.offheight = image_size
    drawn.mat_reflectance[:] = 0.0
    return drawn


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


_open: weakref.WeakSet[FastRenderer] = weakref.WeakSet()


def _close_at_exit(renderer: FastRenderer) -> None:
    """Closes what is still open when Python ends.

    Registered after mujoco has registered the shutdown of EGL (with the first context), so it runs before.
    """
    if not _open:
        atexit.unregister(_close_all)
        atexit.register(_close_all)
    _open.add(renderer)


def _close_all() -> None:
    for renderer in list(_open):
        with contextlib.suppress(Exception):
            renderer.close()
