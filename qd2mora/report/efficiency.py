"""The table of `bench`: one row a measure, one line where something is absent."""

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

Numbers = dict[str, object]


def show_bench(found: Numbers, console: Console) -> None:
    """Print what was measured, and why what is missing is."""
    table = Table("measure", "value", title=f"{found['model']} ({found['kind']}, {found['device']})")
    for name, value in rows_of(found):
        table.add_row(name, value)
    console.print(table)


def rows_of(found: Numbers) -> Iterator[tuple[str, str]]:
    """Yield names and values in words."""
    latency, serving = _part(found, "latency"), _part(found, "serving")
    for name, words in (("first_token_s", "first token"), ("later_token_s", "each further token")):
        if latency[name] is not None:
            percentiles = _part(latency, name)
            both = " / ".join(f"{1e3 * _number(percentiles, each):.1f} ms" for each in percentiles)
            yield f"{words}, {' / '.join(percentiles)}", both
    yield f"serving, {serving['rows_at_once']} at once", f"{_number(serving, 'tokens_per_s'):,.1f} tokens/s"
    training = _part(found, "training")
    yield "training", _told(training, "tokens_per_s", "{:,.1f} tokens/s")
    memory, compute, energy = _part(found, "memory"), _part(found, "compute"), _part(found, "energy")
    used = _number(memory, "use")
    yield "memory", f"{_number(memory, 'peak_bytes') / 2**30:.2f} GiB, {used:.1%} of what there is"
    yield "compute", _told(compute, "use", "{:.1%}")
    energy_words = f"{{:.3f}} J a written token ({energy['source']})"
    yield "energy", _told(energy | {"why": energy["source"]}, "joules_per_token", energy_words)
    compression = _part(found, "compression")
    yield "compression", f"{_number(compression, 'rate'):.2f} times smaller than in 16 bits"
    if "plan" in found:
        planned = _part(found, "plan")
        if planned["peak_bytes"] is not None:
            yield "planned peak of training", f"{_number(planned, 'peak_bytes') / 2**30:.2f} GiB"
        if "measured_bytes" in planned:
            yield "measured peak of training", f"{_number(planned, 'measured_bytes') / 2**30:.2f} GiB"
        yield "the plan's error", _told(planned, "error", "{:+.1%}")


def _told(part: Numbers, name: str, form: str) -> str:
    """Return a number in words, or why there is none."""
    if part.get(name) is None:
        return str(part["why"])
    return form.format(_number(part, name))


def _part(found: Numbers, name: str) -> Numbers:
    part = found[name]
    assert isinstance(part, dict)
    return part


def _number(part: Numbers, name: str) -> float:
    number = part[name]
    assert isinstance(number, int | float)
    return float(number)


__all__ = ["rows_of", "show_bench"]
