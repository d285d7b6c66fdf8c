"""From a run or an export to the hub: its files, verified and searched, and a card made of its own report."""

from qd2mora.publishing.card import CardFacts, card
from qd2mora.publishing.pushing import Pushed, PushOptions, push

__all__ = ["CardFacts", "PushOptions", "Pushed", "card", "push"]
