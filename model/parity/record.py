"""Records what the reference implementations compute, for the tests in `src/parity/`.

    python -m venv venv && venv/bin/pip install torch transformers peft gguf
    venv/bin/python record.py tiny                  # models, adapters and gradients of `tiny/`
    venv/bin/python record.py families              # the same of `families/`: architectures beside Llama
    venv/bin/python record.py smollm2 MODEL.gguf    # `smollm2.json`
    venv/bin/python record.py minilm model.safetensors tokenizer.json   # `minilm.json`; needs sentence-transformers too
    venv/bin/python record.py logits MODEL.gguf ADAPTER TOKENS...   # to stdout, for a live check

Everything is computed on the CPU in f32 by `transformers` and PEFT; GGUF files are written and
dequantised by the `gguf` package. Nothing here shares code with the crate.
"""

import copy
import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

HERE = Path(__file__).parent
TINY = HERE / "tiny"
FAMILIES = HERE / "families"
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
torch.manual_seed(0)
torch.set_num_threads(1)


def digits(values):
    return [float(f"{v:.7g}") for v in values]


# ---------------------------------------------------------------- tiny models


def bytes_to_unicode():
    """GPT-2's map of bytes to printable characters, in the order of the bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table, extra = {}, 0
    for byte in range(256):
        table[byte] = chr(byte if byte in plain else 256 + extra)
        extra += byte not in plain
    return table


def vocabulary(more=()):
    tokens = list(bytes_to_unicode().values())
    merges = [("a", "r"), ("ar", "d"), ("c", "ard"), ("Ġ", "card"), ("h", "e"), ("l", "l")]
    merges += more
    tokens += [a + b for a, b in merges]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return tokens, merges, special


def shape(hidden, head_dim, heads, kv_heads, ffn, layers, vocab):
    return dict(
        hidden_size=hidden,
        head_dim=head_dim,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        vocab_size=vocab,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )


def randomised(model, seed, norms_around=1):
    """Weights large enough that every part of the model shows in the logits."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=rng)
            if name.endswith("norm.weight"):
                value.copy_(norms_around + 0.2 * noise)
            else:
                value.copy_(noise * 1.2 / value.shape[-1] ** 0.5)
            # Halves of 16 bits hold them exactly, so that every file type may.
            value.copy_(value.to(torch.bfloat16).float())
    return model.eval()


def tokens_of(model, count, seed):
    rng = np.random.default_rng(seed)
    return [int(t) for t in rng.integers(0, model.config.vocab_size, count)]


@torch.no_grad()
def last_logits(model, tokens):
    return model(torch.tensor([tokens])).logits[0, -1]


def case_of(model, seed, count=48):
    tokens = tokens_of(model, count, seed)
    return {"tokens": tokens, "logits": digits(last_logits(model, tokens).tolist())}


class File:
    """A GGUF file. That of a Llama names more than those of others, whose readers infer it."""

    def __init__(self, path, config, theta, architecture="llama", write_tokenizer=None):
        self.writer = w = gguf.GGUFWriter(path, architecture)
        w.add_context_length(config.max_position_embeddings)
        w.add_embedding_length(config.hidden_size)
        w.add_block_count(config.num_hidden_layers)
        w.add_feed_forward_length(config.intermediate_size)
        w.add_head_count(config.num_attention_heads)
        w.add_head_count_kv(config.num_key_value_heads)
        if architecture != "qwen2":
            w.add_key_length(config.head_dim)
            w.add_value_length(config.head_dim)
        if architecture == "llama":
            w.add_rope_dimension_count(config.head_dim)
        if architecture == "gemma3":
            w.add_sliding_window(config.sliding_window)
        w.add_rope_freq_base(theta)
        w.add_layer_norm_rms_eps(config.rms_norm_eps)
        if architecture == "llama":
            w.add_vocab_size(config.vocab_size)
        (write_tokenizer or self.smollm)(w)

    @staticmethod
    def smollm(w):
        tokens, merges, special = vocabulary()
        w.add_tokenizer_model("gpt2")
        w.add_tokenizer_pre("smollm")
        w.add_token_list(tokens + special)
        w.add_token_types([1] * len(tokens) + [3] * len(special))
        w.add_token_merges([f"{a} {b}" for a, b in merges])
        w.add_bos_token_id(len(tokens) + 1)
        w.add_eos_token_id(len(tokens) + 2)

    def tensor(self, name, value, kind):
        kinds = gguf.GGMLQuantizationType
        value = np.ascontiguousarray(value, dtype=np.float32)
        if kind in ("Q4_K", "Q6_K"):
            packed = random_blocks(kind, value.shape, sum(name.encode()))
        else:
            packed = gguf.quants.quantize(value, kinds[kind])
        self.writer.add_tensor(name, packed, raw_dtype=kinds[kind])
        return torch.from_numpy(gguf.quants.dequantize(packed, kinds[kind]).copy())

    def close(self):
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()


