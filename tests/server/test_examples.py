"""Every example, every command of docs/serve.md and docs/fakequant.md, and the serving examples of users' documents."""

import json
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import httpx
import pytest

import fewbit
from fewbit.compat.inc import unify_files
from fewbit.models import hf
from tests.models import saved
from tests.server.documents import ROOT, Block, Shell, blocks, commands
from tests.server.served import Running, engine, model, running, tokenizer_into

PAGE = blocks((ROOT / "docs" / "serve.md").read_text())
FAKEQUANT = blocks((ROOT / "docs" / "fakequant.md").read_text())
SEEDS = ROOT / ".." / "shared" / "seeds"
URL = "http://127.0.0.1:8000"
VOCAB = 1000  # so that random token ids, as bench sends them, are the model's


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens beyond the bytes have names of their own."""
    folder = model(tmp_path_factory.mktemp("examples") / "tiny", vocab_size=VOCAB, max_position_embeddings=2048)
    file = folder / "tokenizer.json"
    found = json.loads(file.read_text())
    known = found["model"]["vocab"]
    known |= {f"t{i}": i for i in range(len(known), VOCAB)}
    file.write_text(json.dumps(found))
    return folder


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[Running]:
    with running(engine(tiny, served_model_name=("m", str(tiny)))) as up:
        yield up


@pytest.fixture
def shell(tmp_path: Path, tiny: Path, server: Running) -> Shell:
    """The examples are there, and the files that the page shows."""
    made = Shell(tmp_path, {URL: server.url, "MODEL": str(tiny), "TOKENIZER": str(tiny)})
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    for block in PAGE:
        if block.name:
            (tmp_path / block.name).write_text(made.filled(block.text))
    return made


def answers(url: str) -> None:
    """What is up goes on with a text."""
    head = {"authorization": "Bearer sk-doc"}
    body = {"prompt": "ab", "max_tokens": 2, "ignore_eos": True}
    found = httpx.post(f"{url}/v1/completions", json=body, headers=head, timeout=60, trust_env=False)
    assert found.status_code == 200 and found.json()["usage"]["completion_tokens"] == 2, found.text


@pytest.mark.parametrize("block", [b for b in PAGE if not b.name and not b.text.startswith("docker")], ids=str)
def test_the_page(block: Block, shell: Shell) -> None:
    if block.kind == "python":
        shell.program(block.text)
        return
    rest: list[str] = []
    for command in commands(block.text):
        if "fewbit serve" in command:
            if rest:  # what it is to serve with
                assert shell.script("\n".join(rest)).strip()
                rest = []
            with shell.server(command) as url:
                answers(url)
        else:
            rest.append(command)
    if rest:
        assert shell.script("\n".join(rest)).strip()


@pytest.mark.parametrize("block", [b for b in FAKEQUANT if "export_mcore" not in b.text], ids=str)
def test_fakequant(block: Block, shell: Shell) -> None:
    """From nothing to answers of an emulated model; lm-eval's own line is ModelOpt's, and tested as such below."""
    shell.env |= {"FEWBIT_CALIB_SIZE": "4", "QUANT_CALIB_SIZE": "4"}
    if block.kind == "python":
        shell.program(block.text)
        return
    for command in commands(block.text):
        if "lm_eval" in command:
            assert command.replace("model=emulated", "model=<model_name>") == shown(FAKE, "lm_eval --model").strip()
        elif " -o " in command:
            assert "next:" in shell.script(command)
        else:
            with shell.server(command) as url:
                answers(url)


def test_every_example_is_on_a_page() -> None:
    told = "".join(block.text for block in PAGE + FAKEQUANT)
    assert all(f"examples/{file.name}" in told for file in (ROOT / "examples").glob("*.py"))
    assert all(len(file.read_text().splitlines()) < 40 for file in (ROOT / "examples").glob("*.py"))


@cache
def seed(name: str) -> list[Block]:
    if not SEEDS.is_dir():
        pytest.skip("../shared/seeds is not there")
    return blocks((SEEDS / name).read_text())


def shown(name: str, words: str, which: int = 0) -> str:
    """The block of a seed that holds these words; the program's name is ours."""
    text = [block.text for block in seed(name) if words in block.text][which]
    return text.replace("vllm serve", "fewbit serve").replace("from vllm import", "from fewbit import")


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"vocab_size": 264, "hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128, "num_hidden_layers": 1,
             "num_attention_heads": 2, "max_position_embeddings": 512}  # fmt: skip
    made = hf.random_model(hf.read_config({"model_type": "opt", "architectures": ["OPTForCausalLM"], **sizes}))
    return tokenizer_into(saved.save(made, tmp_path_factory.mktemp("examples") / "opt"))


FP8, MODELOPT, FAKE, INC = (f"{name}.md" for name in (
    "fp8_and_autofp8", "modelopt_checkpoints_in_vllm", "modelopt_fakequant_in_vllm", "inc_fp8_gaudi"))  # fmt: skip


def test_seed_fp8_online(shell: Shell, opt: Path) -> None:
    shell.words = {"facebook/opt-125m": str(opt)}
    shell.program(shown(FP8, "from vllm import LLM"))


