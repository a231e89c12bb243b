"""An answer that is JSON of a given shape, whatever the model: python examples/structured.py http://127.0.0.1:8000

response_format, as OpenAI has it, does the same but lets a weak model put white space between the fields without end.
"""

import json
import os
import sys

from openai import OpenAI

SHAPE = {
    "type": "object",
    "properties": {
        "mood": {"enum": ["glad", "sad", "angry", "calm"]},
        "certain": {"type": "boolean"},
        "stars": {"type": "integer", "minimum": 1, "maximum": 5},
    },
    "required": ["mood", "certain", "stars"],
    "additionalProperties": False,
}
client = OpenAI(base_url=f"{sys.argv[1]}/v1", api_key=os.environ.get("OPENAI_API_KEY", "none"))
answer = client.chat.completions.create(
    model=client.models.list().data[0].id,
    messages=[{"role": "user", "content": "How does this guest feel? 'The soup was cold, the view made up for it.'"}],
    max_tokens=100,
    temperature=0,
    extra_body={"structured_outputs": {"json": SHAPE, "disable_any_whitespace": True}},
)
found = json.loads(answer.choices[0].message.content)
print(f"{found['mood']}, {found['stars']} stars" + ("" if found["certain"] else ", perhaps"))