def random_blocks(kind, shape, seed):
    """Blocks of a type that `gguf` reads but does not write."""
    rng = np.random.default_rng(seed)
    size, scales = {"Q4_K": (144, {0: 4e-4, 2: 3e-3}), "Q6_K": (210, {208: 6e-5})}[kind]
    blocks = rng.integers(0, 256, (shape[0], shape[1] // 256, size), dtype=np.uint8)
    for at, value in scales.items():
        half = np.float16(value * rng.uniform(0.5, 1.5, blocks.shape[:2]))
        blocks[:, :, at : at + 2] = half[..., None].view(np.uint8)
    return blocks.reshape(shape[0], -1)


def interleaved(weight, heads):
    """llama.cpp's order of the query and key rows."""
    rows, width = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, width)
    return np.swapaxes(halves, 1, 2).reshape(rows, width)


def write_gguf(path, model, theta, kind_of, extra=(), architecture="llama", write_tokenizer=None):
    """Writes `model`, gives it the values that the file has, and leaves it as the reference."""
    config = model.config
    file = File(path, config, theta, architecture, write_tokenizer)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
    }
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    if architecture != "llama":
        # llama.cpp turns the halves of their heads as `transformers` does.
        heads = {}
    shift = 0
    if architecture == "gemma3":
        # `transformers` adds one to every norm's weight, llama.cpp's converter has done so.
        shift = 1
        names["post_attention_layernorm"] = "post_attention_norm"
        names["pre_feedforward_layernorm"] = "ffn_norm"
        names["post_feedforward_layernorm"] = "post_ffw_norm"
    for name, value in model.named_parameters():
        _, _, rest = name.partition("model.")
        if name == "model.embed_tokens.weight":
            target = "token_embd"
        elif name == "model.norm.weight":
            target = "output_norm"
        elif name == "lm_head.weight":
            target = "output"
        else:
            _, layer, rest = rest.split(".", 2)
            target = f"blk.{layer}.{names[rest.rpartition('.')[0]]}"
        short = target.rpartition(".")[2]
        numbers = value.detach().numpy()
        kind = "F32" if value.ndim == 1 else kind_of(target)
        if short in heads:
            stored = file.tensor(f"{target}.weight", interleaved(numbers, heads[short]), kind)
            rows, width = stored.shape
            pairs = stored.reshape(heads[short], rows // heads[short] // 2, 2, width)
            stored = pairs.transpose(1, 2).reshape(rows, width)
        else:
            by = shift if name.endswith("norm.weight") else 0
            stored = file.tensor(f"{target}.{name.rpartition('.')[2]}", numbers + by, kind) - by
        with torch.no_grad():
            value.copy_(stored.reshape(value.shape))
    for name, value in extra:
        file.tensor(name, value, "F32")
    file.close()


def mixed(vocab):
    """One tensor of each type that the crate reads."""
    kinds = {
        "token_embd": "Q8_0",
        "attn_q": "Q4_K",
        "attn_k": "F16",
        "attn_v": "BF16",
        "attn_output": "Q4_0",
        "ffn_gate": "Q4_1",
        "ffn_up": "Q6_K",
        "ffn_down": "F32",
    }
    config = LlamaConfig(**shape(256, 64, 2, 1, 32, 1, vocab), rope_theta=10000.0)
    model = randomised(LlamaForCausalLM(config), 1)
    path = TINY / "mixed.gguf"
    write_gguf(path, model, 10000.0, lambda name: kinds[name.rpartition(".")[2]])
    # The reference is the same file through the loader of `transformers`.
    loaded = AutoModelForCausalLM.from_pretrained(TINY, gguf_file=path.name, dtype=torch.float32)
    loaded = loaded.eval()
    tokens = tokens_of(model, 48, 1)
    off = (last_logits(model, tokens) - last_logits(loaded, tokens)).abs().max()
    assert off < 1e-4, off
    return {"mixed.gguf": case_of(loaded, 1)}


def rope(vocab):
    """Llama 3.2's rescaled frequencies, tied head, in both formats."""
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    theta = 10000.0
    config = LlamaConfig(**shape(32, 8, 4, 2, 48, 2, vocab), rope_theta=theta, rope_scaling=scaling)
    model = randomised(LlamaForCausalLM(config), 2)
    folder = TINY / "rope"
    # A copy, since the cast also rounds the table of rotary frequencies.
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    tokens, merges, special = vocabulary()
    bpe = models.BPE({t: i for i, t in enumerate(tokens + special)}, merges)
    tokenizer = Tokenizer(bpe)
    digits_alone = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits_alone, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}\n')
    for spare in ["generation_config.json"]:
        (folder / spare).unlink(missing_ok=True)
    # What llama.cpp's converter writes in place of the parameters: a divisor for each frequency.
    frequencies = theta ** -(np.arange(0, 8, 2) / 8)
    wave = 2 * np.pi / frequencies
    smooth = (64 / wave - 1.0) / (4.0 - 1.0)
    divisors = np.where(wave > 64, 8.0, 1 / ((1 - smooth) / 8.0 + smooth))
    divisors = np.where(wave < 16, 1.0, divisors)
    extra = [("rope_freqs.weight", divisors.astype(np.float32))]
    write_gguf(TINY / "rope.gguf", model, theta, lambda _: "BF16", extra)
    result = case_of(model, 2, 200)
    return model, {"rope.gguf": result, "rope": result}


