"""GGUF read as a Hugging Face checkpoint and written back: names, values, configs, codes, and no lie believed."""

import re
from pathlib import Path
from typing import Any

import gguf as oracle
import pytest
import torch
from gguf.constants import MODEL_ARCH_NAMES, MODEL_TENSORS, TENSOR_NAMES
from torch import Tensor

from fewbit import codecs
from fewbit.codecs import gguf
from fewbit.codecs.gguf_names import NAMES, half_rows, interleave_rows, pair_rows
from fewbit.codecs.gguf_write import NVFP4_INPUT, slots_of
from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.files.gguf import open_gguf
from fewbit.quant import qtensor
from fewbit.quant.formats import FORMATS
from fewbit.quant.ggml import TYPES
from fewbit.quant.qtensor import Quantized
from fewbit.quant.reference import decode, encode
from fewbit.quant.spec import Format
from tests.codecs import common
from tests.codecs.ggufs import BASE, LLAMA, MODELS, VOCAB, Kv, Raw, llama, rewrite, saved, tokenizer, write

FIXTURES = (
    "gguf-q4_0-llama", "gguf-q8_0-qwen2", "gguf-q2_k-llamacpp-qwen2", "gguf-q4_k_m-llamacpp-llama",
    "gguf-iq4_nl-llamacpp-llama",
)  # fmt: skip
quiet = pytest.mark.filterwarnings("ignore")  # transformers warns about tiny configs


# names


@pytest.mark.parametrize("arch", NAMES)
def test_names_are_gguf_pys(arch: str) -> None:
    number = next(a for a, name in MODEL_ARCH_NAMES.items() if name == arch)
    held = {TENSOR_NAMES[t].removeprefix("blk.{bid}.") for t in MODEL_TENSORS[number]}
    theirs = oracle.get_tensor_name_map(number, 1)
    seen = 0
    for leaf, hf in NAMES[arch].layer.items():
        if leaf in held and leaf != "ffn_gate_inp_shexp":
            plain = f"model.layers.0.{hf}".replace(".norms.{}", "").replace(".{}", "")
            assert theirs.get_name(plain) == f"blk.0.{leaf}", hf
            seen += 1
    assert seen >= 7
    assert {leaf for leaf in held if leaf.startswith(("attn_", "ffn_"))} <= {
        *NAMES[arch].layer, *(leaf.split(".")[0] for leaf in NAMES[arch].exact), "attn_rot_embd",
        *(leaf.split(".")[0] for leaves, _ in NAMES[arch].joined.values() for leaf in leaves),
        "attn_q", "attn_k", "attn_v", "attn_qkv",
    }  # fmt: skip


