"""Routers that read a prompt's mean of a first pass: one first pass, then a cache, and the same answers as without."""

from pathlib import Path

import pytest
import torch
from exported import make_run

from qd2mora.evaluation import Subject, open_subject
from qd2mora.merging import ExportOptions, merge
from qd2mora.mixture import forgoes_cache

IDS = torch.arange(4, 24).view(2, 10)
PROMPT = 6


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first-pass")
    gate = "gates: {down: {input: hidden, granularity: sequence, scope: block}}, "
    return make_run(folder, "loramoe", quantization="none", adapter=gate)


def logits_after_prompt(subject: Subject, *, cached: bool) -> torch.Tensor:
    """Logits from the prompt's last token on, token by token beside a cache, or of one pass that is told the prompt."""
    labels = IDS.masked_fill(torch.arange(10) < PROMPT, -100)
    told = {} if not subject.is_adapted else {"task_index": torch.zeros(2, dtype=torch.int64)}
    with torch.no_grad():
        if not cached:
            return subject.model(input_ids=IDS, labels=labels, use_cache=False, **told).logits[:, PROMPT - 1 :]
        out = subject.plain(input_ids=IDS[:, :PROMPT], use_cache=True)
        found = [out.logits[:, -1]]
        for place in range(PROMPT, 10):
            out = subject.plain(
                input_ids=IDS[:, place : place + 1], past_key_values=out.past_key_values, use_cache=True
            )
            found.append(out.logits[:, -1])
        return torch.stack(found, 1)


def test_a_first_pass_over_the_prompt_is_kept_beside_a_cache(run: Path, tmp_path: Path) -> None:
    merge(run, tmp_path / "exact", ExportOptions(to="exact", dtype="float32", measured_rows=0))
    routed, exact = open_subject(run), open_subject(tmp_path / "exact")
    assert not forgoes_cache(routed.model)
    wanted = logits_after_prompt(routed, cached=False)
    for subject in (routed, exact):
        torch.testing.assert_close(logits_after_prompt(subject, cached=True), wanted, atol=1e-4, rtol=1e-4)
    # The prompt's mean does route: without it the answer is another.
    with routed.without_adapter():
        assert float((logits_after_prompt(routed, cached=False) - wanted).abs().max()) > 0.1
