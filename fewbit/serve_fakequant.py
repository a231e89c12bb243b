"""`python -m fewbit.serve_fakequant MODEL`: ModelOpt's example for vLLM, its variables over the flags of fewbit serve.

    QUANT_CFG=NVFP4_DEFAULT_CFG KV_QUANT_CFG=NVFP4_KV_CFG python -m fewbit.serve_fakequant MODEL -tp 2 --port 8000

A flag wins over the variable of its name. Where neither says what to round, it is as NVFP4_DEFAULT_CFG does.
"""

import sys
from collections.abc import Mapping, Sequence

from fewbit import env
from fewbit.errors import RequestError

PRESET, DATASET = "NVFP4_DEFAULT_CFG", "cnn_dailymail"
ROUNDING = ("--fakequant", "--kv-fakequant", "--amax-file", "--kv-attn-math")


def arguments(given: Sequence[str], variables: Mapping[str, str]) -> list[str]:
    """Flags of `fewbit serve`: those of the variables, then the user's own, of which the last one counts."""
    named = {word.split("=")[0].replace("_", "-") for word in given if word.startswith("--")}
    flags: dict[str, str] = {}
    for name, value in variables.items():
        flag = env.FAKEQUANT[name]
        if flag in flags:
            others = [n for n in variables if env.FAKEQUANT[n] == flag]
            raise RequestError(f"{' and '.join(others)} are set: both stand for {flag}, so set one")
        flags[flag] = value
    flags = {flag: value for flag, value in flags.items() if flag not in named}
    if not (flags.keys() | named) & set(ROUNDING):
        flags["--fakequant"] = PRESET
    if not (flags.keys() | named) & {"--calib-dataset", "--amax-file"}:
        flags["--calib-dataset"] = DATASET
    return [word for pair in flags.items() for word in pair] + list(given)


def main() -> None:
    from fewbit.__main__ import main as run

    try:
        sys.argv[1:] = ["serve", *arguments(sys.argv[1:], env.fakequant())]
    except RequestError as error:
        sys.exit(f"fewbit: {error}")
    run()


if __name__ == "__main__":
    main()