def test_row_orders() -> None:
    heads, size, k = 3, 8, 5
    hf = torch.randn(heads * size, k)
    theirs = hf.reshape(heads, 2, size // 2, k).swapaxes(1, 2).reshape(hf.shape)
    assert torch.equal(hf[half_rows(len(hf), heads)], theirs)
    assert torch.equal(theirs[pair_rows(len(hf), heads)], hf)
    assert interleave_rows(6).tolist() == [0, 3, 1, 4, 2, 5]


# the whole way


def read_all(source: codecs.Source) -> dict[str, Tensor]:
    """Every tensor under its Hugging Face name, decoded; shapes and formats as they were announced."""
    out = {}
    for name, entry in source.modules.items():
        q = source.read(name)
        assert isinstance(q, Quantized)
        assert (q.format, q.weight.shape) == (entry.format, entry.shape)
        assert source.plan.for_module(name)[0] == entry.format
        out[f"{name}.weight"] = decode(q.weight)
    for name, info in source.dense.items():
        tensor = source.read(name)
        assert isinstance(tensor, Tensor)
        assert tuple(tensor.shape) == tuple(info.shape)
        assert tensor.nbytes == info.nbytes
        out[name] = tensor
    return out


@quiet
@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_reads_back(name: str, tmp_path: Path) -> None:
    """Tensors come back equal (norms to the rounding of adding 1), and the config makes the same model."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config, tensors, model = saved(name)
    with codecs.open(write(tmp_path / "model.gguf", config, tensors)) as source:
        assert not source.problems
        back = read_all(source)
        rebuilt = dict(source.config)
    assert back.keys() == tensors.keys()
    for key, want in tensors.items():
        torch.testing.assert_close(back[key], want, rtol=0, atol=3e-7 if "norm" in key else 0, msg=key)
    twin = AutoModelForCausalLM.from_config(CONFIG_MAPPING[rebuilt.pop("model_type")](**rebuilt)).float().eval()
    twin.load_state_dict(model.state_dict())
    ids = torch.randint(3, VOCAB, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(twin(ids).logits, model(ids).logits, rtol=0, atol=1e-6)


@quiet
@pytest.mark.parametrize(
    "name", ["llama", "llama+bias", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "starcoder2", "stablelm"]
)
def test_transformers_reads_what_is_written(name: str, tmp_path: Path) -> None:
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config, tensors, model = saved(name)
    path = write(tmp_path / "model.gguf", config, tensors)
    theirs = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    state = model.state_dict()
    assert theirs.keys() == {key for key in state if key not in model.all_tied_weights_keys}
    for key, tensor in theirs.items():
        torch.testing.assert_close(tensor, state[key], rtol=0, atol=3e-7, msg=key)


def quantized(tensors: dict[str, Tensor], kind: str) -> dict[str, Any]:
    """Every linear, expert and embedding in one ggml type."""
    spec, out = TYPES[kind].spec, {}
    for name, t in tensors.items():
        stack = t.dim() == 3
        weight = name.endswith(".weight") and t.dim() == 2 and not re.search(r"norm|gate\.weight|router|_gate\.", name)
        if not (stack or weight):
            out[name] = t
            continue
        w = t.transpose(1, 2).contiguous() if stack else t
        act = {"scale1": torch.full((1, 1), 0.25)} if kind == "nvfp4" else {}
        q = encode(w, spec)
        q.planes.update({"scale1": torch.rand(1, 1) + 0.5} if kind == "nvfp4" else {})
        out[name if stack else name.removesuffix(".weight")] = Quantized(
            Format(spec, NVFP4_INPUT if act else None), q, act
        )
    return out


@quiet
@pytest.mark.parametrize("kind", ["q8_0", "q5_1", "iq4_nl", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen2_moe", "gpt_oss", "gemma3_text", "deepseek_v3"])
def test_codes_come_back_as_they_were(name: str, kind: str, tmp_path: Path) -> None:
    """Experts join one stack, rows change their order, NVFP4's scales go to tensors of their own: all undone."""
    if kind == "nvfp4" and name in ("gpt_oss", "deepseek_v3"):
        pytest.skip("rows of 32, or gate and up with one tensor scale each")
    config, tensors, _ = saved(name)
    given = quantized(tensors, kind)
    with codecs.open(write(tmp_path / "model.gguf", config, given)) as source:
        assert source.modules.keys() == {key for key, value in given.items() if isinstance(value, Quantized)}
        for key, want in given.items():
            got = source.read(key)
            if isinstance(want, Quantized):
                assert isinstance(got, Quantized)
                assert got.format == want.format
                assert all(torch.equal(got.weight.planes[p], want.weight.planes[p]) for p in want.weight.planes), key
                assert got.act == want.act


def test_a_quantized_shared_head_is_one_module(tmp_path: Path) -> None:
    path = llama(tmp_path / "a.gguf")

    def tie(kv: Kv, tensors: Raw) -> None:
        del tensors["output.weight"]

    with codecs.open(rewrite(path, tmp_path / "b.gguf", tie)) as source:
        assert source.config["tie_word_embeddings"] is True
        assert "lm_head.weight" not in source.dense


@quiet
def test_absorbed_attention_is_put_together(tmp_path: Path) -> None:
    """New files of DeepSeek hold kv_b in two tensors, the keys transposed."""
    config, tensors, _ = saved("deepseek_v3")
    path = write(tmp_path / "a.gguf", config, tensors)

    def absorb(kv: Kv, raw: Raw) -> None:
        for layer in range(2):
            whole = tensors[f"model.layers.{layer}.self_attn.kv_b_proj.weight"].view(4, 48, 32)
            del raw[f"blk.{layer}.attn_kv_b.weight"]
            raw[f"blk.{layer}.attn_k_b.weight"] = "F32", whole[:, :16].transpose(1, 2).contiguous()
            raw[f"blk.{layer}.attn_v_b.weight"] = "F32", whole[:, 16:].contiguous()
        kv["deepseek2.attention.key_length_mla"] = kv["deepseek2.attention.key_length"]
        kv["deepseek2.attention.value_length_mla"] = kv["deepseek2.attention.value_length"]
        kv["deepseek2.attention.key_length"] = "u32", 48
        kv["deepseek2.attention.head_count_kv"] = "u32", 1

    with codecs.open(rewrite(path, tmp_path / "b.gguf", absorb)) as source:
        back = read_all(source)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[k], v) for k, v in tensors.items() if "norm" not in k)


