"""The one door to the terminal: what is printed is harmless text, and no stream stops a command."""

from qd2mora.terminal.streams import Outlet, Screen, Unbreakable, harmless, lost_output, open_terminal

__all__ = ["Outlet", "Screen", "Unbreakable", "harmless", "lost_output", "open_terminal"]