INVOCATION = [257, 31]


def adapters(base, into=TINY, kinds=(("lora", None), ("alora", INVOCATION))):
    """PEFT's own adapters on `base`, and the gradients of a loss with them."""
    made = {}
    rng = np.random.default_rng(9)
    rows = []
    for count in (5, 9, 7):
        # The invocation comes twice: the last one counts.
        prompt = [1, 2, 3, *INVOCATION, 4, *(int(t) for t in rng.integers(0, 250, count))]
        prompt += [*INVOCATION, 60]
        rows.append({"prompt": prompt, "target": [int(t) for t in rng.integers(0, 250, 4)]})
    for name, invocation in kinds:
        config = LoraConfig(
            r=2,
            lora_alpha=6,
            lora_dropout=0.0,
            target_modules=MODULES,
            task_type="CAUSAL_LM",
            alora_invocation_tokens=invocation,
        )
        model = get_peft_model(base, config)
        noise = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for key, value in model.named_parameters():
                if "lora_" in key:
                    value.copy_(torch.randn(value.shape, generator=noise) * 0.15)
        folder = into / f"peft-{name}"
        model.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)
        model.eval()
        results = []
        for row in rows:
            tokens = row["prompt"] + row["target"][:-1]
            results.append({"tokens": tokens, "logits": digits(last_logits(model, tokens).tolist())})
        total = sum(len(row["target"]) for row in rows)
        loss = 0
        for row in rows:
            tokens = row["prompt"] + row["target"]
            logits = model(torch.tensor([tokens])).logits[0, len(row["prompt"]) - 1 : -1]
            target = torch.tensor(row["target"])
            loss = loss + torch.nn.functional.cross_entropy(logits, target, reduction="sum")
        (loss / total).backward()
        gradients = {
            key.replace(".default", ""): digits(value.grad.flatten().tolist())
            for key, value in model.named_parameters()
            if value.grad is not None
        }
        assert len(gradients) == 2 * base.config.num_hidden_layers * len(MODULES)
        made[name] = {
            "rows": rows,
            "cases": results,
            "loss": float(loss / total),
            "gradients": gradients,
        }
        base = model.unload()
    return base, made


