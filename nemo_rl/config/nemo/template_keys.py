"""How a conversation that is learnt begins and ends: `policy.tokenizer.chat_template`, `data.add_bos` and `add_eos`."""

import re
from typing import Any

from nemo_rl.config.nemo.actions import NOTHING, Action, Config, Convert, Ignore, Refuse, Set, Table

_KEY = "policy.tokenizer.chat_template"
_MARKER = re.compile(r"\{%-?\s*generation\b")


def _is_given(template: Any) -> bool:
    """Whether it is a template, and not the tokenizer's own (`default`, or no key at all) or the name of a file."""
    return template is None or (isinstance(template, str) and "{" in template)


def _begins_and_ends(config: Config) -> tuple[bool, bool]:
    """NeMo RL puts `bos` and `eos` around what it learns unless it is told not to."""
    return config.get("data.add_bos", True) is not False, config.get("data.add_eos", True) is not False


def _template(template: Any, config: Config) -> Action | None:
    begins, ends = _begins_and_ends(config)
    if template == "default":
        return NOTHING
    if template is None:
        return Set({_KEY: _words_alone(begins=begins, ends=ends)})
    if not _is_given(template) or not (begins or ends):
        return None
    if _MARKER.search(template):
        if "eos_token" in template:
            return None
        return Refuse("write eos_token into it behind the words of the assistant, or set add_bos and add_eos to false")
    return Set({_KEY: _enclosed(template, begins=begins, ends=ends)})


def _words_alone(*, begins: bool, ends: bool) -> str:
    """A template that writes nothing but words; without a marker nobody could tell whose they are."""
    start = "{% if loop.first %}{{ bos_token }}{% endif %}" if begins else ""
    stop = "{% if loop.last %}{{ eos_token }}{% endif %}" if ends else ""
    return (
        "{% for message in messages %}"
        f"{start}"
        "{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] }}"
        f"{stop}"
        "{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    )


def _enclosed(template: str, *, begins: bool, ends: bool) -> str:
    """What `template` writes, with the tokens around it that it does not write itself; none ends a prompt."""
    start = "{% if bos_token and not written.startswith(bos_token) %}{{ bos_token }}{% endif %}" if begins else ""
    stop = (
        "{% if messages[-1]['role'] == 'assistant' and not add_generation_prompt %}{{ written.rstrip('\\n') }}"
        "{% if eos_token and not written.rstrip('\\n').endswith(eos_token) %}{{ eos_token }}{% endif %}"
        "{% else %}{{ written }}{% endif %}"
    )
    # The empty expressions keep Jinja from trimming what stands beside its own tags.
    inner = template.removesuffix("\n")
    return f"{{% set written %}}{{{{ '' }}}}{inner}{{{{ '' }}}}{{% endset %}}{start}{stop if ends else '{{ written }}'}"


def _token(_: Any, config: Config) -> Action:
    if _is_given(config.get(_KEY, "default")):
        return NOTHING  # the template writes it
    return Ignore("the tokenizer's own chat template says how a conversation begins and ends")


TEMPLATE: Table = {
    _KEY: Convert(_template),
    "data.add_bos": Convert(_token),
    "data.add_eos": Convert(_token),
}
"""The table of algorithms that learn from given answers."""
