"""``mor generate``: what it writes is what the model says, and a line for each mistake."""

import io
import json
import re
from pathlib import Path

import pytest
import torch

from mor_ext.cli import main
from mor_ext.inference import generate
from mor_ext.inference.prompts import read_prompts
from mor_ext.models import MoRConfig, MoRForCausalLM, from_llama
from mor_ext.training.tokenizer import load_tokenizer, train_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[1]
SIZES = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 96,
    "initializer_range": 0.3,  # large enough that tokens differ in depth
}


@pytest.fixture
def folder(tmp_path: Path, seed: int) -> str:
    model = MoRForCausalLM(MoRConfig(**SIZES, num_recursions=3, routing="expert_choice"))
    return saved(model, tmp_path / "model")


def saved(model: MoRForCausalLM, folder: Path) -> str:
    model.save_pretrained(folder)
    train_tokenizer("byte", [""]).save_pretrained(folder)
    return str(folder)


def lines_of(output: str) -> list[dict]:
    return [json.loads(line) for line in output.splitlines()]


def test_json_lines_hold_what_the_model_says(folder, capsys) -> None:
    prompts = ["Once", "upon a time, there"]
    arguments = ["--prompt", *prompts, "--max-new-tokens", "9", "--temperature", "0", "--jsonl"]
    assert main(["generate", folder, *arguments]) == 0
    lines = lines_of(capsys.readouterr().out)
    model, tokenizer = MoRForCausalLM.from_pretrained(folder), load_tokenizer(folder)
    assert [line["prompt"] for line in lines] == prompts
    for line in lines:
        ids = tokenizer.encode(line["prompt"])
        assert line["prompt_tokens"] == ids and line["finish_reason"] == "length"
        (expected,) = generate(model.eval(), [torch.tensor(ids)], 9, temperature=0)
        assert ids + line["tokens"] == expected.tokens.tolist()
        assert line["depth"] == expected.depth.tolist()[:-1]
        assert line["text"] == tokenizer.decode(line["tokens"], skip_special_tokens=True)
        logits = model(expected.tokens[None]).logits[0, len(ids) - 1 : -1]
        logprobs = logits.log_softmax(-1).gather(1, torch.tensor(line["tokens"])[:, None])
        assert line["logprobs"] == pytest.approx(logprobs.squeeze(1).tolist(), abs=1e-3)


def test_samples_differ_and_a_seed_repeats_them(folder, capsys) -> None:
    arguments = ["--prompt", "ab", "--samples", "3", "--seed", "7", "--jsonl", "--top-k", "40"]
    outputs = []
    for batch in ("3", "1"):
        assert main(["generate", folder, *arguments, "--max-batch", batch]) == 0
        outputs.append([line["tokens"] for line in lines_of(capsys.readouterr().out)])
    assert outputs[0] == outputs[1]
    assert len(set(map(tuple, outputs[0]))) == 3


def test_text_and_statistics(folder, capsys) -> None:
    greedy = ["--temperature", "0", "--max-new-tokens", "5"]
    assert main(["generate", folder, "--prompt", "Once", "--jsonl", *greedy]) == 0
    (line,) = lines_of(capsys.readouterr().out)
    assert main(["generate", folder, "--prompt", "Once", *greedy]) == 0
    out, err = capsys.readouterr()
    assert out == f"Once{line['text']}\n"
    assert re.search(r"^5 tokens in .* tokens/s; first token after", err, re.MULTILINE)
    depth = sum(line["depth"]) / len(line["depth"])
    assert f"mean depth {depth:.2f}: {2 + 2 * depth:.2f} of 8 layers a token" in err
    blocks = int(re.search(r"at most (\d+) of", err)[1])
    assert 0 < blocks <= 8  # of 16 entries: one for each layer and depth, where 8 tokens fit


