"""A 16-bit model, its linears made FP8 as it is read, nothing written: python examples/online_fp8.py MODEL"""

import sys

from fewbit import LLM


def main() -> None:
    llm = LLM(sys.argv[1], quantization="fp8")
    result = llm.generate("Hello, my name is")
    print(result[0].outputs[0].text)
    llm.llm_engine.model_executor.shutdown()


if __name__ == "__main__":
    main()