def test_seed_fp8_dynamic(shell: Shell, tiny: Path) -> None:
    """Its own script makes the checkpoint."""
    shell.words = {"from auto_fp8 import": "from fewbit.compat.autofp8 import",
                   '"meta-llama/Meta-Llama-3-8B-Instruct"': repr(str(tiny))}  # fmt: skip
    shell.program(shown(FP8, 'BaseQuantizeConfig(quant_method="fp8", activation_scheme="dynamic")'))
    shell.program(shown(FP8, '"Meta-Llama-3-8B-Instruct-FP8-Dynamic/"'))


def test_seed_fp8_static(shell: Shell, tiny: Path, tmp_path: Path) -> None:
    """Its own script wants a data set of a hub."""
    fewbit.quantize(tiny, tmp_path / "Meta-Llama-3-8B-Instruct-FP8", "FP8", to="fp8", samples=4, report=False)
    shell.program(shown(FP8, '"Meta-Llama-3-8B-Instruct-FP8/"'))


def test_seed_modelopt(shell: Shell, tiny: Path, tmp_path: Path) -> None:
    out = fewbit.quantize(tiny, tmp_path / "out", "FP8", to="modelopt", samples=4, report=False).out
    shell.words = {"nvidia/Llama-3.1-8B-Instruct-FP8": str(out), "<path_to_exported_checkpoint>": str(out)}
    said = shell.program(shown(MODELOPT, "def main"))
    assert said.count("Prompt: ") == 4 and "The capital of France is" in said
    with shell.server(shown(MODELOPT, "vllm serve")) as url:
        answers(url)


GAUDI = "/path/to/quant/config/inc/meta-llama-3.1-405b-instruct/maxabs_measure_g3.json"


def test_seed_gaudi(shell: Shell, tiny: Path, tmp_path: Path) -> None:
    """Its command measures, then quantizes, on 2 ranks for its 8, the misspelt flag as it stands there; then its
    program runs on what both ranks have measured."""
    for mode in ("MEASURE", "QUANTIZE"):
        (tmp_path / f"{mode}.json").write_text(json.dumps({"mode": mode, "dump_stats_path": "out/inc"}))
    names = {"--tensor_paralel_size 8": "--tensor_paralel_size 2", "meta-llama/Llama-3.1-405B-Instruct": str(tiny),
             "llama3.1/Meta-Llama-3.1-8B-Instruct": str(tiny)}  # fmt: skip
    command = shown(INC, "vllm serve")
    for mode in ("MEASURE", "QUANTIZE"):
        shell.words = {GAUDI: f"{mode}.json", **names}
        with shell.server(command) as url:
            answers(url)
    ranks = [tmp_path / "out" / f"inc_hooks_maxabs_{rank}_2" for rank in (0, 1)]
    unify_files(ranks, tmp_path / "out" / "inc_hooks_maxabs")
    shell.env["QUANT_CONFIG"] = "QUANTIZE.json"
    text = shown(INC, "from vllm import LLM")
    assert "model_executor.shutdown()" in text
    shell.program(text)
    del shell.env["QUANT_CONFIG"]
    with pytest.raises(AssertionError, match="QUANT_CONFIG is not set"):
        shell.program(text)


def test_the_page_on_inc(shell: Shell, tiny: Path, tmp_path: Path) -> None:
    """Its configs as files, its commands and its program in their order."""
    shell.words = {"MODEL": str(tiny), "--calib-samples 128 --calib-len 512": "--calib-samples 4 --calib-len 32"}
    for block in blocks((ROOT / "docs" / "inc.md").read_text()):
        if block.name:
            (tmp_path / block.name).write_text(block.text)
        elif "fewbit serve" in block.text:
            with shell.server(block.text) as url:
                answers(url)
        else:
            (shell.program if block.kind == "python" else shell.script)(block.text)
    assert len(list((tmp_path / "out").glob("inc_output_hooks_maxabs_MAXABS_HW*"))) == 6


def test_seed_fakequant(shell: Shell, tiny: Path) -> None:
    """Its variables, its flags; the script is ours."""
    ours = "python examples/serve_fakequant.py"
    shell.env |= {"QUANT_CALIB_SIZE": "4"}
    shell.words = {"<model_path>": str(tiny), "python vllm_serve_fakequant.py": ours, "-tp 8": "-tp 1"}
    command = next(commands(shown(FAKE, "KV_ATTN_MATH=fp8 \\\npython")))
    with shell.server(command) as url:
        shell.words |= {"http://127.0.0.1:8000": url}
        said = json.loads(shell.script(shown(FAKE, "curl -X POST")))
    assert said["model"] == str(tiny) and said["usage"]["completion_tokens"] <= 8


def test_seed_fakequant_lm_eval(shell: Shell) -> None:
    """gsm8k lies on a hub, and this lm-eval takes the batch size as a flag; the rest of the line as it stands there."""
    text = shown(FAKE, "lm_eval --model")
    shell.words |= {"--tasks gsm8k": "--tasks facts_gen --include_path . --batch_size 128", ",batch_size=128": "",
                    "<model_name>": "m"}  # fmt: skip
    assert "exact_match" in shell.script("cd examples/lm_eval; export OPENAI_API_KEY=none\n" + text)