def ours(base):
    """What PEFT computes with the files that the crate writes; kept as they were checked."""
    folder = TINY / "ours"
    if not folder.exists():
        return None
    model = PeftModel.from_pretrained(base, folder).eval()
    return case_of(model, 6)


def record_tiny():
    kept = TINY / "ours"
    for path in TINY.glob("*") if TINY.exists() else []:
        if path.is_dir() and path != kept:
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()
    TINY.mkdir(exist_ok=True)
    tokens, _, special = vocabulary()
    vocab = len(tokens) + len(special)
    cases = mixed(vocab)
    base, more = rope(vocab)
    cases |= more
    base, trained = adapters(base)
    result = {"models": cases, "adapters": trained, "invocation": INVOCATION, "ours": ours(base)}
    (TINY / "expected.json").write_text(json.dumps(result) + "\n")


# ---------------------------------------------------------------- other architectures


# What Qwen 3's template is made of: a namespace, messages from the last to the first, methods and
# tests on texts, names that are not there.
TEMPLATE = """\
{%- set ns = namespace(last=messages|length - 1, found=false) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if not ns.found and message.role == 'user' and message.content is string %}
        {%- set ns.found = true %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- if tools %}
    {{- 'tools' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' and not message.tool_calls %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
    {%- else %}
        {%- set content = message.content %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""


GEMMA_TEMPLATE = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set before = messages[0]['content'] + '\\n\\n' -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set before = '' -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('user and model take turns') }}
    {%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (before if loop.first else '') }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\\n' }}
{%- endif -%}"""


def answers(tokenizer, template, more, **special):
    """What the tokenizer and its template make of texts and chats."""
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    render = lambda chat, ask: wrapped.apply_chat_template(
        chat, chat_template=template, tokenize=False, add_generation_prompt=ask
    )
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
    return {
        "tokenizer": [{"text": text, "tokens": encode(text)} for text in corpus() + more],
        "chats": [
            {"messages": chat, "asking": render(chat, True), "told": render(chat, False)}
            for chat in chats()
        ],
    }


class Qwen:
    """The tokenizer of Qwen 2 to 3 with few merges, each of which a wrong cut would show."""

    def __init__(self):
        from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

        more = [("1", "2"), ("Ã", "©"), ("Ġ", "Ġ"), ("Ċ", "Ċ"), ("'", "s"), ("!", "Ċ"), ("Ġ", "1")]
        self.words, self.merges, self.special = vocabulary(more)
        every = self.words + self.special
        self.size = len(every)
        self.tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(every)}, self.merges))
        self.tokenizer.normalizer = normalizers.NFC()
        self.tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        self.tokenizer.decoder = decoders.ByteLevel()
        self.tokenizer.add_special_tokens(self.special)

    def save(self, folder):
        self.tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
        config = {"eos_token": "<|im_end|>", "chat_template": TEMPLATE}
        (folder / "tokenizer_config.json").write_text(json.dumps(config) + "\n")

    def write(self, w):
        w.add_tokenizer_model("gpt2")
        w.add_tokenizer_pre("qwen2")
        w.add_token_list(self.words + self.special)
        w.add_token_types([1] * len(self.words) + [3] * len(self.special))
        w.add_token_merges([f"{a} {b}" for a, b in self.merges])
        w.add_eos_token_id(len(self.words) + 2)
        w.add_chat_template(TEMPLATE)

    def answers(self):
        more = ["it's 12 121 1212", "caf\u0065\u0301 é", "a  b   c", "x!\n\n\ny\n\n z", "  \n\n  12"]
        return answers(self.tokenizer, TEMPLATE, more, eos_token="<|im_end|>")


