#!/usr/bin/env python3
"""What transformers makes of the templates beside this file: one line of families.jsonl for each conversation and template.

    pip install transformers==5.17.0
    python crates/text/tests/templates/families/make.py
"""

import json
from pathlib import Path

from transformers.utils.chat_template_utils import render_jinja_template

HERE = Path(__file__).parent
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

WEATHER = {"type": "function", "function": {
    "name": "weather", "description": "The weather \"now\" — <é>.", "parameters": {
        "type": "object", "required": ["city"], "properties": {
            "city": {"type": "string", "description": "Which city"},
            "unit": {"type": "string", "enum": ["C", "F"]}, "days": {"type": "integer"}}}}}
TIME = {"type": "function", "function": {
    "name": "time", "description": "The time", "parameters": {"type": "object", "properties": {}}}}


def call(number, name, arguments):
    return {"id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": arguments}}


def text(*parts):
    return [{"type": "text", "text": part} for part in parts]


USER, SYSTEM = {"role": "user", "content": "Hi <b> & 'you' "}, {"role": "system", "content": " Be brief.\n"}
ANSWER = {"role": "assistant", "content": "<think>\nWell,\n</think>\n\nHello"}
CALLS = {"role": "assistant", "content": "", "reasoning_content": "\nLook it up.\n", "tool_calls": [
    call(1, "weather", {"city": "Zürich", "days": 2, "opts": {"b": True, "a": None, "list": [1.5, "x"]}}), call(2, "time", {})]}
RESULTS = [{"role": "tool", "tool_call_id": "call_1", "name": "weather", "content": "{\"°C\": 21}"},
           {"role": "tool", "tool_call_id": "call_2", "name": "time", "content": "12:00"}]

CONVERSATIONS = {
    "one turn": ([USER], None, {}),
    "system, several turns": ([SYSTEM, USER, ANSWER, {"role": "user", "content": "And?"}], None, {}),
    "without thinking": ([SYSTEM, USER], None, {"enable_thinking": False, "thinking": False}),
    "with thinking": ([USER, ANSWER, USER], None, {"enable_thinking": True, "thinking": True}),
    "parts": ([{"role": "user", "content": text("One", "two")}], None, {}),
    "tools offered": ([SYSTEM, USER], [WEATHER, TIME], {}),
    "tools called": ([USER, CALLS, *RESULTS], [WEATHER, TIME], {}),
    "tools called and answered": ([SYSTEM, USER, CALLS, *RESULTS, {"role": "assistant", "content": "21 °C at noon."}, USER], [WEATHER], {}),
}


def main():
    with open(HERE / "families.jsonl", "w", encoding="utf-8") as out:
        for path in sorted(HERE.glob("*.jinja")):
            for name, (messages, tools, kwargs) in CONVERSATIONS.items():
                for generate in (True, False):
                    gives, _ = render_jinja_template(
                        [messages], tools=tools, chat_template=path.read_text(encoding="utf-8"), add_generation_prompt=generate,
                        **TOKENS, **kwargs)
                    line = {"template": path.stem, "name": name, "messages": messages, "tools": tools, "kwargs": kwargs,
                            "add_generation_prompt": generate, "gives": gives[0]}
                    out.write(json.dumps(line, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
