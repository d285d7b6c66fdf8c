"""Chat templates that behave as those of families do, in words of our own: what they merge, move, drop and refuse."""

TOKENS = (
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[INST]", "[/INST]"),
    *("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    *("<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
    *("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>", "<|User|>", "<|Assistant|>"),
    *("<|calls|>", "<|call|>", "<|sep|>", "<|endcalls|>", "<|out|>", "<|endout|>"),
)
"""Special tokens that the templates write."""

LLAMA3 = r"""{{ bos_token }}
{%- set first = namespace(tools=tools) %}
{%- for m in messages %}
{%- if m.tool_calls %}
{%- if m.tool_calls | length != 1 %}{{ raise_exception("This model only supports single tool-calls at once!") }}
{%- endif %}
{%- set call = m.tool_calls[0].function %}
{{- "<|start_header_id|>assistant<|end_header_id|>\n\n" }}
{{- '{"name": "' + call.name + '", "parameters": ' }}{{- call.arguments | tojson }}{{- "}<|eot_id|>" }}
{%- elif m.role == "tool" %}
{{- "<|start_header_id|>ipython<|end_header_id|>\n\n" + (m.content | tojson) + "<|eot_id|>" }}
{%- else %}
{{- "<|start_header_id|>" + m.role + "<|end_header_id|>\n\n" }}
{%- if m.role == "user" and first.tools %}
{%- for tool in first.tools %}{{- tool | tojson(indent=4) }}{{- "\n\n" }}{%- endfor %}
{%- set first.tools = none %}
{%- endif %}
{{- m.content | trim + "<|eot_id|>" }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|start_header_id|>assistant<|end_header_id|>\n\n" }}{% endif %}"""

MISTRAL = r"""{%- set talk = messages %}
{%- if messages[0].role == "system" %}{%- set system = messages[0].content %}{%- set talk = messages[1:] %}{% endif %}
{%- set asked = talk | selectattr("role", "equalto", "user") | list %}
{{- bos_token }}
{%- set turn = namespace(count=0) %}
{%- for m in talk %}
{%- if m.role == "user" or (m.role == "assistant" and not m.tool_calls) %}
{%- if (m.role == "user") != (turn.count % 2 == 0) %}
{{- raise_exception("roles must alternate user/assistant") }}
{%- endif %}
{%- set turn.count = turn.count + 1 %}
{%- endif %}
{%- if m.role == "user" %}
{%- if tools and m == asked[-1] %}{{- "[AVAILABLE_TOOLS] " }}{{- tools | tojson }}{{- "[/AVAILABLE_TOOLS]" }}{% endif %}
{{- "[INST] " }}{%- if system and loop.first %}{{- system + "\n\n" }}{% endif %}{{- m.content + "[/INST]" }}
{%- elif m.tool_calls %}
{{- "[TOOL_CALLS] [" }}
{%- for call in m.tool_calls %}
{%- if not call.id or call.id | length != 9 %}
{{- raise_exception("Tool call IDs should be 9 letters long!") }}
{%- endif %}
{%- set out = call.function | tojson %}
{{- out[:-1] + ', "id": "' + call.id + '"}' }}{{- ", " if not loop.last else "]" + eos_token }}
{%- endfor %}
{%- elif m.role == "assistant" %}{{- " " + m.content | trim + eos_token }}
{%- elif m.role == "tool" %}{{- '[TOOL_RESULTS] {"content": ' + (m.content | tojson) + "}[/TOOL_RESULTS]" }}
{%- endif %}
{%- endfor %}"""

_QWEN_HEAD = r"""{%- if tools %}
{{- "<|im_start|>system\n" }}
{%- if messages[0].role == "system" %}{{- messages[0].content + "\n\n" }}{% endif %}
{{- "# Tools\n<tools>" }}{%- for tool in tools %}{{- "\n" }}{{- tool | tojson }}{%- endfor %}
{{- "\n</tools><|im_end|>\n" }}
{%- elif messages[0].role == "system" %}{{- "<|im_start|>system\n" + messages[0].content + "<|im_end|>\n" }}"""
_QWEN_TOOL = r"""{%- elif m.role == "tool" %}
{%- if loop.first or messages[loop.index0 - 1].role != "tool" %}{{- "<|im_start|>user" }}{% endif %}
{{- "\n<tool_response>\n" + m.content + "\n</tool_response>" }}
{%- if loop.last or messages[loop.index0 + 1].role != "tool" %}{{- "<|im_end|>\n" }}{% endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|im_start|>assistant\n" }}{% endif %}"""

QWEN25 = (
    _QWEN_HEAD
    + r"""
{%- else %}{{- "<|im_start|>system\nYou help.<|im_end|>\n" }}
{%- endif %}
{%- for m in messages %}
{%- if m.role == "user" or (m.role == "system" and not loop.first) or (m.role == "assistant" and not m.tool_calls) %}
{{- "<|im_start|>" + m.role + "\n" + m.content + "<|im_end|>\n" }}
{%- elif m.role == "assistant" %}
{{- "<|im_start|>assistant" }}
{%- if m.content %}{{- "\n" + m.content }}{% endif %}
{%- for call in m.tool_calls %}
{{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}{{- call.function.arguments | tojson }}
{{- "}\n</tool_call>" }}
{%- endfor %}
{{- "<|im_end|>\n" }}
"""
    + _QWEN_TOOL
)

QWEN3 = (
    _QWEN_HEAD
    + r"""
{%- endif %}
{%- set asked = namespace(last=-1) %}
{%- for m in messages %}{%- if m.role == "user" %}{%- set asked.last = loop.index0 %}{% endif %}{%- endfor %}
{%- for m in messages %}
{%- if m.role == "user" or (m.role == "system" and not loop.first) %}
{{- "<|im_start|>" + m.role + "\n" + m.content + "<|im_end|>\n" }}
{%- elif m.role == "assistant" %}
{%- set content = m.content or "" %}
{%- set thought = m.reasoning_content or "" %}
{%- if not thought and "</think>" in content %}
{%- set thought = content.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n") %}
{%- set content = content.split("</think>")[-1].lstrip("\n") %}
{%- endif %}
{{- "<|im_start|>assistant\n" }}
{%- if loop.index0 > asked.last and (loop.last or thought) %}
{{- "<think>\n" + thought.strip("\n") + "\n</think>\n\n" + content.lstrip("\n") }}
{%- else %}{{- content }}{% endif %}
{%- for call in m.tool_calls %}
{%- if (loop.first and content) or not loop.first %}{{- "\n" }}{% endif %}
{{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
{%- if call.function.arguments is string %}{{- call.function.arguments }}
{%- else %}{{- call.function.arguments | tojson }}{% endif %}
{{- "}\n</tool_call>" }}
{%- endfor %}
{{- "<|im_end|>\n" }}
"""
    + _QWEN_TOOL
)

GEMMA = r"""{{ bos_token }}
{%- if messages[0].role == "system" %}{{ raise_exception("System role not supported") }}{% endif %}
{%- for m in messages %}
{%- if (m.role == "user") != (loop.index0 % 2 == 0) %}
{{ raise_exception("Conversation roles must alternate user/assistant") }}
{%- endif %}
{{- "<start_of_turn>" + ("model" if m.role == "assistant" else m.role) + "\n" + m.content | trim + "<end_of_turn>\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<start_of_turn>model\n" }}{% endif %}"""

PHI3 = r"""{%- for m in messages %}{{- "<|" + m.role + "|>\n" + m.content + "<|end|>\n" }}{%- endfor %}
{%- if add_generation_prompt %}{{- "<|assistant|>\n" }}{%- else %}{{- eos_token }}{% endif %}"""

ZEPHYR = r"""{% for m in messages %}
{% if m.role == 'user' %}
{{ '<|user|>\n' + m.content + eos_token }}
{% elif m.role == 'system' %}
{{ '<|system|>\n' + m.content + eos_token }}
{% elif m.role == 'assistant' %}
{{ '<|assistant|>\n' + m.content + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

SMOLLM2 = (
    "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are small.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

GRANITE = r"""{%- for m in messages %}
{{- "<|start_of_role|>" + m.role + "<|end_of_role|>" }}
{%- if m.tool_calls %}{{- "<tool_call>" + (m.tool_calls | map(attribute="function") | list | tojson) }}
{%- else %}{{- m.content }}{% endif %}
{{- "<|end_of_text|>\n" }}
{%- if loop.last and add_generation_prompt %}{{- "<|start_of_role|>assistant<|end_of_role|>" }}{% endif %}
{%- endfor %}"""

DEEPSEEK = r"""{{ bos_token }}
{%- set out = namespace(open=false) %}
{%- for m in messages if m.role == "system" %}{{- m.content }}{%- endfor %}
{%- for m in messages %}
{%- if m.role == "user" %}{%- set out.open = false %}{{- "<|User|>" + m.content }}
{%- elif m.role == "assistant" and m.tool_calls %}
{{- ("" if out.open else "<|Assistant|>") + "<|calls|>" }}
{%- for call in m.tool_calls %}
{{- "<|call|>function<|sep|>" + call.function.name + "\n```json\n" + call.function.arguments + "\n```" }}
{%- endfor %}
{{- "<|endcalls|>" + eos_token }}
{%- set out.open = false %}
{%- elif m.role == "assistant" %}
{{- ("" if out.open else "<|Assistant|>") + m.content.split("</think>")[-1] + eos_token }}
{%- set out.open = false %}
{%- elif m.role == "tool" %}{%- set out.open = true %}{{- "<|out|>" + m.content + "<|endout|>" }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt and not out.open %}{{- "<|Assistant|><think>\n" }}{% endif %}"""

LLAMA2 = r"""{%- for m in messages %}
{%- if m.role == "user" %}
{{- bos_token + "[INST] " }}
{%- if loop.index0 == 1 and messages[0].role == "system" %}
{{- "<<SYS>>\n" + messages[0].content + "\n<</SYS>>\n\n" }}
{%- endif %}
{{- m.content | trim + " [/INST]" }}
{%- elif m.role == "assistant" %}{{- " " + m.content | trim + " " + eos_token }}
{%- endif %}
{%- endfor %}"""

MARKED = r"""{%- for m in messages %}
{{- "<|im_start|>" + m.role + "\n" }}
{%- if m.role == "assistant" %}
{%- generation %}{{- m.content + "<|im_end|>" }}{%- endgeneration %}{{- "\n" }}
{%- else %}{{- m.content + "<|im_end|>\n" }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|im_start|>assistant\n" }}{% endif %}"""
"""As SmolLM3's and TRL's training templates mark what is generated."""

MARKED_INSIDE = r"""{%- for m in messages %}
{{- m.role + ": " }}
{%- if m.role == "assistant" %}{%- generation %}{{- m.content }}{%- endgeneration %}{{- "." }}
{%- else %}{{- m.content }}{% endif %}
{%- endfor %}"""
"""Marks whose ends lie inside tokens."""

ANSWERED_OTHERWISE = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}{{ ' be short' if loop.last }}[/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
"""A question reads otherwise once it is answered."""