@quiet
def test_experts_of_old_files_lie_apart(tmp_path: Path) -> None:
    config, tensors, _ = saved("mixtral")
    path = write(tmp_path / "a.gguf", config, tensors)

    def apart(kv: Kv, raw: Raw) -> None:
        for name in [n for n in raw if "_exps" in n]:
            kind, data = raw.pop(name)
            for e, part in enumerate(data.view(torch.float32)):
                raw[name.replace("_exps", f".{e}")] = kind, part.clone()

    with codecs.open(rewrite(path, tmp_path / "b.gguf", apart)) as source:
        back = read_all(source)
    assert all(torch.equal(back[key], value) for key, value in tensors.items())


# the peers' files


@pytest.mark.parametrize("name", FIXTURES)
def test_fixture_weights_and_logits(name: str) -> None:
    path = next(common.fixture(name).glob("*.gguf"))
    reference = common.reference(name)
    with codecs.open(path) as source:
        assert not source.problems
        assert "general.architecture" in source.evidence
        for key, want in reference.items():
            if match := re.match(r"dequantized\.(.+)\.weight\[0:(\d+)\]", key):
                assert torch.equal(decode(source.modules[match[1]].read().weight)[: int(match[2])], want)
        model = common.build(source, activations=False)
        with torch.no_grad():
            logits = model(reference["input_ids"]).logits
    assert common.relative(logits, reference["logits_quantized"]) <= 1e-5


@pytest.mark.parametrize("name", FIXTURES)
def test_fixture_blocks_are_written_byte_for_byte(name: str, tmp_path: Path) -> None:
    path = next(common.fixture(name).glob("*.gguf"))
    with codecs.open(path) as source:
        assert source.tokenizer is not None
        tensors = {n: source.read(n) for n in [*source.modules, *source.dense]}
        out = write(tmp_path / "out.gguf", source.config, tensors, dict(source.tokenizer))
    with open_gguf(path) as before, open_gguf(out) as after:
        assert before.tensors.keys() == after.tensors.keys()
        assert all(torch.equal(before.read(n), after.read(n)) for n in before.tensors)
        renamed = ("general.name", "tokenizer.ggml.pre")  # "default" and "gpt-2" cut text alike
        same = [key for key in before.kv if key in after.kv and key not in renamed]
        assert {key: before.kv[key] for key in same} == {key: after.kv[key] for key in same}
        assert len(same) >= len(before.kv) - 3


# what lies


def setting(key: str, kind: str, value: Any) -> Any:
    return lambda kv, tensors: kv.update({key: (kind, value)})


def without(name: str) -> Any:
    return lambda kv, tensors: (kv.pop(name, None), tensors.pop(name, None))


def pieces(change: Any) -> Any:
    def apply(kv: Kv, tensors: Raw) -> None:
        tokens = list(kv["tokenizer.ggml.tokens"][1])
        change(tokens)
        kv["tokenizer.ggml.tokens"] = "[string]", tokens

    return apply


