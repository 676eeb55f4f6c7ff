"""A moving picture for the README: one scene twice, from one start, told two things; the sentence decides.

python benchmarks/picture_obey.py runs/demo plays the start `--seed` of the task faucet-open twice, to the bit
the same one: told to open the tap, and told to close it, both in words that were held out. Meta-World itself
judges both: its task faucet-close, set to the same place, makes every move of the second rollout too. The
same policy gives the same bytes. The exit code is 1 if a sentence was not obeyed; no other start is tried.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from tables import prints_user_errors

from tutti.cli.commands import WRONG
from tutti.config.files import require_run
from tutti.evaluation import RolloutPolicy
from tutti.evaluation.closed_loop.evaluate import one_torch_thread
from tutti.evaluation.closed_loop.videos import PAPER, encode_gif, told
from tutti.runs.play import Player
from tutti.runs.terminal import print_line
from tutti.storage.files import write_atomically
from tutti.suites.metaworld.suite import METAWORLD_8
from tutti.suites.metaworld.task import MetaWorldTask

SCENE = "faucet-open"
TASKS = (SCENE, "faucet-close")
SAID = ("please turn on the tap", "please turn off the tap")
"""Held-out wordings of the two."""
VIEW, SIZE, SLOWER = "right", 400, 2
"""What is drawn: a camera, the edge of its picture in pixels, and how many times slower than it was."""
GAP = 6
LARGEST = 2_000_000
"""Bytes of the file."""

Frames = UInt8[np.ndarray, "t h w 3"]


def same_start(scene: MetaWorldTask, other: MetaWorldTask, seed: int) -> None:
    """Resets both to the start `seed` of `scene`, whatever place `other` would draw for it."""
    scene.reset(seed)
    other._env._last_rand_vec = scene._env._last_rand_vec
    other._env._freeze_rand_vec = True  # Meta-World: keep the place of before
    other.reset(seed)


def act(player: Player, policy: RolloutPolicy, sentence: tuple[str, str], seed: int) -> tuple[Frames, bool]:
    """The policy in the scene, told a `sentence` (its task, its words), until that task is solved. Gives the
    pictures and whether it was."""
    (task, instruction), spec = sentence, player.spec
    suite, most = METAWORLD_8.with_changes(views=player.suite.views), spec.max_decisions
    camera = suite.with_changes(views=(VIEW,))
    with ExitStack() as stack:
        scene, judge, drawn = (
            stack.enter_context(closing(one))
            for one in (suite.make(SCENE), suite.make(task), camera.make(SCENE, SIZE, samples=4))
        )
        for other in (judge, drawn):
            same_start(scene, other, seed)
        frames = [drawn.render()[0]]
        while len(frames) <= most and not judge.success:
            pictures = dict(zip(suite.views, scene.render(), strict=True))
            for action in policy.predict(pictures, scene.state, instruction)[: spec.actions_per_query]:
                for one in (scene, judge, drawn):
                    one.step(action)
                frames.append(drawn.render()[0])
                if judge.success or len(frames) > most:
                    break
        return np.stack(frames), judge.success


def beside(panels: Sequence[Frames]) -> Frames:
    """The panels side by side, each with its last picture held until the longest has ended."""
    longest = max(map(len, panels))
    full = [np.concatenate([panel, panel[-1:].repeat(longest - len(panel), 0)]) for panel in panels]
    shape = (longest, full[0].shape[1], GAP, 3)
    gap = np.broadcast_to(np.array(PAPER, np.uint8), shape)
    return np.concatenate([full[0], gap, full[1]], axis=2)


def make(player: Player, seed: int) -> tuple[bytes, list[bool]]:
    """The GIF, and which of the two sentences was obeyed."""
    policy = player.spec.policy()
    with one_torch_thread():
        acted = [act(player, policy, sentence, seed) for sentence in zip(TASKS, SAID, strict=True)]
    panels = [
        told(frames[:, None], said, success) for (frames, success), said in zip(acted, SAID, strict=True)
    ]
    return encode_gif(beside(panels), player.suite.fps / SLOWER), [success for _, success in acted]


@prints_user_errors
def main(given: list[str] | None = None) -> int:
    """0 if both sentences were obeyed and the file is small enough."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("policy", type=Path)
    parser.add_argument("--seed", type=int, default=9000)
    parser.add_argument("--output", type=Path, default=Path("docs/pictures/obey.gif"))
    arguments = parser.parse_args(given)
    gif, obeyed = make(Player.of(require_run(arguments.policy)), arguments.seed)
    write_atomically(arguments.output, gif)
    for said, success in zip(SAID, obeyed, strict=True):
        print_line(f'start {arguments.seed}, told "{said}": {"success" if success else "no success"}')
    print_line(f"Written: {arguments.output}, {len(gif) / 1e6:.2f} MB")
    return 0 if all(obeyed) and len(gif) <= LARGEST else WRONG


if __name__ == "__main__":
    sys.exit(main())
