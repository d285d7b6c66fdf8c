"""What the fork server preloads."""

from forked_runs import warm

warm()
