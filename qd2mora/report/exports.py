"""What an export keeps: per linear, and in one line."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from qd2mora.merging import Export


def show_export(export: Export, out: Path, console: Console) -> None:
    """Print what an export keeps: per linear, and end to end in one line."""
    if not export.exact:
        console.print(_unexplained(export))
    console.print(f"export       {out}", highlight=False, soft_wrap=True)
    console.print(verdict(export), highlight=False, soft_wrap=True)


def _unexplained(export: Export) -> Table:
    """One row a layer, one column a kind of linear."""
    shares: dict[str, dict[str, float]] = {}
    for name, share in export.unexplained.items():
        layer, _, kind = name.removeprefix("model.layers.").partition(".")
        shares.setdefault(layer, {})[kind.rpartition(".")[2] or name] = share
    kinds = sorted({kind for row in shares.values() for kind in row})
    table = Table("layer", *kinds, title=f"share of the adapter's output that static weights miss ({export.strategy})")
    for layer, row in shares.items():
        table.add_row(layer, *(f"{row[kind]:.2%}" if kind in row else "" for kind in kinds))
    return table


def verdict(export: Export) -> str:
    """Say in one line what the export is worth."""
    how = "exact up to float16 rounding" if export.exact else f"{export.strategy}, an approximation"
    fidelity = export.fidelity
    if fidelity is None:
        return f"{how}; no held-out rows to measure it on"
    kept = "no gain to keep" if fidelity.gain_kept is None else f"keeps {fidelity.gain_kept:.1%} of the gain"
    return (
        f"merged {kept} (held-out loss: base {fidelity.base:.4f}, routed {fidelity.routed:.4f}, merged "
        f"{fidelity.merged:.4f}; KL {fidelity.kl_per_token:.4f} nats a token); {how}"
    )


__all__ = ["show_export", "verdict"]
