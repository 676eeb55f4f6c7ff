"""Instructions for each Meta-World task: sentences to train on, and others held out for evaluation.

Meta-World has no language; these sentences are ours. A held-out sentence is new as a whole, but every word
of it occurs in the training sentences of the same task: a model trained from scratch cannot know a word
that it has never read.
"""

from __future__ import annotations

from tutti.errors import UserError
from tutti.suites.environment import Split

_TRAIN: dict[str, tuple[str, ...]] = {
    "reach": (
        "reach the red dot",
        "move the gripper to the red dot",
        "go to the red dot",
        "bring the hand to the red ball",
        "reach for the red ball in the air",
        "touch the red dot with the gripper",
        "move the robot hand to the red target",
        "please reach the red target",
        "leave the puck alone and go to the red ball",
        "put the gripper on the red dot",
    ),
    "push": (
        "push the puck to the green dot",
        "slide the puck to the green dot",
        "push the puck along the table to the green target",
        "move the puck over the table until it is on the green dot",
        "shove the puck to the green ball",
        "please push the puck to the green ball",
        "slide the puck along the table to the green ball",
        "push the small cylinder to the green dot",
        "bring the puck to the green target without lifting it",
        "move the cylinder to the green target by pushing it",
    ),
    "pick-place": (
        "pick up the puck and place it at the blue dot",
        "lift the puck to the blue dot",
        "grasp the puck and bring it to the blue dot",
        "pick up the puck and carry it to the blue ball",
        "take the puck and hold it at the blue target",
        "lift the puck up to the blue ball",
        "please pick up the puck and put it at the blue target",
        "grab the small cylinder and place it at the blue dot",
        "pick the puck and place it at the blue target",
        "carry the puck to the blue dot",
    ),
    "faucet-open": (
        "open the faucet",
        "turn on the faucet",
        "turn the faucet on",
        "open the tap",
        "turn on the water",
        "rotate the faucet handle to open it",
        "push the handle so that the faucet opens",
        "switch the tap on",
        "please open the water tap",
        "let the water run",
    ),
    "faucet-close": (
        "close the faucet",
        "turn off the faucet",
        "turn the faucet off",
        "close the tap",
        "turn off the water",
        "rotate the faucet handle to close it",
        "push the handle so that the faucet closes",
        "switch the tap off",
        "please close the water tap",
        "stop the water",
    ),
    "drawer-open": (
        "open the drawer",
        "pull the drawer open",
        "pull out the drawer",
        "pull the drawer out by its handle",
        "open the green drawer",
        "hook the handle and pull the drawer open",
        "please open the drawer of the box",
        "take the handle and pull",
        "slide the drawer out of the box",
        "pull the handle until the green drawer is open",
    ),
    "drawer-close": (
        "close the drawer",
        "push the drawer shut",
        "push in the drawer",
        "push the drawer in by its handle",
        "close the green drawer",
        "shut the drawer",
        "please close the drawer of the box",
        "press against the handle and push the drawer in",
        "slide the drawer into the box",
        "push the handle until the green drawer is shut",
    ),
    "window-close": (
        "close the window",
        "push the window shut",
        "slide the window shut",
        "shut the window",
        "push the window handle to close it",
        "please close the sliding window",
        "slide the window closed by its handle",
        "move the handle until the window is closed",
        "push the handle sideways and close the window",
        "shut the sliding window by its handle",
    ),
}

_HELD_OUT: dict[str, tuple[str, ...]] = {
    "reach": (
        "move the hand to the red ball",
        "please go to the red target",
        "touch the red ball with the robot hand",
        "bring the gripper to the red target",
        "reach the red ball",
    ),
    "push": (
        "slide the puck to the green target",
        "shove the small cylinder to the green dot",
        "please push the puck along the table to the green dot",
        "move the puck to the green ball by pushing it",
        "push the cylinder to the green target",
    ),
    "pick-place": (
        "grasp the puck and carry it to the blue target",
        "lift the small cylinder to the blue ball",
        "please grab the puck and place it at the blue ball",
        "take the puck and bring it to the blue dot",
        "pick up the cylinder and hold it at the blue target",
    ),
    "faucet-open": (
        "turn the tap on",
        "open the water faucet",
        "please turn on the tap",
        "rotate the tap handle to open it",
        "switch on the water",
    ),
    "faucet-close": (
        "turn the tap off",
        "close the water faucet",
        "please turn off the tap",
        "rotate the tap handle to close it",
        "switch off the water",
    ),
    "drawer-open": (
        "pull the green drawer out",
        "please pull the drawer open by its handle",
        "open the drawer of the green box",
        "slide the drawer open",
        "take the handle and pull out the drawer",
    ),
    "drawer-close": (
        "push the green drawer shut",
        "please shut the drawer by its handle",
        "close the drawer of the green box",
        "slide the drawer shut",
        "press the drawer into the box",
    ),
    "window-close": (
        "please push the window closed",
        "shut the window by its handle",
        "slide the handle until the window is shut",
        "move the sliding window shut",
        "close the window and push its handle sideways",
    ),
}


def instructions(task: str, split: Split = "train") -> tuple[str, ...]:
    """The sentences of a task: at least 8 to train on, at least 4 held out. None occurs twice anywhere.

    Raises:
        UserError: there are no sentences for this task.
    """
    sentences = _TRAIN if split == "train" else _HELD_OUT
    if task not in sentences:
        raise UserError(
            f"tasks: there are no instructions for {task!r}. Known: {', '.join(sentences)}. "
            "Add its sentences to tutti/suites/metaworld/instructions.py."
        )
    return sentences[task]