class Gemma:
    """A SentencePiece tokenizer with byte fallback, as the BPE that `transformers` makes of it."""

    def __init__(self):
        self.special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
        self.bytes = [f"<0x{byte:02X}>" for byte in range(256)]
        # Best first.
        self.pieces = ["▁t", "he", "in", "er", "▁a", "on", "ar", "▁the", "ca", "card", "▁card", "car"]
        self.pieces += ["▁▁", "▁▁▁▁", "\n\n", "12", "ing", "'s", "▁1", "▁", "\n"]
        self.pieces += [chr(c) for c in range(33, 127)]
        every = self.special + self.bytes + self.pieces
        self.size = len(every)
        ids = {token: i for i, token in enumerate(every)}
        merges = []
        for piece in self.pieces:
            cuts = [(piece[:at], piece[at:]) for at in range(len(piece) - 1, 0, -1)]
            merges += [(a, b) for a, b in cuts if a in ids and b in ids]
        self.tokenizer = Tokenizer(
            models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
        )
        self.tokenizer.normalizer = normalizers.Replace(" ", "▁")
        self.tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        self.tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        self.tokenizer.add_special_tokens(self.special)

    def save(self, folder):
        self.tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
        config = {"bos_token": "<bos>", "eos_token": "<end_of_turn>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config) + "\n")
        (folder / "chat_template.jinja").write_text(GEMMA_TEMPLATE)

    def write(self, w):
        w.add_tokenizer_model("llama")
        w.add_tokenizer_pre("default")
        w.add_token_list(self.special + self.bytes + self.pieces)
        scores = [0.0] * (len(self.special) + 256) + [-float(i) for i in range(len(self.pieces))]
        w.add_token_scores(scores)
        kinds = [2 if token == "<unk>" else 3 for token in self.special]
        w.add_token_types(kinds + [6] * 256 + [1] * len(self.pieces))
        w.add_bos_token_id(2)
        w.add_eos_token_id(5)
        w.add_unk_token_id(3)
        w.add_add_space_prefix(False)
        w.add_chat_template(GEMMA_TEMPLATE)

    def answers(self):
        more = ["the card's 12", "a    b  c", "thething \n\n\n in", "<start_of_turn>user<end_of_turn>"]
        special = {"bos_token": "<bos>", "eos_token": "<end_of_turn>"}
        return answers(self.tokenizer, GEMMA_TEMPLATE, more, **special)


def qwen2(vocab):
    sizes = shape(32, 8, 4, 2, 64, 2, vocab)
    del sizes["head_dim"]
    return Qwen2ForCausalLM(Qwen2Config(**sizes, rope_theta=1000000.0))


def qwen3(vocab):
    """Heads that are wider together than the model, and a head of its own."""
    sizes = shape(32, 16, 4, 2, 64, 2, vocab) | {"tie_word_embeddings": False}
    return Qwen3ForCausalLM(Qwen3Config(**sizes, rope_theta=1000000.0))


def gemma3(vocab):
    """Six layers of which the last sees all, and another one with a window."""
    sizes = shape(32, 16, 4, 2, 64, 7, vocab)
    return Gemma3ForCausalLM(
        Gemma3TextConfig(**sizes, sliding_window=8, query_pre_attn_scalar=24)
    )


def divide_by_head_size(model):
    """GGUF files do not name what scores are divided by; it is the head size."""
    for layer in model.model.layers:
        layer.self_attn.scaling = model.config.head_dim**-0.5


def family(name, seed, build, words):
    """One model in both formats, what it computes, and an adapter of PEFT's on it."""
    model = randomised(build(words.size), seed, 0 if name == "gemma3" else 1)
    folder = FAMILIES / name
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    words.save(folder)
    path = FAMILIES / f"{name}.gguf"
    write_gguf(path, model, 1000000.0, lambda _: "BF16", (), name, words.write)
    case = case_of(model, seed, 200)
    _, trained = adapters(model, folder, (("lora", None),))
    in_gguf = case
    if name == "gemma3":
        divide_by_head_size(model)
        in_gguf = case_of(model, seed, 200)
    # Not every version of `transformers` reads every GGUF file as llama.cpp does: 5.24 knows neither
    # the head size of a Qwen 3 nor what a Gemma 3 divides its scores by.
    try:
        args = dict(gguf_file=path.name, dtype=torch.float32)
        loaded = AutoModelForCausalLM.from_pretrained(FAMILIES, **args).eval()
        if name == "gemma3":
            divide_by_head_size(loaded)
        off = last_logits(loaded, in_gguf["tokens"]) - torch.tensor(in_gguf["logits"])
        off = float(off.abs().max())
        print(f"{path.name} through the loader of transformers: off by {off:.2g}")
    except Exception as error:
        print(f"{path.name}: transformers cannot read it: {error!r}")
    return {"cases": [in_gguf, case], "trained": trained["lora"], **words.answers()}


def record_families():
    shutil.rmtree(FAMILIES, ignore_errors=True)
    FAMILIES.mkdir()
    words = Qwen()
    result = {
        "qwen2": family("qwen2", 3, qwen2, words),
        "qwen3": family("qwen3", 4, qwen3, words),
        "gemma3": family("gemma3", 5, gemma3, Gemma()),
    }
    (FAMILIES / "expected.json").write_text(json.dumps(result) + "\n")


# ---------------------------------------------------------------- SmolLM2


def corpus():
    return [
        "",
        " ",
        "   ",
        "\n",
        "\n\n\n",
        "\t\tindented\twith tabs\t",
        "hello",
        " hello",
        "hello   world",
        "a" + " " * 40 + "b",
        " " * 17 + "12",
        "trailing spaces    ",
        "1234567890 12.5% -7 3,000,000 0x1F 1e-9",
        "in   2024   there were   365   days",
        "½ x² ٤٥ Ⅷ ①②③",
        "naïve café – “quotes” … ‘single’ — dash",
        "Größe, Übermut, straße, ﬁne ligature",
        "日本語のテキスト、句読点。「かぎ括弧」",
        "한국어 문장입니다. 띄어쓰기도 있어요!",
        "中文字符测试：你好，世界！",
        "Привет, мир! Как дела?",
        "مرحبا بالعالم، كيف الحال؟",
        "שלום עולם",
        "नमस्ते दुनिया, क्या हाल है?",
        "สวัสดีชาวโลก",
        "emoji 😀😃🎉 👩‍👩‍👧‍👦 🇩🇪 👍🏽 ❤️",
        "combining e\u0301 a\u0308 o\u0302; zero\u200bwidth; nb\u00a0space; \u3000ideographic",
        "surrogate-range neighbours \ud7ff \ue000 \uffff \U0001f9ea \U0010ffff",
        "def f(x):\n    if x > 0:\n        return x ** 2\n    return None\n",
        "fn main() { let v: Vec<u32> = (0..10).map(|x| x * x).collect(); println!(\"{v:?}\"); }",
        "for (int i = 0; i < n; ++i) { a[i] += b[i] * 0.5f; }  // comment",
        "SELECT * FROM t WHERE a='x' AND b IS NOT NULL;",
        "<div class=\"a\">&amp; <b>bold</b></div>",
        '{"key": [1, 2.5, null, true], "nested": {"a": "b\\n"}}',
        "https://example.com/path?q=1&r=a%20b#frag user@example.org",
        "C:\\Users\\me\\file.txt ~/bin/run.sh $HOME `cmd`",
        "I'm you're we've they'll he'd it's DON'T I'M",
        "word's words' 'tis ''quoted''",
        "ALLCAPS MixedCase camelCase snake_case kebab-case",
        "a.b.c,d;e:f!g?h(i)j[k]l{m}n",
        "!!!???...---***###@@@",
        "<|im_start|>user\nhi<|im_end|>\n",
        "<|endoftext|><|im_start|> <|im_end|>",
        "text<|im_end|>text",
        "<|im_start",
        "<repo_name>x<file_sep>y<gh_stars>3",
        "\r\nwindows\r\nlines\r\n",
        "mixed \n \n\n  \t \n end",
        "\x00\x01\x7f control",
        "a" * 200,
        "ab " * 60,
        "🎉" * 20,
        "supercalifragilisticexpialidocious antidisestablishmentarianism",
        "x = [[1,2],[3,4]]; y = x[0][1] + x[1][0]",
        "## Heading\n\n- item 1\n- item 2\n\n```py\nprint('hi')\n```\n",
        "[[ ## text ## ]]\nMy card has not arrived yet\n\n[[ ## intent ## ]]\n",
        "Respond with the corresponding output fields, starting with the field `[[ ## intent ## ]]`.",
        "What is the exchange rate for £ to € and ¥?",
        "日本 123 emoji😀code();  \n\tend",
        "ℝ ∀x∈ℕ: ∑ᵢ xᵢ² ≥ 0 → ∞",
    ]


def chats():
    hi = {"role": "user", "content": "hi"}
    return [
        [hi],
        [{"role": "system", "content": "Be brief."}, hi],
        [hi, {"role": "assistant", "content": "Hello!"}, {"role": "user", "content": "  spaces  \n"}],
        [{"role": "system", "content": ""}, {"role": "user", "content": "日本語 😀 <b>&amp;</b> 'q' \"d\""}],
        [{"role": "user", "content": "def f():\n    return {'a': [1, 2]}\n"}],
        [hi, {"role": "assistant", "content": "a"}, hi, {"role": "assistant", "content": "b"}, hi],
    ]


def questions():
    """200 prompts: 20 subjects in 10 sentences."""
    subjects = (
        "photosynthesis|the moon|gravity|bread|the French Revolution|machine learning|coffee|"
        "a lost bank card|an exchange rate|a bicycle|the number 17|Python lists|volcanoes|"
        "a cash withdrawal|jazz|the Roman Empire|vitamin C|recycling|a top up that failed|chess"
    ).split("|")
    sentences = [
        "What is {}?",
        "Explain {} to a child.",
        "Write one sentence about {}.",
        "Give me three facts about {}.",
        "Why do people care about {}?",
        "Write a haiku about {}.",
        "Is {} important? Answer yes or no, then say why.",
        "Translate `I like {}` into French.",
        "List two things that are often confused with {}.",
        "My friend asked: \"{}?!\"  What should I say?",
    ]
    return [sentence.format(subject) for subject in subjects for sentence in sentences]


def load(path):
    path = Path(path)
    args = dict(gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **args).eval()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, **args)
    # The conversion in `transformers` drops the first half of SmolLM2's pre-tokenizer; this is
    # what the model's own tokenizer.json has, and llama.cpp's `smollm`.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    return model, tokenizer


