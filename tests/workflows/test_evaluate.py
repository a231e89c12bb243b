"""evaluate: the figures of a plain whole-model computation, intervals that cover, and requests that cannot be met."""

import json
import math
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import fewbit
from fewbit.errors import CheckpointError, RequestError, UnsupportedError
from fewbit.models.layers import Layers
from fewbit.workflows import evaluate_stream, evaluate_text
from fewbit.workflows.evaluate import FIGURES, by_document, evaluate, rows
from fewbit.workflows.evaluate_intervals import Estimate, estimates, student
from tests.tiny import edit, llama

CONTEXT = 32


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("evaluate") / "base")


@pytest.fixture(scope="session")
def quantized(base: Path) -> Path:
    out = base.parent / "fp8"
    fewbit.convert(base, out, "compressed-tensors", requantize="int8-channel-a8")
    return out


@pytest.fixture(scope="session")
def ids() -> Tensor:
    return torch.randint(3, 256, (CONTEXT * 9 + 5,), generator=torch.Generator().manual_seed(1))


def logits(path: Path, windows: Tensor, **options: Any) -> Tensor:
    """The whole model at once."""
    with torch.no_grad():
        model = fewbit.load(path, dtype="float32", **options)
        return torch.log_softmax(model(input_ids=windows).logits.float()[:, :-1], -1)


def plain(base: Tensor, model: Tensor, windows: Tensor) -> dict[str, float]:
    """Independent: log-probabilities of whole models -> figures."""
    wanted = windows[:, 1:, None]
    nll = {name: -p.gather(-1, wanted).double().mean().item() for name, p in (("base", base), ("model", model))}
    kl = torch.nn.functional.kl_div(model.double(), base.double(), log_target=True, reduction="none").sum(-1)
    return {
        "perplexity": math.exp(nll["model"]),
        "base_perplexity": math.exp(nll["base"]),
        "kl": kl.mean().item(),
        "agreement": (base.argmax(-1) == model.argmax(-1)).double().mean().item(),
        "difference": nll["model"] - nll["base"],
    }


