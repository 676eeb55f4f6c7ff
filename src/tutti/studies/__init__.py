"""Many runs at once: arms x data levels x seeds at an equal budget, and what their scores say."""