LIES = {
    "no heads": (setting("llama.attention.head_count", "u32", 0), "'llama.attention.head_count': 0 is not a count"),
    "heads of another type": (setting("llama.attention.head_count", "string", "4"), "is stored as string"),
    "heads that do not fit": (setting("llama.attention.head_count", "u32", 8), "attn_q.weight' is .64, 64."),
    "kv heads": (setting("llama.attention.head_count_kv", "u32", 3), "3 does not divide 4 heads"),
    "too many kv heads": (setting("llama.attention.head_count_kv", "u32", 4), "attn_k.weight' is .32, 64."),
    "more layers": (setting("llama.block_count", "u32", 3), "'llama.block_count': 3, and no tensor of blk.2"),
    "fewer layers": (setting("llama.block_count", "u32", 1), "'llama.block_count': 1, and tensors of blk.1"),
    "no layers": (setting("llama.block_count", "u32", 0), "0 is not a count from 1"),
    "width": (setting("llama.embedding_length", "u32", 128), "token_embd.weight' is"),
    "mlp": (setting("llama.feed_forward_length", "u32", 64), "ffn_down.weight' is .64, 128."),
    "layers of many sizes": (setting("llama.feed_forward_length", "[i32]", [128, 64]), "differs from layer to layer"),
    "vocabulary": (setting("llama.vocab_size", "u32", 999), "'llama.vocab_size': 999, and token_embd.weight has 320"),
    "epsilon": (setting("llama.attention.layer_norm_rms_epsilon", "f32", float("nan")), "is not a finite number"),
    "odd head": (setting("llama.attention.key_length", "u32", 17), "17 is odd"),
    "rope type": (setting("llama.rope.scaling.type", "string", "spiral"), "'spiral' is not known"),
    "architecture": (setting("general.architecture", "string", "rnn"), "'rnn' is not read(.|\n)*known: .*llama"),
    "architecture of no kind": (setting("general.architecture", "u32", 3), "'general.architecture': is stored as u32"),
    "no context": (without("llama.context_length"), "'llama.context_length' is missing"),
    "no embedding": (without("token_embd.weight"), "no tensor 'token_embd.weight'"),
    "twice the same piece": (pieces(lambda t: t.__setitem__(9, t[8])), "tokens: .*duplicate"),
    "an empty piece": (pieces(lambda t: t.__setitem__(9, "")), "tokens: .*empty"),
    "a byte that is none": (pieces(lambda t: t.__setitem__(9, "<0x-1>")), "tokens: .*byte pieces"),
    "a huge piece": (pieces(lambda t: t.__setitem__(9, "x" * 100_000)), "tokens: .*over"),
    "too many pieces": (pieces(lambda t: t.append("more")), "token_type: 320 entries for 321 pieces"),
    "an id outside": (setting("tokenizer.ggml.bos_token_id", "u32", 5000), "bos_token_id"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_refused_by_file_and_key(lie: str, tmp_path: Path) -> None:
    change, text = LIES[lie]
    path = rewrite(llama(tmp_path / "a.gguf"), tmp_path / "b.gguf", change)
    with pytest.raises((CheckpointError, UnsupportedError), match=text) as caught:
        codecs.open(path)
    assert "b.gguf" in str(caught.value)


def test_a_folder_with_one_file(tmp_path: Path) -> None:
    path = llama(tmp_path / "a.gguf")
    with codecs.open(tmp_path) as folder, codecs.open(path) as bare:
        assert folder.config == bare.config
        assert folder.evidence == bare.evidence == "a.gguf: GGUF version 3, general.architecture = llama"
        assert folder.dense.keys() == bare.dense.keys()


def test_two_ends_are_kept(tmp_path: Path) -> None:
    with codecs.open(llama(tmp_path / "a.gguf", eos_token_id=[2, 7])) as source:
        assert source.config["eos_token_id"] == [2, 7]
        assert source.config["bos_token_id"] == 1


def test_unknown_tensors_are_shown(tmp_path: Path) -> None:
    def more(kv: Kv, tensors: Raw) -> None:
        tensors["blk.0.attn_mystery.weight"] = "F32", torch.zeros(64)
        tensors["blk.0.ffn_mystery.weight"] = "Q8_0", torch.zeros(64, 68, dtype=torch.uint8)
        tensors["rope_freqs.weight"] = "F32", torch.ones(8)

    with codecs.open(rewrite(llama(tmp_path / "a.gguf"), tmp_path / "b.gguf", more)) as source:
        assert "blk.0.attn_mystery.weight" in source.dense
        assert source.modules["blk.0.ffn_mystery"].shape == (64, 64)
        assert source.surplus == {"rope_freqs.weight": "read into the config: rotary factors"}
        assert "rope_scaling" not in source.config


def test_rotary_factors_of_no_rule_are_refused(tmp_path: Path) -> None:
    def more(kv: Kv, tensors: Raw) -> None:
        tensors["rope_freqs.weight"] = "F32", torch.arange(1.0, 9.0)

    path = rewrite(llama(tmp_path / "a.gguf"), tmp_path / "b.gguf", more)
    with pytest.raises(CheckpointError, match=r"rope_freqs.weight.*no factors that Llama 3"):
        codecs.open(path)


# what a GGUF file can hold

FITS = {
    "int4-g128": "q4_0", "int4-channel": "q4_0", "int5-g32": "q5_0", "int8-tensor": "q8_0", "int4-g64-asym": "q4_1",
    "int5-g128-asym": "q5_1", "mxfp4-a16": "mxfp4", "nvfp4-a16": "nvfp4", "q4_k": "q4_k", "iq2_xs": "iq2_xs",
}  # fmt: skip


@pytest.mark.parametrize("row", FITS)
def test_fit(row: str) -> None:
    assert gguf.fit(FORMATS[row]) == Format(TYPES[FITS[row]].spec)


@pytest.mark.parametrize(
    ("row", "why"),
    [("int3-g128", "it holds"), ("int8-g32-asym", "it holds"), ("fp8-tensor", "it holds"), ("nf4", "it holds"),
     ("mxint8-a16", "it holds"), ("mxfp4", "inputs are rounded"), ("int8-channel-a8", "inputs are rounded")],
)  # fmt: skip
def test_what_does_not_fit(row: str, why: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"gguf cannot hold(.|\n)*{why}"):
        gguf.fit(FORMATS[row])


def test_odd_groups_and_transforms_do_not_fit() -> None:
    form = FORMATS["int4-g128"]
    odd = qtensor.QuantSpec(form.weight.element, (qtensor.Scale(form.weight.scales[0].element, (1, 48)),))
    with pytest.raises(UnsupportedError, match="1 x 48"):
        gguf.fit(Format(odd))
    with pytest.raises(UnsupportedError, match="permute"):
        gguf.fit(Format(form.weight, transforms=("permute",)))


def test_static_nvfp4_inputs_fit_in_either_direction() -> None:
    weight = FORMATS["nvfp4"].weight
    assert gguf.fit(Format(weight, NVFP4_INPUT)) == Format(weight, NVFP4_INPUT)


# what the writer refuses

REFUSED = {
    "window": ({"model_type": "mistral", "sliding_window": 64}, "sliding_window = 64"),
    "rope": ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' cannot be said"),
    "type": ({"model_type": "mamba"}, "model_type 'mamba'"),
    "pattern": ({"model_type": "gemma2", "layer_types": ["full_attention"] * 2, "head_dim": 16}, "every layer 2"),
    "scale": ({"model_type": "gemma2", "query_pre_attn_scalar": 99, "head_dim": 16}, "query_pre_attn_scalar = 99"),
    "missing": ({"num_attention_heads": None}, "num_attention_heads is missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_configs_that_cannot_be_said(case: str, tmp_path: Path) -> None:
    changes, text = REFUSED[case]
    layout = {"model.embed_tokens.weight": ("F32", (VOCAB, 64))}
    with pytest.raises((CheckpointError, UnsupportedError), match=text):
        gguf.create(tmp_path / "x.gguf", {**LLAMA, **changes}, layout, tokenizer())
    assert not list(tmp_path.iterdir())


def test_tensors_that_cannot_be_written(tmp_path: Path) -> None:
    embedding = {"model.embed_tokens.weight": ("F32", (VOCAB, 64))}
    form = FORMATS["q4_k"]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"model.vision.patch.weight": ("F32", (4, 4))}, "has no name for it"),
        ({"model.layers.0.mlp.up_proj": (form, (128, 64))}, "a row of 64 cannot be written(.|\n)*blocks of 256"),
        ({"model.layers.0.mlp.up_proj": (FORMATS["nf4"], (128, 64))}, "fit it first"),
        ({"model.layers.0.mlp.up_proj.weight": ("I32", (128, 64))}, "a dense tensor of I32"),
    ]
    for more, text in cases:
        with pytest.raises(UnsupportedError, match=text):
            gguf.create(tmp_path / "x.gguf", LLAMA, embedding | more, tokenizer())
    with pytest.raises(UnsupportedError, match=r"found: tokenizer\.model"):
        gguf.create(tmp_path / "x.gguf", LLAMA, embedding, {"tokenizer.model": b""})


def test_no_tokenizer_is_written_as_none(tmp_path: Path) -> None:
    layout = {"model.embed_tokens.weight": ("F32", (VOCAB, 64))}
    with gguf.create(tmp_path / "x.gguf", LLAMA, layout, {}) as sink:
        sink.put("model.embed_tokens.weight", torch.zeros(VOCAB, 64))
    with open_gguf(tmp_path / "x.gguf") as file:
        assert file.kv["tokenizer.ggml.model"] == "none"
        assert file.kv["llama.vocab_size"] == VOCAB


def test_a_broken_off_write_leaves_nothing(tmp_path: Path) -> None:
    layout = {"model.embed_tokens.weight": ("F32", (VOCAB, 64)), "model.norm.weight": ("F32", (64,))}
    with (
        pytest.raises(RuntimeError, match="stop"),
        gguf.create(tmp_path / "x.gguf", LLAMA, layout, tokenizer()) as sink,
    ):
        sink.put("model.norm.weight", torch.ones(64))
        raise RuntimeError("stop")
    with (
        pytest.raises(CheckpointError, match="were not put"),
        gguf.create(tmp_path / "x.gguf", LLAMA, layout, tokenizer()),
    ):
        pass
    assert not (tmp_path / "x.gguf").exists()


@pytest.mark.parametrize(
    "name",
    ["block_sparse_moe.experts.3.w1", "block_sparse_moe.experts.3.gate_proj", "mlp.experts.3.gate_proj"],
)
def test_mixtral_has_many_names(name: str) -> None:
    (slot,) = slots_of(f"model.layers.1.{name}", "llama", {**BASE, "model_type": "mixtral"})
    assert (slot.name, slot.index) == ("blk.1.ffn_gate_exps.weight", 3)
