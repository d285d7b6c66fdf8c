"""What an export keeps: per linear, and in one line."""

import json
import shlex
from pathlib import Path

from rich.console import Console
from rich.table import Table

from qd2mora.merging import Export
from qd2mora.merging.fidelity import Fidelity
from qd2mora.report.cells import written

ENOUGH = 0.95
"""Share of the gain below which an export is called poor."""


def show_export(export: Export, out: Path, console: Console) -> None:
    """Print what an export keeps: end to end in one line, then by task and by linear."""
    lines = [
        f"export       {out}",
        verdict(export),
        warning(export),
        _bases(export),
        _rounding(export),
        _file(export),
        _ollama(out),
        _vllm(export, out),
    ]
    for line in lines:
        if line is not None:
            console.print(line, highlight=False, soft_wrap=True)
    if export.exact:
        return
    if export.fidelity is not None and len(export.fidelity.tasks) > 1:
        console.print(_tasks(export))
    if export.unexplained:
        console.print(_unexplained(export))


def _unexplained(export: Export) -> Table:
    """One row a layer, one column a kind of linear."""
    shares: dict[str, dict[str, float]] = {}
    for name, share in export.unexplained.items():
        layer, _, kind = name.removeprefix("model.layers.").partition(".")
        shares.setdefault(layer, {})[kind.rpartition(".")[2] or name] = share
    kinds = sorted({kind for row in shares.values() for kind in row})
    table = Table("layer", *kinds, title=f"share of the adapter's output that static weights miss ({export.strategy})")
    for layer, row in shares.items():
        table.add_row(layer, *(written(row.get(kind), ".2%") for kind in kinds))
    return table


def verdict(export: Export) -> str:
    """Say in one line what the export is worth."""
    how, fidelity = _how(export), export.fidelity
    if not export.updates.is_measured:
        return f"{how}; what it keeps was NOT measured (--measure none)"
    if fidelity is None:
        return f"{how}; no held-out rows to measure it on"
    if export.form.is_routed:
        return f"the routed model itself (loss {fidelity.routed:.3f}; base {fidelity.base:.3f}); {how}"
    kept = "has no gain to keep"
    if fidelity.gain_kept is not None:
        kept = f"keeps {fidelity.gain_kept:.1%} of the gain"
    return (
        f"merged {kept} (loss {fidelity.routed:.3f} -> {fidelity.merged:.3f}; base {fidelity.base:.3f}); "
        f"KL {fidelity.kl_per_token:.4f} nats a token, same greedy token {fidelity.agreement:.1%}; {how}"
    )


def _rounding(export: Export) -> str | None:
    """Say what storing in bfloat16 or in 8 bits takes from the updates, which float16 hardly touches."""
    shares = export.written.rounding.values()
    if export.form.dtype not in ("bfloat16", "q8_0") or not shares:
        return None
    taken = f"{sum(shares) / len(shares):.1%} of an update, {max(shares):.1%} at most"
    return f"rounding to {export.form.dtype}, after this was measured, takes {taken}"


def _file(export: Export) -> str | None:
    """Say what was kept before quantising, beside what the file keeps, and of what kinds it is."""
    after, before = export.as_written, export.updates.bases.get(export.form.base)
    if not export.form.is_measured_as_written:
        return None
    kinds = ", ".join(f"{number} {kind}" for kind, number in export.written.kinds.items())
    line = f"{export.form.dtype}: {export.written.num_bytes:,} bytes, tensors {kinds}"
    if after is None or before is None:
        return line
    line += f"; measured on the file itself, read back: loss {after.merged:.4f}, KL {after.kl_per_token:.4f}, "
    line += f"same greedy token {after.agreement:.1%}; before quantising: loss {before.merged:.4f}, "
    line += f"KL {before.kl_per_token:.4f}, same greedy token {before.agreement:.1%}"
    if after.gain_kept is not None and before.gain_kept:
        line += f"; of the gain that fp16 keeps it keeps {after.gain_kept / before.gain_kept:.1%}"
    return line


def _ollama(out: Path) -> str | None:
    """Say how Ollama takes a GGUF file, where a Modelfile lies beside it."""
    path = out / "Modelfile"
    if not path.is_file():
        return None
    line = f"for Ollama   ollama create NAME -f {path}"
    if "\nADAPTER " in path.read_text(encoding="utf-8"):
        line += ", once its FROM names a GGUF file of the base"
    return line


