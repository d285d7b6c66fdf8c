"""The methods: a table, or one in full."""

from rich import box
from rich.console import Console
from rich.table import Table

from qd2mora.base import SHAPES
from qd2mora.mixture import MixtureConfig
from qd2mora.mixture.counts import llama_linears, trainable_parameters
from qd2mora.mixture.method import Method
from qd2mora.mixture.presets import METHODS, find_method
from qd2mora.report.taxonomy import NONE, taxon_of
from qd2mora.routed.gate import Gate

EXPORT = {"static": "exact", "task": "exact per task", "token": "measured"}
WHAT_IT_MEANS = {
    "static": "merges exactly",
    "task": "merges exactly for one task",
    "token": "merges approximately, measured",
}
FORMULA = {
    "verified": "as in the authors' code",
    "reconstruction": "partly inferred",
    "part": "the part that carries over",
    "ours": "this project's own",
}
SCALING = {"total": "alpha / total rank", "expert": "alpha / rank", "active": "alpha / ranks used"}
GIVEN = {"no": "not taken", "allowed": "taken by adapter.adapters", "needed": "needed"}


def show_methods(name: str | None, console: Console) -> None:
    """Print the table of methods, or one in full."""
    if name is not None:
        console.print(method_text(find_method(name)), highlight=False, soft_wrap=True, markup=False)
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0))
    for heading in ("method", "what", "export", "formula"):
        table.add_column(heading, no_wrap=heading != "what")
    table.add_column("on 7B", justify="right", no_wrap=True)
    for method in METHODS.values():
        count = f"{parameters_on_7b(method) / 1e6:.1f}M"
        table.add_row(method.name, method.title.partition(": ")[2], _export_word(method), method.mark, count)
    console.print(table)
    console.print("On 7B: parameters trained on LLaMA-7B with each method's defaults.")
    console.print("`qd2mora methods --taxonomy` lists them by the words of the field's survey,")
    console.print("`qd2mora methods NAME` prints a method's equation, routers, defaults and source")


def method_text(method: Method) -> str:
    """Return a method in full: equation, source, what was inferred, routers, defaults."""
    experts, core = f"{method.down} down, {method.up} up, {method.pairing}", str(method.core)
    formula = FORMULA[method.mark]
    if method.allocation:
        experts += f", {method.allocation} by depth"
    if method.cores:
        core += f" of {method.cores}"
    if method.note:
        formula += f"; {method.note}"
    rows = {
        "equation": method.equation,
        "source": method.source,
        "formula": formula,
        "K depends on": f"{method.gates.depends_on}: {WHAT_IT_MEANS[method.gates.depends_on]}",
        "rank": ", ".join(map(str, method.ranks or (method.rank,))),
        "alpha": f"{method.alpha:g} (scaled by {SCALING[method.scaling_rank]})",
        "experts": experts,
        "core": core,
        **{f"router {role}": _gate_text(gate) for role, gate in method.gates.items()},
        "penalties": ", ".join(f"{each.kind} {each.weight:g}" for each in method.penalties) or "none",
        "init": f"down experts {method.init_down}, up experts " + _up_init(method),
        "targets": ", ".join(method.targets),
        "parameters": f"{parameters_on_7b(method):,} on LLaMA-7B with these defaults",
        "given LoRAs": GIVEN[method.given],
        "taxonomy": _taxonomy(method),
    }
    return method.title + "".join(f"\n  {key:13} {value}" for key, value in rows.items())


def parameters_on_7b(method: Method) -> int:
    """Return what a method trains on LLaMA-7B with its own defaults: eight tasks, vectors of 64 numbers."""
    shape = SHAPES["llama-7b"]
    linears = llama_linears(shape.hidden, shape.intermediate, shape.hidden, shape.hidden)
    config = MixtureConfig(
        method=method.name,
        num_tasks=8 if method.gates.reads_task else None,
        external_width=64 if method.gates.reads_vector else None,
        target_modules=list(method.targets),
    )
    return trainable_parameters(config, linears, shape.layers, shape.hidden)


def _taxonomy(method: Method) -> str:
    taxon = taxon_of(method)
    if taxon.gate == NONE:
        return f"nothing is routed, {taxon.placement}"
    return f"{taxon.gate} gates by {taxon.granularity}, {taxon.placement}"


def _up_init(method: Method) -> str:
    return f"{method.init_down}, kernels zero" if method.core == "kron" else "zero"


def _export_word(method: Method) -> str:
    if method.placement == "block":
        return "none"
    if method.gates.reads_vector:
        return "exact per vector"
    if method.gates.reads_spans:
        return "none"
    return EXPORT[method.gates.depends_on]


def _gate_text(gate: Gate) -> str:
    """The six fields, then every number that differs from a plain softmax router's."""
    plain = Gate()
    numbers = ("top_k", "top_p", "temperature", "entropy_limit", "omega", "width", "bias_rate", "guidance", "dropout")
    words = f"input {gate.input}, granularity {gate.granularity}, scope {gate.scope}, score {gate.score}, "
    words += f"select {gate.select}, weight {gate.weight}"
    changed = [
        f"{key} {getattr(gate, key):g}" for key in (*numbers, "draws") if getattr(gate, key) != getattr(plain, key)
    ]
    return ", ".join([words, *changed])


__all__ = ["method_text", "parameters_on_7b", "show_methods"]