@torch.no_grad()
def greedy(model, tokens, count, ends):
    """The most likely tokens, and the smallest lead that one had over the next best."""
    out, lead, past = [], float("inf"), None
    feed = torch.tensor([tokens])
    for _ in range(count):
        step = model(feed, past_key_values=past, use_cache=True)
        past = step.past_key_values
        best = step.logits[0, -1].topk(2)
        lead = min(lead, float(best.values[0] - best.values[1]))
        out.append(int(best.indices[0]))
        if out[-1] in ends:
            break
        feed = best.indices[:1].reshape(1, 1)
    return out, lead


def record_smollm2(path):
    model, tokenizer = load(path)
    ids = lambda text: tokenizer(text, add_special_tokens=False).input_ids
    template = lambda chat, ask: tokenizer.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=ask
    )
    ends = [tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")]
    answers = []
    for question in questions():
        prompt = ids(template([{"role": "user", "content": question}], True))
        tokens, lead = greedy(model, prompt, 16, ends)
        answers.append({"question": question, "tokens": tokens, "lead": round(lead, 5)})
    logits = []
    for text in [corpus()[28], corpus()[55], " ".join(questions()[:40])]:
        tokens = ids(text)
        last = last_logits(model, tokens)
        top = last.topk(48)
        logits.append(
            {
                "tokens": tokens,
                "top": top.indices.tolist(),
                "logits": digits(top.values.tolist()),
                "log_sum_exp": float(last.logsumexp(0)),
            }
        )
    result = {
        "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest(),
        "tokenizer": [{"text": text, "tokens": ids(text)} for text in corpus()],
        "chats": [
            {"messages": chat, "asking": template(chat, True), "told": template(chat, False)}
            for chat in chats()
        ],
        "logits": logits,
        "greedy": answers,
    }
    text = json.dumps(result, ensure_ascii=True)
    for key in ('{"text"', '{"messages"', '{"question"', '{"tokens"'):
        text = text.replace(key, "\n" + key)
    (HERE / "smollm2.json").write_text(text + "\n")


# ---------------------------------------------------------------- MiniLM


def sentences():
    """20 texts that mean different things: WordPiece's odd cases, and one that is cut."""
    some = corpus()
    return [
        "My card has not arrived yet",
        "Where is the card that I ordered two weeks ago?",
        "Which exchange rate applies when I pay in pounds?",
        "I FORGOT MY PIN!!!",
        "hello",
        "photosynthesis",
        "The quick brown fox jumps over the lazy dog.",
        "a lost bank card, a top up that failed; a cash withdrawal: why?",
        *(some[at] for at in (12, 14, 15, 16, 17, 20, 21, 25, 26, 28)),
        "pneumonoultramicroscopicsilicovolcanoconiosis " + "x" * 120,
        "card payments that were charged twice " * 40,
    ]


def minilm_folder(folder, weights, tokenizer):
    """The two files with what all-MiniLM-L6-v2's repository says of them."""
    sizes = dict(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    BertConfig(**sizes, architectures=["BertModel"]).save_pretrained(folder)
    shutil.copyfile(weights, folder / "model.safetensors")
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
    # Read as the file says, without a class that would put parts of its own in their place.
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def record_minilm(weights, tokenizer):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    home = tempfile.TemporaryDirectory()
    folder = Path(home.name)
    minilm_folder(folder, weights, tokenizer)
    # The crate cuts at 128 tokens, with which the model was trained; its own settings say 256.
    words = Transformer(str(folder), max_seq_length=128)
    pooling = Pooling(words.get_word_embedding_dimension(), pooling_mode="mean")
    model = SentenceTransformer(modules=[words, pooling], device="cpu").eval()
    texts = sentences()
    assert len(texts) == len(set(texts)) == 20, len(set(texts))
    # One by one: padding would round differently.
    vectors = model.encode(texts, batch_size=1, normalize_embeddings=True)
    tokens = [model.tokenizer(t, truncation=True, max_length=128).input_ids for t in texts]
    digest = lambda name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
    rows = [
        {"text": text, "tokens": ids, "vector": digits(vector.tolist())}
        for text, ids, vector in zip(texts, tokens, vectors)
    ]
    result = {
        "weights": digest("model.safetensors"),
        "tokenizer": digest("tokenizer.json"),
        "texts": rows,
    }
    text = json.dumps(result, ensure_ascii=True).replace('{"text"', '\n{"text"')
    (HERE / "minilm.json").write_text(text + "\n")


def print_logits(path, adapter, tokens):
    """One line of JSON: the logits after `tokens`, with the adapter in the folder `adapter`."""
    model, _ = load(path)
    if adapter != "-":
        model = PeftModel.from_pretrained(model, adapter).eval()
    print(json.dumps(last_logits(model, tokens).tolist()))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["tiny"]:
            record_tiny()
        case ["families"]:
            record_families()
        case ["smollm2", path]:
            record_smollm2(path)
        case ["minilm", weights, tokenizer]:
            record_minilm(weights, tokenizer)
        case ["logits", path, adapter, *tokens]:
            print_logits(path, adapter, [int(token) for token in tokens])
        case _:
            sys.exit(__doc__)