_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM keeps room for, `MaxLoRARanks` of its `config/lora.py` (0.11)."""


def _vllm(export: Export, out: Path) -> str | None:
    """Return the command that serves a LoRA in vLLM."""
    path = out / "adapter_config.json"
    if export.form.to != "lora" or not path.is_file():
        return None
    config = json.loads(path.read_text(encoding="utf-8"))
    room = next((rank for rank in _VLLM_RANKS if rank >= config["r"]), None)
    if room is None:
        return f"for vLLM     no: it takes ranks up to {_VLLM_RANKS[-1]}, this LoRA has {config['r']}; --to hf will do"
    name, base = export.updates.task or out.name, config["base_model_name_or_path"]
    serve = f"vllm serve {shlex.quote(base)} --enable-lora --max-lora-rank {room}"
    return f"for vLLM     {serve} --lora-modules {shlex.quote(f'{name}={out.resolve()}')}"


def warning(export: Export) -> str | None:
    """Say loudly that too little is kept, and which rung keeps more; None where enough is."""
    fidelity = export.fidelity
    if fidelity is None or fidelity.gain_kept is None or fidelity.gain_kept >= ENOUGH:
        return None
    updates, better = export.updates, list[str]()
    if export.as_written is not None:
        better.append("--dtype q8_0 or one of more bits than this")
    if updates.strategy != "distill" and not updates.exact:
        better.append("--strategy distill")
    if updates.task is None and len(fidelity.tasks) > 1:
        better.append("--task all (one export for each task)")
    if export.form.base == "original":
        better.append("--base dequantized")
    if not updates.exact:
        better.append("--to exact (the routed model itself, nothing lost)")
    ways = "; ".join(better)
    return (
        f"WARNING: only {fidelity.gain_kept:.1%} of the gain is kept, less than {ENOUGH:.0%}. What keeps more: {ways}"
    )


def _how(export: Export) -> str:
    if export.exact and export.form.dtype == "nf4":
        return "on the 4-bit weights that were trained on, bit for bit"
    if export.exact:
        return f"exact up to {export.form.dtype} rounding"
    words, notes = export.strategy, export.updates.notes
    if "chosen" in notes:
        words += f" took {notes['chosen']}"
    if notes.get("steps"):
        words += f" ({notes['steps']} steps)"
    words += ", an approximation"
    if notes.get("kept"):
        words += ", kept from an earlier merge"
    elif "making" in export.updates.seconds:
        words += f", made in {export.updates.seconds['making']:.0f} s"
    return words


def _bases(export: Export) -> str | None:
    """Compare both bases, where both were measured."""
    if len(export.updates.bases) < 2:
        return None
    bases = export.updates.bases
    losses = ", ".join(f"{name} {each.merged:.4f}" for name, each in bases.items())
    written = f"written: {export.form.base}"
    if export.form.rung.holds_no_base:
        written = f"a LoRA holds neither: {_on_16_bits(bases['dequantized'], bases['original'])}"
    return f"loss by the base that the update is added to: {losses}; {written}"


def _on_16_bits(trained_on: Fidelity, original: Fidelity) -> str:
    """Say what other programs lose that load a LoRA of a 4-bit base on the 16-bit one."""
    lost, gain = original.merged - trained_on.merged, trained_on.base - trained_on.routed
    if lost <= 0:
        return "on the 16-bit base, where other programs load it, it is no worse"
    share = f", {lost / gain:.0%} of the gain" if gain > 0 else ""
    how = "is much worse" if gain > 0 and lost > (1 - ENOUGH) * gain else "is a little worse"
    return (
        f"on the 16-bit base, where other programs load it, this LoRA {how} ({lost:.4f} nats a token{share}) than on "
        "the 4-bit weights it was trained on; load it on those, or export --to hf"
    )


def _tasks(export: Export) -> Table:
    table = Table("task", "base", "routed", "merged", "gain kept", "KL", "same token", title="held-out loss by task")
    assert export.fidelity is not None
    for name, each in export.fidelity.tasks.items():
        kept = written(each.gain_kept, ".1%")
        losses = (f"{loss:.4f}" for loss in (each.base, each.routed, each.merged))
        table.add_row(name, *losses, kept, f"{each.kl_per_token:.4f}", f"{each.agreement:.1%}")
    return table


__all__ = ["ENOUGH", "show_export", "verdict", "warning"]
