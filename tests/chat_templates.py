"""Chat templates of the shapes that published models have, written small."""

from __future__ import annotations

# Turns between marks; a default system message, tools in the system turn, tool results in a user's turn; roles by name.
MARKS = """
{%- if tools %}[system]
{%- if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}
Tools:{% for tool in tools %}
{{ tool | tojson }}{% endfor %}[end]
{%- elif messages[0].role == 'system' %}[system]{{ messages[0].content }}[end]
{%- else %}[system]Be a helpful assistant.[end]{% endif %}
{%- for message in messages %}
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) or (message.role == 'assistant' and not message.tool_calls) %}[{{ message.role }}]{{ message.content }}[end]
{%- elif message.role == 'assistant' %}[assistant]{{ message.content }}
{%- for call in message.tool_calls %}{% set call = call.function or call %}<call>{"name": "{{ call.name }}", "arguments": {{ call.arguments | tojson }}}</call>{% endfor %}[end]
{%- elif message.role == 'tool' %}[user]<result>{{ message.content }}</result>[end]
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}[assistant]{% endif %}"""

# As MARKS without tools, with reasoning: printed after the last user's turn alone, and cut out of the content of earlier turns.
REASONING = """
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
{%- if message.role in ('user', 'system') %}[{{ message.role }}]{{ message.content }}[end]
{%- elif message.role == 'assistant' %}{% set content = message.content %}{% set reasoning = '' %}
{%- if message.reasoning_content is string %}{% set reasoning = message.reasoning_content %}
{%- elif '</think>' in content %}
{%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}{% set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}[assistant]
{%- if loop.index0 > ns.last and (loop.last or reasoning) %}{{ '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
{%- else %}{{ content }}{% endif %}
{%- for call in message.tool_calls or [] %}<call>{{ call.function.name }} {{ call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}</call>{% endfor %}[end]
{%- elif message.role == 'tool' %}{{ '[user]<result>\\n' + message.content + '\\n</result>[end]' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}[assistant]{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"""

# Any role in a header, texts stripped, tools in the first user's turn, tool results as JSON, one call a turn; begins with the bos text.
HEADERS = """
{{- bos_token }}
{%- if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}
{{- '(system)\\n\\nToday: 26 Jul 2024\\n\\n' + system + '(eot)' }}
{%- if tools %}{% set first = messages[0].content | trim %}{% set messages = messages[1:] %}(user)

Functions: {% for tool in tools %}{{ tool | tojson(indent=4) }}{% endfor %}
{{ first }}(eot)
{%- endif %}
{%- for message in messages %}
{%- if message.tool_calls %}
{%- if message.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}
{%- set call = message.tool_calls[0].function %}(assistant)

{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}(eot)
{%- elif message.role in ('tool', 'ipython') %}(ipython)

{% if message.content is mapping or message.content is iterable %}{{ message.content | tojson }}{% else %}{{ message.content }}{% endif %}(eot)
{%- else %}{{ '(' + message.role + ')\\n\\n' + message.content | trim + '(eot)' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '(assistant)\\n\\n' }}{% endif %}"""

# No system message, users and models in turn.
STRICT = """
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}
{%- for message in messages %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}{{ message.role }}: {{ message.content | trim }};
{%- endfor %}
{%- if add_generation_prompt %}model: {% endif %}"""