def test_a_terminal_shows_depths_in_colours(folder, capsys, monkeypatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLORTERM", "truecolor")
    greedy = ["--temperature", "0", "--max-new-tokens", "5", "--prompt", "Once"]
    assert main(["generate", folder, *greedy]) == 0
    out = capsys.readouterr().out
    assert main(["generate", folder, *greedy, "--jsonl"]) == 0
    (line,) = lines_of(capsys.readouterr().out)
    coloured = re.findall(r"\x1b\[([\d;]+)m([^\x1b]+)\x1b\[0m", out)
    legend = {text.strip(): style for style, text in coloured if re.fullmatch(r" \d ", text)}
    assert set(legend) == {"0", "1", "2", "3"}
    shown = [(style, text) for style, text in coloured if not re.fullmatch(r" \d ", text)]
    assert "".join(text for _, text in shown)[:4] == "Once"
    assert [legend[str(depth)] for depth in line["depth"][:4]] == [s for s, _ in shown[:4]]


def test_a_stop_string_ends_and_is_left_out(folder, capsys) -> None:
    base = ["generate", folder, "--prompt", "Once", "--temperature", "0", "--jsonl"]
    assert main([*base, "--max-new-tokens", "30"]) == 0
    (line,) = lines_of(capsys.readouterr().out)
    stop = next(c for c in line["text"] if c.isascii())
    assert main([*base, "--max-new-tokens", "30", "--stop", stop]) == 0
    (stopped,) = lines_of(capsys.readouterr().out)
    assert stopped["text"] == line["text"].split(stop)[0]
    assert stopped["finish_reason"] == "stop"


def test_thresholds_replace_the_saved_ones(folder, capsys) -> None:
    depths = {}
    for name, thresholds in {"deep": ["-1000.0"] * 3, "shallow": ["none", "1e3", "1e3"]}.items():
        arguments = ["--prompt", "Once", "--jsonl", "--thresholds", *thresholds]
        assert main(["generate", folder, *arguments]) == 0
        depths[name] = set(lines_of(capsys.readouterr().out)[0]["depth"])
    assert depths == {"deep": {3}, "shallow": {1}}


def test_prompts_from_files_and_stdin(folder, capsys, tmp_path, monkeypatch) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text("Zwölf\n\n[1, 2]\n", encoding="utf-8")
    assert read_prompts(str(lines)) == ["Zwölf", "[1, 2]"]
    jsonl = tmp_path / "prompts.jsonl"
    jsonl.write_text('{"prompt": "two\\nlines", "id": 1}\n{"prompt": "b"}\n')
    assert read_prompts(str(jsonl)) == ["two\nlines", "b"]
    monkeypatch.setattr("sys.stdin", io.StringIO("from stdin\n"))
    assert main(["generate", folder, "--jsonl", "--max-new-tokens", "2"]) == 0
    assert lines_of(capsys.readouterr().out)[0]["prompt"] == "from stdin"
    jsonl.write_text('{"prompt": "a"}\nb\n')
    with pytest.raises(ValueError, match=r"\"prompt\" in every line.* got 'b' in line 2"):
        read_prompts(str(jsonl))
    for content, message in (("\n", "at least one, got none"), (b"\xff", "UTF-8 file")):
        lines.write_bytes(content.encode() if isinstance(content, str) else content)
        with pytest.raises(ValueError, match=message):
            read_prompts(str(lines))


def test_one_bad_prompt_leaves_the_others(folder, capsys) -> None:
    assert main(["generate", folder, "--prompt", "x" * 90, "good", "--jsonl", "--seed", "1"]) == 0
    out, err = capsys.readouterr()
    bad, good = lines_of(out)
    assert bad["finish_reason"] == "error" and "at most 32 tokens" in bad["error"]
    assert good["error"] is None and good["tokens"]
    assert f"prompt '{'x' * 40}': prompt must have at most 32 tokens" in err


def test_a_converted_llama_generates(seed, tmp_path, capsys) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    llama = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)).eval()
    folder = saved(from_llama(llama), tmp_path / "converted")
    arguments = ["--prompt", "Once", "--temperature", "0", "--max-new-tokens", "8", "--jsonl"]
    assert main(["generate", folder, *arguments]) == 0
    (line,) = lines_of(capsys.readouterr().out)
    ids = torch.tensor([line["prompt_tokens"]])
    expected = llama.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert line["prompt_tokens"] + line["tokens"] == expected[0].tolist()
    assert set(line["depth"]) == {1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "prompts must be such that one can be continued, got 1"),
        (["--prompt", "a", "--top-p", "2"], r"top_p must be in \(0, 1\], got 2.0"),
        (["--prompt", "a", "--samples", "0"], "--samples must be at least 1, got 0"),
        (["--prompt", "a", "--thresholds", "1"], "thresholds must be 3 finite numbers"),
        (["--file", "nowhere.txt"], "prompts must be in a UTF-8 file, got nowhere.txt"),
    ],
)
def test_mistakes_are_a_line(folder, arguments, message, capsys) -> None:
    assert main(["generate", folder, *arguments]) == 2
    assert re.search(f"mor generate: {message}", capsys.readouterr().err)


def test_other_models_are_refused(tmp_path, capsys) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = saved(LlamaForCausalLM(LlamaConfig(**SIZES)), tmp_path / "llama")
    assert main(["generate", folder, "--prompt", "a"]) == 2
    assert "must be one of mor_ext (see mor_ext.models.from_llama)" in capsys.readouterr().err


def test_docs_example_runs(tmp_path, monkeypatch, capsys) -> None:
    page = (ROOT / "docs" / "inference.md").read_text("utf-8")
    (snippet,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "docs/inference.md", "exec"), {})
    assert capsys.readouterr().out.strip()
