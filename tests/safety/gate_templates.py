"""J1: hostile chat templates are refused or killed within two seconds of work, and the parent goes on."""

import os
import signal
import time

from forked import Result, run

from qd2mora.data.chat_template import LONGEST_TEMPLATE, ChatTemplate
from qd2mora.data.file_rows import BadRow
from qd2mora.errors import InputRefused

PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
_TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
_CLASSES = "''.__class__.__mro__[1].__subclasses__()"
_LOOP = "".join(f"{{% for {name} in range(99999) %}}" for name in "abc") + "{% endfor %}" * 3
HOSTILE = [
    f"{{{{ {_CLASSES} }}}}",
    "{{ ''.__class__.__base__ }}",
    "{{ messages.__class__.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ raise_exception.__code__ }}",
    "{{ strftime_now.__globals__['__builtins__'] }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ (messages|attr('__class__')).mro() }}",
    "{{ ''|attr('__class__')|attr('__mro__') }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "{{ '{x.__class__.__mro__}'.format_map({'x': messages}) }}",
    "{% set f = '{0.__class__.mro}'.format %}{{ f(1)() }}",
    "{{ ['{0.__class__.__mro__}']|map('format', 1)|first|attr('x') }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{% set x = namespace(__class__=1) %}{{ x }}",
    "{% set n = namespace() %}{% set n.__init__ = 1 %}",
    "{% include '/etc/passwd' %}",
    "{% import '/etc/passwd' as x %}",
    "{% extends '/etc/passwd' %}",
    "{% from 'os' import system %}",
    _LOOP,
    "{% for a in range(9999999999) %}{% endfor %}" * 3,
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{{ 'a' * 3000000000 }}",
    "{{ 'a' * 900000000 }}",
    "{{ [0] * 2000000000 }}",
    "{% set ns = namespace(s='a') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
    "{{ 9 ** 9 ** 9 }}",
    "{{ (10 ** 99999) ** 999 }}",
    "{{ 'a'.ljust(4000000000) }}",
    "{{ '%4000000000d' % 1 }}",
    "{{ '{:4000000000d}'.format(1) }}",
    "{{ lipsum(n=10000000) }}",
    "{{ range(99999999)|list|length }}",
    "{{ (['a' * 999999] * 99999)|join }}",
    "{{ raise_exception('no') }}",
    "{% for m in messages %}",
    "{{ 1 / 0 }}",
    "{{ nothing.at.all.here }}",
    "{{ messages|batch(1)|list|map('nope') }}",
    "(" * 3000,
    "{{ " + "(" * 500 + "1" + ")" * 500 + " }}",
    "{{ 1" + " + 1" * 20_000 + " }}",
    "x" * (LONGEST_TEMPLATE + 1),
]
# A child ends itself after two seconds of work; on a busy machine that takes longer. One that is not ended never ends.
LIMIT_S = 30.0
# What a text would show of Python behind it; a name that the sandbox hides renders as nothing.
_ESCAPED = ("__", "<class", "<function", "<module", "<code", "object at", "uid=", "root:")


def gate(step: int = 1) -> Result:
    """Render every `step`-th hostile template; a plain one must still render."""
    result, slowest = Result("J1"), 0.0
    with ChatTemplate(PLAIN, {}, "plain") as plain:
        for template in HOSTILE[::step]:
            text, refusal, seconds = _rendered(template)
            slowest = max(slowest, seconds)
            small = len(text) < 1000 + len(template) and not any(sign in text for sign in _ESCAPED)
            result.check(
                small and seconds < LIMIT_S, f"{template[:80]}: {text[:80]!r}, {refusal}, after {seconds:.1f} s"
            )
            result.numbers["refused"] = result.numbers.get("refused", 0) + bool(refusal)
        _check_limits(result)
        alive = plain.render(_TALK) == "<user>hi</s><assistant>ho</s>"
        result.check(alive, "the plain template no longer renders")
    result.numbers["slowest_s"] = slowest
    return result


def _check_limits(result: Result) -> None:
    """Check each limit on its own: the one that should strike, not another that would do for the rest."""
    text, refusal, _ = _rendered("x" * (LONGEST_TEMPLATE + 1))
    result.check(f"(limit {LONGEST_TEMPLATE})" in refusal, f"a long template: {text[:80]!r}, {refusal}")
    # What is wanted is small and quickly there, but takes 1.2 GB on the way.
    text, refusal, _ = _rendered("{{ ('a' * n)|length }}{% set n = 1 %}".replace("n)", "1200000000)"))
    result.check("MemoryError" in refusal, f"a large text: {text[:80]!r}, {refusal}")
    outcome = run(_stopped_child, limit_s=15)
    result.check(outcome.code == 0 and "took more than" in outcome.out, f"a child that stands still: {outcome}")


def _stopped_child() -> None:
    """Render in a child that uses no time and does not answer."""
    with ChatTemplate(PLAIN, {}, "the tokenizer") as template:
        template.start()
        os.kill(template.child.pid, signal.SIGSTOP)
        try:
            template.render(_TALK)
        except InputRefused as error:
            print(error)


def _rendered(template: str) -> tuple[str, str, float]:
    """Return the text, or the refusal, and the seconds of the rendering alone."""
    began = time.monotonic()
    try:
        with ChatTemplate(template, {}, "the tokenizer") as hostile:
            hostile.start()
            began = time.monotonic()
            return hostile.render(_TALK), "", time.monotonic() - began
    except (InputRefused, BadRow) as error:
        return "", str(error), time.monotonic() - began
