"""Secrets: the one place that knows what a token looks like.

A recipe that holds one is refused; errors, tracebacks and the files of a run pass through `redacted`. Tokens come from
the environment (`HF_TOKEN`, `WANDB_API_KEY`), and the values of such variables count as secrets wherever they turn up.
"""

import os
import re
from typing import TypeAlias

REDACTED = "[redacted]"

# Parts that repeat are bounded, so that a hostile text costs linear time.
_SHAPES = {
    "a Hugging Face token": r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}",
    # 40 hex digits are a commit too, in a path or behind an @.
    "a Weights & Biases key": r"\bwandb_v1_\w{20,}|(?<![\w/@])[0-9a-f]{40}(?![\w/])",
    "a key of a model's API": r"(?<![\w-])sk-[\w-]{20,}",
    "a GitHub token": r"\b(?:gh[pousr]|github_pat)_\w{20,}",
    "a GitLab token": r"\bglpat-[\w-]{16,}",
    "an AWS key": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "a Google key": r"\bAIza[\w-]{35}",
    "a Slack token": r"\bxox[abeoprs]-[\w-]{10,}",
    "a web token": r"\beyJ[\w-]{10,4096}\.[\w-]{10,4096}\.[\w-]{0,4096}",
    "a bearer token": r"(?i:\bbearer\s{1,8}[\w.~+/-]{12,}=*)",
    "a private key": r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]{0,30}PRIVATE KEY-----|\Z)",
    "a URL with a user in it": r"(?<=://)[^\s/?#@]{1,4096}@",
}
_SHAPE = {kind: re.compile(pattern) for kind, pattern in _SHAPES.items()}
# In a message: what follows a telling name. Numbers (`kl_per_token: 0.1`) and special tokens (`<pad>`) are none.
_NAMED = re.compile(
    r"(?i)([\w-]{0,40}(?:token|api_?-?key|secret|passwd|password|access_?-?key)[\"']?\s{0,8}[=:]\s{0,8}[\"']?)"
    r"(?![-+]?[\d.]+(?:e[-+]?\d+)?(?![\w.]))[^\s\"',;&}<\[]{6,}"
)
_SECRET_VARIABLE = re.compile(r"(?i)(?:^|_)(?:TOKEN|API_?KEY|ACCESS_KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(?:_|$)")


SHORTEST = 12
"""Letters of the shortest value of the environment that is looked for: shorter ones stand in any text by chance."""
# `identity`, `adapter_model.safetensors`: what stands in our own files is no secret, whatever a variable is called.
_WORDS = re.compile(r"[A-Za-z]{1,16}(?:[_.][A-Za-z]{1,16})*")


Secrets: TypeAlias = list[tuple[str, str]]
"""Names of variables and their values."""


def secret_in(text: str) -> str | None:
    """Name the kind of secret that `text` holds, or return None."""
    for kind, pattern in _SHAPE.items():
        if pattern.search(text):
            return kind
    return next((f"the value of ${name}" for name, value in _from_environment() if value in text), None)


def redacted(text: str, *, named: bool = True) -> str:
    """Return `text` with every secret replaced; `named`: also whatever follows `token=`, `password:` and the like."""
    text = _without(text, _from_environment())
    return _NAMED.sub(rf"\1{REDACTED}", text) if named else text


def redacted_values(content: object) -> object:
    """Return what JSON may hold with the secrets in its values replaced; its keys are names of ours, and stay."""
    # The environment is read once for all values: a manifest has thousands.
    return _values_without(content, _from_environment())


def _without(text: str, secrets: Secrets) -> str:
    for _, value in secrets:
        text = text.replace(value, REDACTED)
    for pattern in _SHAPE.values():
        text = pattern.sub(REDACTED, text)
    return text


def _values_without(content: object, secrets: Secrets) -> object:
    if isinstance(content, str):
        return _without(content, secrets)
    if isinstance(content, dict):
        return {key: _values_without(value, secrets) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_values_without(value, secrets) for value in content]
    return content


def _from_environment() -> Secrets:
    """Return the secrets of the environment, longest first; short values, words and paths are none."""
    found = [
        (name, value)
        for name, value in os.environ.items()
        if len(value) >= SHORTEST and _SECRET_VARIABLE.search(name) and not _is_told(value)
    ]
    return sorted(found, key=lambda pair: -len(pair[1]))


def _is_told(value: str) -> bool:
    return os.path.isabs(value) or _WORDS.fullmatch(value) is not None


__all__ = ["REDACTED", "redacted", "redacted_values", "secret_in"]
