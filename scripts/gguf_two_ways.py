"""Two ways to a small GGUF of a run: quantise the merged weights, or the base, with the adapter as a LoRA beside it.

How: `pip install 'qd2mora[quantise]'`, then `python scripts/gguf_two_ways.py RUN --dtype q4_k_m --out FILE`. Both files
are read back, dequantised, and measured against the routed model on the run's held-out rows; the LoRA is added to the
dequantised base in float32, as llama.cpp computes it beside the quantised product. The smaller KL is the better way.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from bench_parts import context

from qd2mora.base import load_base
from qd2mora.merging import ExportOptions, make_static, merge
from qd2mora.merging.as_written import witness_of
from qd2mora.merging.rungs import export_form, open_weights
from qd2mora.merging.sample import batches_of, sample_rows
from qd2mora.recipe import Base
from qd2mora.run_folder import open_run


def base_and_lora(run: Path, dtype: str, strategy: str, folder: Path) -> dict[str, object]:
    """Measure the quantised base with the static updates beside it; bytes of both files."""
    opened = open_run(run)
    updates = make_static(opened, strategy)
    rows = sample_rows(opened, None).held_out
    witness = witness_of(opened, batches_of(opened, rows, None), updates.bases["dequantized"])
    files: list[Path] = []
    for to, statics, form in (
        ("base", {}, export_form("gguf", dtype=dtype)),
        ("lora", updates.statics, export_form("gguf_lora", dtype="f16")),
    ):
        (folder / to).mkdir()
        form.rung.prepare(opened, open_weights(opened, form), statics, form)(folder / to)
        files += (folder / to).glob("*.gguf")
    del opened
    model = load_base(Base(model=str(files[0]), quantization="none", compute_dtype="float32"))
    with torch.no_grad():
        for name, static in updates.statics.items():
            weight = model.get_submodule(name).weight
            weight += static.dense()
    found = witness.compared_with_model(model, f"{files[0].name} with its LoRA")
    return {"bytes": sum(each.stat().st_size for each in files), **found.to_json()}


def main() -> None:
    """Print both ways, the better named; write them to --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--dtype", default="q4_k_m")
    parser.add_argument("--strategy", default="core_lsq")
    parser.add_argument("--out", type=Path, help="JSON file")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        options = ExportOptions(strategy=given.strategy, to="gguf", dtype=given.dtype)
        merged = merge(given.run, folder / "merged", options)
        assert merged.as_written is not None
        size = sum(each.stat().st_size for each in (folder / "merged").glob("*.gguf"))
        ways = {
            "merged, then quantised": {"bytes": size, **merged.as_written.to_json()},
            "quantised base, LoRA beside it": base_and_lora(given.run, given.dtype, given.strategy, folder),
        }
    for each in ways.values():
        each.pop("tasks", None)
    better = min(ways, key=lambda name: float(str(ways[name]["kl_per_token"])))
    about = context(torch.device("cpu"), {"run": given.run.name, "dtype": given.dtype, "strategy": given.strategy})
    about["command"] = f"python scripts/gguf_two_ways.py {given.run.name} --dtype {given.dtype}"
    content = about | {"ways": ways, "better": better}
    if given.out is not None:
        given.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(content))


if __name__ == "__main__":
    main()
