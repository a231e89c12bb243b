"""How to serve a result: the commands to copy."""

import re
import shlex

from fewbit.workflows.report_data import Run, Serve

VLLM = ("compressed-tensors", "gptq", "awq", "fp8", "modelopt", "auto-round", "mxfp4", "mxfp8")
ODD = re.compile(r"int[23567]-")  # widths for which vLLM needs kernels that it does not bring


def serve(run: Run, out: str | None = None) -> list[Serve]:
    """Commands as the run says, or those that its dialect suggests; `out` instead of the folder it was written to."""
    if run.get("serve"):
        return run["serve"]
    if not run.get("dialect"):
        return []
    path = shlex.quote(out or run.get("out") or ".") + (" --trust-remote-code" if run.get("trusted") else "")
    found = [Serve(engine="fewbit", command=f"fewbit serve {path}")]
    if vllm_reads(run):
        found.append(Serve(engine="vLLM", command=f"vllm serve {path}"))
    return found


def vllm_reads(run: Run) -> bool:
    formats = {m["format"] for m in run["modules"]}
    narrow = run.get("dialect") == "gptq" and any("asym" in f for f in formats)  # its loader refuses zeros
    return run.get("dialect") in VLLM and not narrow and not any(ODD.match(f) for f in formats)
