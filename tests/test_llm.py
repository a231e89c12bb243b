"""LLM: vLLM's names, and what they mean, on a tiny model with a tokenizer."""

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fewbit
from fewbit import LLM, SamplingParams
from fewbit.engine.outputs import RequestOutput
from fewbit.errors import RequestError
from fewbit.models import hf
from tests.engine.tokenizers import byte_fallback
from tests.tiny import edit_config, llama

GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}.{% endfor %}{% if add_generation_prompt %}the{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = byte_fallback()
    tokenizer.chat_template = TEMPLATE
    place = llama(tmp_path_factory.mktemp("llm") / "model", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(folder, dtype="float32") as made:
        yield made


def texts(outs: list[RequestOutput]) -> list[str]:
    return [o.outputs[0].text for o in outs]


def test_every_shape_of_prompt(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    ids = tokenizer("the end of")["input_ids"]
    (one,) = llm.generate("the end of", GREEDY)
    assert one.prompt == "the end of" and list(one.prompt_token_ids) == ids and one.finished
    assert list(one.outputs[0].token_ids) == list(llm.generate([ids], GREEDY)[0].outputs[0].token_ids)
    several = llm.generate(["the end of", {"prompt_token_ids": ids}, {"prompt": "the end of"}], GREEDY)
    assert texts(several) == texts([one]) * 3
    assert one.outputs[0].text == tokenizer.decode(one.outputs[0].token_ids, skip_special_tokens=True)
    assert one.outputs[0].finish_reason == "length"


def test_is_transformers_generate(llm: LLM, folder: Path) -> None:
    model = fewbit.load(folder, dtype=torch.float32)
    ids = torch.tensor([llm.get_tokenizer()("the end of")["input_ids"]])
    want = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False,
                          eos_token_id=None, pad_token_id=0)[0, ids.shape[1] :].tolist()  # fmt: skip
    assert list(llm.generate("the end of", GREEDY)[0].outputs[0].token_ids) == want


def test_chat_goes_through_the_template(llm: LLM) -> None:
    talk = [{"role": "user", "content": "of"}]
    (one,) = llm.chat(talk, GREEDY)
    assert one.prompt == "user:of.the"
    assert texts(llm.chat([talk, talk], GREEDY)) == texts([one]) * 2


def test_parameters_for_each(llm: LLM) -> None:
    each = [SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True) for n in (1, 3)]
    outs = llm.generate(["the", "of"], each)
    assert [len(o.outputs[0].token_ids) for o in outs] == [1, 3]
    with pytest.raises(RequestError, match="2 prompts, 1 sampling_params"):
        llm.generate(["the", "of"], each[:1])


def test_several_answers_logprobs_and_a_stop(llm: LLM) -> None:
    asked = SamplingParams(n=3, temperature=1.0, seed=3, max_tokens=5, logprobs=2, ignore_eos=True)
    (out,) = llm.generate("the", asked)
    assert [o.index for o in out.outputs] == [0, 1, 2]
    for one in out.outputs:
        assert one.logprobs is not None and len(one.logprobs) == len(one.token_ids) == 5
        total = sum(held[t].logprob for held, t in zip(one.logprobs, one.token_ids, strict=True))
        assert one.cumulative_logprob == pytest.approx(total)
        assert all(entry.decoded_token is not None for held in one.logprobs for entry in held.values())
    text = llm.generate("the", GREEDY)[0].outputs[0].text
    stop = text[2:4]
    (cut,) = llm.generate("the", SamplingParams(temperature=0.0, max_tokens=6, stop=stop, ignore_eos=True))
    assert cut.outputs[0].text == text[: text.index(stop)] and cut.outputs[0].stop_reason == stop


def test_guided(llm: LLM) -> None:
    choice = SamplingParams(max_tokens=20, structured_outputs={"choice": ["good", "bad"]})
    assert texts(llm.generate("the", choice))[0] in ("good", "bad")
    found = texts(llm.generate("the", SamplingParams(max_tokens=100, structured_outputs={"regex": "[ab]{3}c"})))[0]
    assert len(found) == 4 and found[3] == "c" and set(found[:3]) <= {"a", "b"}
    with pytest.raises(RequestError):
        llm.generate("the", SamplingParams(max_tokens=100, structured_outputs={"regex": "[ab"}))


def test_more_prompts_than_the_queue(folder: Path) -> None:
    with LLM(folder, dtype="float32", max_queue=4, max_num_seqs=2) as llm:
        outs = llm.generate(["the"] * 30, SamplingParams(max_tokens=1, temperature=0.0))
        assert len(outs) == 30 and len(set(texts(outs))) == 1
        several = SamplingParams(n=3, max_tokens=1, seed=1, ignore_eos=True)  # more continuations than the queue holds
        assert [len(o.outputs) for o in llm.generate(["the"] * 5, several)] == [3] * 5


def test_a_mistake_among_many_leaves_the_engine_whole(llm: LLM) -> None:
    with pytest.raises(RequestError):
        llm.generate(["the", {"prompt_token_ids": [10**6]}], GREEDY)
    with pytest.raises(RequestError, match="'prompt' or 'prompt_token_ids'"):
        llm.generate([{"text": "the"}], GREEDY)
    assert not llm.llm_engine.has_work() and llm.llm_engine.stats().pages_used == 0
    assert llm.generate("the", GREEDY)


def test_unknown_keywords(folder: Path) -> None:
    with pytest.raises(RequestError, match="did you mean max_num_seqs"):
        LLM(folder, max_num_seq=1)
    with pytest.raises(RequestError, match="temperature"):
        SamplingParams(temprature=1.0)


def test_shutdown_has_vllms_path(folder: Path) -> None:
    llm = LLM(folder)
    llm.llm_engine.model_executor.shutdown()
    assert llm.llm_engine.loaded.model is None


def test_what_was_loaded_is_let_go(folder: Path) -> None:
    """While it serves, Python's garbage collector passes it by; after that nothing of it is left."""
    llm = LLM(folder)
    model = weakref.ref(llm.llm_engine.loaded.model)
    assert gc.get_freeze_count() > 0
    llm.llm_engine.shutdown()
    del llm
    gc.collect()
    assert gc.get_freeze_count() == 0 and model() is None


def test_an_architecture_that_cannot_be_paged(tmp_path: Path) -> None:
    """mamba has a state and no keys: its twin refuses pages, and it runs alone with transformers' own cache."""
    config = {
        "architectures": ["MambaForCausalLM"], "model_type": "mamba", "hidden_size": 64, "state_size": 8,
        "num_hidden_layers": 2, "vocab_size": 256, "conv_kernel": 4, "expand": 2, "time_step_rank": 4,
        "intermediate_size": 128, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "dtype": "float32",
    }  # fmt: skip
    model = hf.random_model(hf.read_config(config))
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, lambda c: c.update(dtype="float32"))
    with LLM(tmp_path, dtype="float32", max_num_batched_tokens=5, max_num_seqs=3) as llm:
        assert not llm.llm_engine.runner.paged
        prompts = [[5, 6, 7, 8, 9, 10, 11], [3, 4], [8] * 12]
        outs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True))
        for prompt, out in zip(prompts, outs, strict=True):
            ids = torch.tensor([prompt])
            with torch.no_grad():
                want = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)[0, len(prompt) :]
            assert list(out.outputs[0].token_ids) == want.tolist()
