"""Generate in this process, many prompts at once: python examples/offline.py MODEL"""

import sys

from fewbit import LLM, SamplingParams

PROMPTS = [
    "Hello, my name is",
    "The president of the United States is",
    "The capital of France is",
    "The future of AI is",
]


def main() -> None:
    params = SamplingParams(temperature=0.8, top_p=0.9, max_tokens=24, seed=1)
    with LLM(sys.argv[1]) as llm:
        for output in llm.generate(PROMPTS, params):
            print(f"Prompt: {output.prompt!r}, Generated text: {output.outputs[0].text!r}")


if __name__ == "__main__":
    main()
