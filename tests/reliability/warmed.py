"""What the fork server preloads."""

from runs import warm

warm()