def same(found: Any, wanted: dict[str, float]) -> None:
    for name, value in wanted.items():
        assert getattr(found, name).value == pytest.approx(value, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("piece", [1 << 24, 1 << 11], ids=["whole", "in pieces"])
@pytest.mark.parametrize("batch", [1, 4, None])
def test_figures(
    base: Path, quantized: Path, ids: Tensor, batch: int | None, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate_stream, "PIECE", piece)
    windows = ids[: CONTEXT * 9].view(9, CONTEXT)
    found = evaluate(quantized, ids=ids, against=base, context=CONTEXT, batch=batch, dtype="f32")
    same(found, plain(logits(base, windows), logits(quantized, windows), windows))
    assert (found.windows, found.documents, found.tokens) == (9, 9, 9 * (CONTEXT - 1))
    for name in FIGURES:
        estimate = getattr(found, name)
        assert estimate.low < estimate.value < estimate.high, name


def test_alone(base: Path, ids: Tensor) -> None:
    windows = ids[: CONTEXT * 3].view(3, CONTEXT)
    found = evaluate(base, ids=ids, context=CONTEXT, windows=3, dtype="float32")
    alone = logits(base, windows)
    assert found.perplexity.value == pytest.approx(plain(alone, alone, windows)["perplexity"], rel=1e-5)
    assert found.kl is None and found.base_perplexity is None
    assert [name for name, _, _ in rows(found)] == ["perplexity"]
    json.dumps(found.to_json(), allow_nan=False)


@pytest.mark.parametrize("form", ["int4-g64", "nvfp4", "fp8-block", "int8-channel-a8"])
def test_format_is_what_load_makes_of_it(base: Path, ids: Tensor, form: str) -> None:
    windows = ids[: CONTEXT * 2].view(2, CONTEXT)
    found = evaluate(base, ids=ids, format=form, context=CONTEXT, windows=2, dtype="f32")
    same(found, plain(logits(base, windows), logits(base, windows, format=form), windows))


def test_a_model_is_its_own_base(base: Path, ids: Tensor) -> None:
    found = evaluate(base, ids=ids, against=base, context=CONTEXT)
    assert found.kl == Estimate(0.0, 0.0, 0.0) and found.agreement == Estimate(1.0, 1.0, 1.0)
    assert found.difference == Estimate(0.0, 0.0, 0.0)


def test_deterministic_and_spilled(base: Path, quantized: Path, ids: Tensor) -> None:
    first, again = (evaluate(quantized, ids=ids, against=base, context=CONTEXT) for _ in range(2))
    assert first == again
    assert evaluate(quantized, ids=ids, against=base, context=CONTEXT, max_memory=1 << 12) == first
    other = evaluate(quantized, ids=ids, against=base, context=CONTEXT, seed=1)
    assert other.kl is not None and first.kl is not None
    assert other.kl.value == first.kl.value and other.kl.low != first.kl.low


def test_a_model_that_does_not_run_by_layers(base: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = evaluate(base, ids=ids, context=CONTEXT, windows=2, format="int8-channel-a8", dtype="f32")
    start = Layers.__init__
    monkeypatch.setattr(Layers, "__init__", lambda self, *a, **k: start(self, *a, **k | {"path": ""}))
    found = evaluate(base, ids=ids, context=CONTEXT, windows=2, format="int8-channel-a8", dtype="f32")
    same(found, {name: getattr(wanted, name).value for name in FIGURES})


def test_rows_of_several_lengths_are_documents(base: Path, ids: Tensor) -> None:
    held = [ids[:70], ids[70:100], ids[100:101], ids[101:140]]
    found = evaluate(base, ids=held, context=CONTEXT, dtype="f32")
    assert (found.windows, found.documents) == (6, 3)  # 32 + 32 + 6, 30, none of one token, 32 + 7
    total = count = 0.0
    for row in (ids[:32], ids[32:64], ids[64:70], ids[70:100], ids[101:133], ids[133:140]):
        total -= logits(base, row[None]).gather(-1, row[None, 1:, None]).double().sum().item()
        count += len(row) - 1
    assert found.tokens == count
    assert found.perplexity.value == pytest.approx(math.exp(total / count), rel=1e-5)


def test_progress_sees_every_layer(base: Path, ids: Tensor) -> None:
    seen: list[tuple[str, list[str]]] = []

    def progress(names: Any, label: str) -> Any:
        seen.append((label, list(names)))
        return seen[-1][1]

    evaluate(base, ids=ids, against=base, context=CONTEXT, windows=2, progress=progress)
    layers = ["model.layers.0", "model.layers.1"]
    assert seen == [("model", layers), ("base", layers), ("scoring", ["0"])]


class Letters:
    """A tokenizer: one token a letter, BOS before a text if it has one."""

    def __init__(self, bos: int | None):
        self.bos_token_id = bos

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> SimpleNamespace:
        first = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        return SimpleNamespace(input_ids=[*first, *(ord(c) - 87 for c in text)])


def test_windows_of_text(tmp_path: Path) -> None:
    file = tmp_path / "t.txt"
    file.write_text("abcdefghij")
    found = evaluate_text.windows_of_text(file, Letters(None), 4)
    assert [row.tolist() for row in found.rows] == [[10, 11, 12, 13], [14, 15, 16, 17]]
    found = evaluate_text.windows_of_text(file, Letters(1), 4)
    assert [row.tolist() for row in found.rows] == [[1, 10, 11, 12], [1, 13, 14, 15], [1, 16, 17, 18]]
    assert found.documents == (0, 1, 2) and found.scored == 9
    lines = tmp_path / "t.jsonl"
    lines.write_text('{"text": "abcde"}\n\n{"text": "fg"}\n')
    found = evaluate_text.windows_of_text(lines, Letters(1), 4)
    assert [row.tolist() for row in found.rows] == [[1, 10, 11, 12], [1, 13, 14], [1, 15, 16]]
    assert found.documents == (0, 0, 1)
    assert found.batches(8) == [[0], [1, 2]]


def test_documents_are_summed() -> None:
    cut = evaluate_text.Windows((), (4, 4, 7), "")
    sums = torch.tensor([[1.0, 10], [2, 20], [3, 30]])
    assert by_document(sums, cut).tolist() == [[3, 30], [3, 30]]


@pytest.mark.parametrize("documents", [8, 20, 60])
def test_intervals_cover(documents: int) -> None:
    """Of 400 texts whose documents are normal around 1, about 380 intervals hold 1."""
    generator = torch.Generator().manual_seed(documents)
    hits = 0
    for seed in range(400):
        values = 1 + 0.5 * torch.randn(documents, generator=generator)
        sums = torch.stack([torch.ones(documents), values], -1)
        found = estimates(sums, {"mean": lambda s: s[..., 1] / s[..., 0]}, seed, 500)["mean"]
        hits += found.low <= 1 <= found.high
        assert found.value == pytest.approx(values.mean().item(), rel=1e-5)
    assert 0.92 <= hits / 400 <= 0.98


def test_student() -> None:
    table = {3: 3.182, 7: 2.365, 19: 2.093, 59: 2.001}
    for freedom, value in table.items():
        assert student(0.975, freedom) == pytest.approx(value, rel=0.01)


def test_one_document_has_no_interval(base: Path, ids: Tensor) -> None:
    found = evaluate(base, ids=ids, context=CONTEXT, windows=1)
    assert found.perplexity.low is None and rows(found)[0][2].startswith("none")


def test_requests_that_cannot_be_met(base: Path, quantized: Path, ids: Tensor, tmp_path: Path) -> None:
    other = llama(tmp_path / "other", vocab_size=320)
    long = [
        (RequestError, r"give one of them", {"path": base}),
        (RequestError, r"give one of them", {"path": base, "ids": ids, "text": "t.txt"}),
        (RequestError, r"320 tokens.*256", {"path": other, "against": base, "ids": ids, "context": CONTEXT}),
        (RequestError, r"knows 128 positions", {"path": base, "ids": ids, "context": 256}),
        (RequestError, r"do not fill a window", {"path": base, "ids": ids[:10], "context": CONTEXT}),
        (RequestError, r"token 300", {"path": base, "ids": ids.new_full((64,), 300), "context": CONTEXT}),
        (RequestError, r"windows=0", {"path": base, "ids": ids, "context": CONTEXT, "windows": 0}),
        (RequestError, r"batch=0", {"path": base, "ids": ids, "context": CONTEXT, "batch": 0}),
        (RequestError, r"context=1", {"path": base, "ids": ids, "context": 1}),
        (CheckpointError, r"cannot open", {"path": base, "text": tmp_path / "none", "tokenizer": Letters(None)}),
        (
            UnsupportedError,
            r"already quantized",
            {"path": quantized, "ids": ids, "format": "nvfp4", "context": CONTEXT},
        ),
    ]
    for kind, message, asked in long:
        with pytest.raises(kind, match=message):
            evaluate(**asked)


def test_logits_that_are_not_finite(tmp_path: Path, ids: Tensor) -> None:
    broken = edit(llama(tmp_path / "m"), lambda t: t["model.layers.1.mlp.up_proj.weight"].fill_(3e38))
    with pytest.raises(CheckpointError, match="not finite"):
        evaluate(broken, ids=ids, context=CONTEXT, windows=2)


TASK = """
task: local_{kind}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
metadata: {{version: 1}}
"""
KINDS = {
    "generate_until": """
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["z"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "multiple_choice": """
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "loglikelihood_rolling": """
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}]
""",
}


def with_tokenizer(folder: Path) -> Path:
    """A token for every byte; the model of tests.tiny has as many."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": letters[-1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.filterwarnings("ignore")  # of what lm-eval imports
def test_lm_eval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The three kinds of task that lm-eval has, against the whole model."""
    harness = pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra `eval`)")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    from lm_eval.tasks import TaskManager

    import fewbit.lm_eval as adapter

    folder = with_tokenizer(llama(tmp_path / "model"))
    docs = [
        {"question": "one two", "answer": "x", "choices": [" three", " mice", " q"], "text": "a text of words"},
        {"question": "red", "answer": "y", "choices": [" green blue", " u", " w"], "text": "another one"},
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, docs)))
    for kind, body in KINDS.items():
        head = TASK.format(kind=kind, file=tmp_path / "data.jsonl")
        (tmp_path / f"{kind}.yaml").write_text(head + body)
    results = []
    for batch in (1, 4):
        lm = adapter.FewbitLM(str(folder), batch_size=batch, dtype="float32")
        manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
        run = harness.simple_evaluate(
            lm, tasks=[f"local_{k}" for k in KINDS], task_manager=manager, log_samples=True, bootstrap_iters=0
        )
        results.append(run)
    scored = [r["results"]["local_loglikelihood_rolling"]["word_perplexity,none"] for r in results]
    assert scored[0] == pytest.approx(scored[1], rel=1e-5)

    model, tokenizer = fewbit.load(folder, dtype="float32"), lm.tokenizer

    def likelihood(context: list[int], wanted: list[int]) -> float:
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([context + wanted])).logits[0].log_softmax(-1)
        return sum(float(scores[len(context) + i - 1, token]) for i, token in enumerate(wanted))

    words = sum(len(d["text"].split()) for d in docs)
    total = sum(likelihood([tokenizer.eos_token_id], tokenizer(d["text"]).input_ids) for d in docs)
    assert scored[0] == pytest.approx(math.exp(-total / words), rel=1e-4)
    for run in results:
        samples = sorted(run["samples"]["local_multiple_choice"], key=lambda s: s["doc_id"])
        for doc, sample in zip(docs, samples, strict=True):
            for choice, response in zip(doc["choices"], sample["filtered_resps"], strict=True):
                ids = [tokenizer(text).input_ids for text in (doc["question"], choice)]
                assert float(response[0]) == pytest.approx(likelihood(*ids), rel=1e-4)
        samples = sorted(run["samples"]["local_generate_until"], key=lambda s: s["doc_id"])
        for doc, sample in zip(docs, samples, strict=True):
            ids = torch.tensor([tokenizer(doc["question"]).input_ids])
            made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
            text = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
            assert sample["filtered_resps"][0] == text.split("z")[0]


def test_lm_eval_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "fewbit.lm_eval", raising=False)
    with pytest.raises(UnsupportedError, match=r"fewbit\[eval\]"):
        import_module("fewbit.lm_eval")
