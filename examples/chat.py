"""Ask a server something and print the answer as it comes: python examples/chat.py http://127.0.0.1:8000 "Why?" """

import os
import sys

from openai import OpenAI

url, question = sys.argv[1], " ".join(sys.argv[2:]) or "What is a quantized language model? One sentence."
client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("OPENAI_API_KEY", "none"))
stream = client.chat.completions.create(
    model=client.models.list().data[0].id,
    messages=[{"role": "user", "content": question}],
    max_tokens=64,
    temperature=0,
    stream=True,
    stream_options={"include_usage": True},
)
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    if chunk.usage:
        print(f"\n({chunk.usage.prompt_tokens} tokens read, {chunk.usage.completion_tokens} written)")
