"""Verbs on checkpoints as they are: what one is, whether it is sound, the same in another dialect."""

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fewbit.cli.show import Json, Model, Trust, progress, table


def inspect(
    model: Model,
    all: Annotated[bool, typer.Option("--all", help="One line for every module, not one for each format.")] = False,
    kernels: Annotated[bool, typer.Option("--kernels", help="Show refused kernels and why.")] = False,
    device: Annotated[str, typer.Option(help="Choose kernels for this device.")] = "cpu",
    activations: Annotated[str, typer.Option(help="As a server is asked: hardware, declared, fast, off.")] = "hardware",
    fusion: Annotated[bool, typer.Option("--fusion", help="Show what is fused, as its twin proves it.")] = False,
    kv_scales: Annotated[Path | None, typer.Option(help="As a server is given: a file of fewbit calibrate.")] = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Show what a checkpoint is: dialect, formats, sizes, what is left dense and which rule says so."""
    from fewbit.workflows.inspect import inspect as run
    from fewbit.workflows.inspect import size, summary

    info = run(model, device, activations, kv_scales, trust_remote_code)
    fused = None
    if fusion:
        from fewbit.workflows.inspect_fusion import fusion as fusing

        fused = fusing(model, trust_remote_code)
    if as_json:
        print(json.dumps(info.to_json() | ({"fusion": fused.to_json()} if fused else {}), indent=2))
        return
    print(f"{info.path}: {info.architecture} ({info.model_type}), {info.parameters / 1e6:.1f}M parameters")
    print(f"dialect {info.dialect}  [{info.evidence}]")
    print(f"{size(info.bytes)}, {info.bits_per_weight:.2f} bits per weight over everything"
          f", {info.quantized_bits_per_weight:.2f} over the quantized modules")  # fmt: skip
    print(f"KV cache: {info.kv}, scales: {info.kv_scales}")
    table("Formats", ["format", "activations", "modules", "bytes"], summary(info))
    if all:
        rows = [(m.name, m.format, m.activations, "x".join(map(str, m.shape)), f"{m.bits_per_weight:.3f}", m.kernel)
                for m in info.modules]  # fmt: skip
        table("Modules", ["module", "format", "activations", "shape", "bits", "kernel"], rows)
    dense = [(d.name, d.dtype, "x".join(map(str, d.shape)), size(d.bytes), d.rule) for d in info.dense]
    table("Left dense", ["tensor", "type", "shape", "bytes", "rule"], dense if all else dense[:12])
    if len(dense) > 12 and not all:
        print(f"... and {len(dense) - 12} more: --all")
    for name, why in list(info.surplus.items())[: None if all else 4]:
        print(f"not used: {name}: {why}")
    for why in sorted({m.weights_only for m in info.modules} - {""}):
        print(f"activations on {device}: served as they are, weights alone quantized: {why}"
              " (serve --emulate-activations rounds them in software)")  # fmt: skip
    for (form, said), count in sorted(Counter((m.format, m.fast) for m in info.modules if m.fast).items()):
        print(f"activations fast on {device}: {form} ({count} modules): {said}")
    chosen = {(m.kernel, m.invariant, m.refused) for m in info.modules}
    for kernel, invariant, refused in sorted(chosen):
        print(f"kernel on {device}: {kernel}" + ("" if invariant else " (a row's last bits may depend on the batch)"))
        for reason in refused if kernels else ():
            print(f"  not {reason}")
    if fused:
        print(f"\nFusion\n{fused}")


def verify(model: Model, trust_remote_code: Trust = False, as_json: Json = False) -> None:
    """Prove a checkpoint whole without running it; exit code 1 when it is not."""
    from fewbit.models.verify import verify as run

    findings = run(model, trust_remote_code)
    errors = sum(f.severity == "error" for f in findings)
    if as_json:
        print(json.dumps({"path": model, "errors": errors, "findings": [asdict(f) for f in findings]}, indent=2))
    else:
        for finding in findings:
            print(finding)
        print(f"{model}: " + (f"{errors} errors, {len(findings) - errors} warnings" if findings else "sound"))
    raise typer.Exit(1 if errors else 0)


def convert(
    src: Model,
    to: Annotated[str, typer.Option("--to", help="A dialect: gptq, awq, fp8, compressed-tensors, gguf ... or dense.")],
    out: Annotated[Path, typer.Option("-o", "--output", help="The folder (or .gguf file) to write.")],
    requantize: Annotated[bool, typer.Option(help="Choose new codes where the old do not carry over.")] = False,
    format: Annotated[str | None, typer.Option(help="With --requantize: the format to encode everything in.")] = None,
    dtype: Annotated[str | None, typer.Option(help="With --to dense: bf16, f16 or f32.")] = None,
    max_shard: Annotated[int, typer.Option(help="Largest shard, in bytes.")] = 5_000_000_000,
    overwrite: Annotated[bool, typer.Option(help="Replace a model that is already in OUTPUT.")] = False,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Rewrite a checkpoint in another dialect, with proof that nothing changed (or by how much)."""
    from fewbit.errors import RequestError
    from fewbit.workflows.convert import convert as run

    if format and not requantize:
        raise RequestError("--format chooses new codes: say --requantize as well")
    done = run(src, out, to, requantize=format or requantize, dtype=dtype, max_shard=max_shard, overwrite=overwrite,
               trust_remote_code=trust_remote_code, progress=progress)  # fmt: skip
    if as_json:
        report = asdict(done) | {"codes_equal": done.codes_equal, "difference": done.difference}
        print(json.dumps(report, indent=2, default=str))
        return
    if requantize:
        rows = [(m.name, m.source, m.target, f"{m.error:.5f}", f"{m.difference:.5f}") for m in done.modules]
        table("Requantized", ["module", "from", "to", "error", "largest"], rows)
    same = sum(m.codes_equal for m in done.modules)
    print(f"{done.out}: {done.dialect}, {len(done.modules)} quantized modules, {done.dense} dense tensors")
    print(f"codes equal in {same} of {len(done.modules)} modules; largest difference of a decoded weight"
          f" {done.difference:.3g} of its tensor's largest")  # fmt: skip


def doctor(as_json: Json = False) -> None:
    """Show what this machine can do: devices, what is installed, which formats run fast, slow or emulated, and why."""
    from fewbit.workflows.doctor import doctor as run
    from fewbit.workflows.doctor import render

    report = run()
    print(json.dumps(report, indent=2) if as_json else render(report))


VERBS = (inspect, verify, convert, doctor)
