"""What the benchmark of efficiency counts and computes; nothing here looks at how long anything took."""

import json
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from benched import programs, tiny_pair
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from tiny import tiny_config
from transformers import LlamaForCausalLM

#: Stands for llama_cpp in the worker: counts what it is asked for, and writes one line of the kind that would break a
#: pipe for answers.
FAKE_LLAMA = """
import json, os, pathlib
from . import llama_cpp
LLAMA_FTYPE_ALL_F32 = 0
__version__ = "0.0"
LOG = pathlib.Path(os.environ["FAKE_LLAMA_LOG"])
class Llama:
    n_batch = 512
    def __init__(self, path, **options):
        extra = llama_cpp.llama_model_default_params().use_extra_bufts
        self.log = {"path": path, "options": options, "extra_buffers": extra, "runs": []}
        os.write(1, b"llama_model_loader: noise\\n")
    def n_vocab(self):
        return 50
    def reset(self):
        self.log["runs"].append({"evaluated": [], "sampled": 0})
    def eval(self, tokens):
        if len(tokens) == 1 and os.environ.get("FAKE_LLAMA_FALLS"):
            os.abort()
        self.log["runs"][-1]["evaluated"].append(list(tokens))
    def sample(self, temp):
        assert temp == 0.0
        self.log["runs"][-1]["sampled"] += 1
        LOG.write_text(json.dumps(self.log))
        return self.log["runs"][-1]["sampled"]
class llama_model_quantize_default_params:
    pass
def llama_model_quantize(source, target, parameters):
    assert (parameters.ftype, parameters.allow_requantize) == (0, True)
    pathlib.Path(target.decode()).write_bytes(b"float32 of " + source)
    return int(b"broken" in source)
"""
FAKE_BINDINGS = """
class llama_model_default_params:
    use_extra_bufts = None
"""


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    yield from programs("bandwidth", "batch_rows", "efficiency", "peers", "workloads")


@pytest.fixture(scope="module")
def pair(bench: SimpleNamespace) -> Any:
    return tiny_pair(bench.workloads)


@pytest.fixture
def llama(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where the stand-in for llama.cpp says what it was asked for."""
    package = tmp_path / "fake" / "llama_cpp"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(FAKE_LLAMA)
    (package / "llama_cpp.py").write_text(FAKE_BINDINGS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
    monkeypatch.setenv("FAKE_LLAMA_LOG", str(tmp_path / "log.json"))
    return tmp_path / "log.json"


def greedily(model: Any, ids: list[int], tokens: int, banned: list[int]) -> list[int]:
    """What a model writes, by one whole forward pass per token."""
    ids = list(ids)
    for _ in range(tokens):
        logits = model(torch.tensor([ids])).logits[0, -1]
        logits[banned] = -torch.inf
        ids.append(int(logits.argmax()))
    return ids


@pytest.mark.parametrize("tied", [True, False])
def test_bytes_of_a_pass_by_hand(bench: SimpleNamespace, tied: bool) -> None:
    config = tiny_config("llama", tie_word_embeddings=tied)
    # Per layer: queries and outputs of 4 heads, keys and values of 2, of size 8; three matrices of the MLP; two norms.
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32
    head = 64 * 32
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        model = LlamaForCausalLM(config).to(dtype)
        assert bench.bandwidth.weight_bytes(model) == size * (2 * layer + 32 + head)


@pytest.mark.parametrize("tied", [True, False])
def test_bytes_of_a_quantised_file_by_hand(bench: SimpleNamespace, tmp_path: Path, tied: bool) -> None:
    writer = GGUFWriter(tmp_path / "model.gguf", "llama")
    embedding = np.ones((6, 64), dtype=np.float32)
    q8, q4 = GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_1
    writer.add_tensor("token_embd.weight", quantize(embedding, q8), raw_dtype=q8)
    writer.add_tensor("blk.0.ffn_up.weight", quantize(np.ones((3, 32), dtype=np.float32), q4), raw_dtype=q4)
    writer.add_tensor("output_norm.weight", np.ones(64, dtype=np.float32))
    if not tied:
        writer.add_tensor("output.weight", embedding)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    # Blocks of 32: a half and 32 bytes; two halves and 16 bytes. The rows of an untied embedding are looked up.
    sizes = {"Q4_1": 3 * (2 + 2 + 16), "F32": 64 * 4}
    sizes |= {"Q8_0": 6 * 2 * (2 + 32)} if tied else {"F32": 64 * 4 + 6 * 64 * 4}
    assert bench.bandwidth.gguf_weight_bytes(tmp_path / "model.gguf") == sizes
    with pytest.raises(ValueError, match="`path`"):
        bench.bandwidth.gguf_weight_bytes(tmp_path / "other.gguf")


def test_every_reading_reads_every_row(bench: SimpleNamespace) -> None:
    assert bench.bandwidth.new_buffer(1).shape[0] == 1
    buffer = bench.bandwidth.new_buffer(4 * 1024 * 5 - 3)
    assert buffer.numel() * buffer.element_size() == 4 * 1024 * 5
    ways = bench.bandwidth.readings(buffer)
    before = {name: read().item() for name, read in ways.items()}
    for row, column in ((0, 0), (2, 500), (4, 1023)):
        buffer[row, column] += 1
        after = {name: read().item() for name, read in ways.items()}
        assert all(after[name] != before[name] for name in ways)
        before = after
    read, seconds = bench.bandwidth.fastest_reading(5000, repeats=1)
    assert read().item() in {
        each().item() for each in bench.bandwidth.readings(bench.bandwidth.new_buffer(5000)).values()
    }
    assert set(seconds) == set(ways)
    with pytest.raises(ValueError, match="`size`"):
        bench.bandwidth.new_buffer(0)


@pytest.mark.parametrize("paths", [2, 3, 11])
def test_rows_write_what_each_path_writes_alone(bench: SimpleNamespace, pair: Any, paths: int) -> None:
    prompt = 380
    ids = pair.prompt(prompt, paths)
    limit, made = bench.workloads.tokens_of_paths(paths, 4)
    output = pair.run_ours(ids, made + 8, max_path_tokens=limit)
    text = bench.batch_rows.BlockText.read(output, prompt)
    with bench.peers.counted_passes(pair.stock.model) as passes:
        whole = bench.batch_rows.run_batch_rows(pair, text)
    new = [text.written, text.end - text.conclusion]
    assert whole.shape == output.sequences.shape
    known = ~output.sampled[0]
    for start, _ in text.paths:
        # Nothing is known of a path but what the engine forces, and a longer label is decoded.
        assert known[start : start + text.header].all()
        known[start + text.header : start + text.header + text.written] = False
    assert torch.equal(whole[0, known], output.sequences[0, known])
    written, banned = whole[0].tolist(), pair.never_ending()["suppress_tokens"]
    # The goal's end, a separator, and the header.
    prefix = [*ids[0].tolist(), written[prompt]]
    for start, _ in text.paths:
        header = written[start : start + text.header]
        alone = greedily(pair.stock, [*prefix, *header], text.written, banned)
        assert alone == [*prefix, *written[start : start + text.header + text.written]]
    assert greedily(pair.stock, written[: text.conclusion], new[1], banned) == written[: text.end]
    # The prompt, all headers at once and then a token of every row, the join and then a token.
    assert len(passes) == 1 + new[0] + new[1]
    header = paths * text.header
    assert passes[:2] == [prompt, header + paths]
    assert passes[1 + new[0]] == text.conclusion - prompt


def test_only_one_block_of_even_paths_makes_rows(bench: SimpleNamespace, pair: Any) -> None:
    plain = pair.run_ours(pair.prompt(50), 4)
    with pytest.raises(ValueError, match="one block"):
        bench.batch_rows.BlockText.read(plain, 50)
    limit, made = bench.workloads.tokens_of_paths(2, 4)
    output = pair.run_ours(pair.prompt(100, 2), made + 8, max_path_tokens=limit)
    output.reports[0].blocks[0].paths[0].end -= 1
    with pytest.raises(ValueError, match="one length"):
        bench.batch_rows.BlockText.read(output, 100)


@pytest.mark.parametrize("paths", [1, 2, 5])
def test_all_ways_make_the_same_tokens_in_the_passes_that_they_need(
    bench: SimpleNamespace, pair: Any, paths: int
) -> None:
    work = bench.peers.Work(250, paths, 6, 5)
    ways, ids = bench.peers.own_ways(pair, work, {"float64": 8})
    assert ids.shape == (1, 250)
    assert len({way.tokens for way in ways.values()}) == 1
    (tokens,) = {way.tokens for way in ways.values()}
    with bench.peers.counted_passes(pair.stock.model) as passes:
        ways["stock"].run()
    assert len(passes) == ways["stock"].passes == tokens
    for name in ("parallel", "sequential"):
        with bench.peers.counted_passes(pair.ours.model) as passes:
            sequences = ways[name].run()
        assert sequences.shape == (1, 250 + tokens)
        assert len(passes) == ways[name].passes
    if paths == 1:
        assert {name: way.passes for name, way in ways.items()} == dict.fromkeys(
            ("parallel", "sequential", "stock"), tokens
        )
    else:
        # Path and conclusion one after another, or path after path; the prompt has a pass in which nothing is sampled.
        report = pair.run_ours(ids, tokens, max_path_tokens=bench.workloads.tokens_of_paths(paths, 6)[0]).reports[0]
        sampled = tokens - report.forced_tokens
        assert ways["sequential"].passes == 1 + sampled
        conclusion = ways["parallel"].passes - 1 - (sampled - (ways["parallel"].passes - 1)) // (paths - 1)
        assert ways["parallel"].passes - 1 - conclusion == (sampled - conclusion) / paths
        assert ways["batch rows"].passes == ways["parallel"].passes


def test_ways_that_make_other_numbers_of_tokens_are_not_compared(
    bench: SimpleNamespace, pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorter = bench.peers.run_batch_rows
    monkeypatch.setattr(bench.peers, "run_batch_rows", lambda *args: shorter(*args)[:, :-1])
    with pytest.raises(RuntimeError, match="batch rows made"):
        bench.peers.own_ways(pair, bench.peers.Work(200, 2, 3, 3), {"float64": 8})


def test_the_worker_makes_one_token_a_pass(bench: SimpleNamespace, llama: Path) -> None:
    peer = bench.peers.LlamaPeer(sys.executable, "model.gguf", threads=2, context=99)
    try:
        way = peer.way([1, 60, *[3] * 600], 4, {"Q4_1": 7, "F32": 2})
        assert (way.tokens, way.passes, way.bytes_per_pass) == (4, 2 + 3, 9)
        assert way.inside == []
        way.run()
        way.run()
        assert len(way.inside) == 2
        assert peer.version == "0.0"
    finally:
        peer.close()
    log = json.loads(llama.read_text())
    assert log["path"] == "model.gguf"
    assert log["options"] == {
        "n_ctx": 99, "n_threads": 2, "n_threads_batch": 2, "n_gpu_layers": 0, "verbose": False,
    }  # fmt: skip
    assert log["extra_buffers"] is True
    for run in log["runs"]:
        # An id that it does not know is its last one.
        assert run["evaluated"] == [[1, 49, *[3] * 600], [1], [2], [3]]
        assert run["sampled"] == 4


def test_a_llama_that_falls_over_says_what_may_help(
    bench: SimpleNamespace, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = bench.peers.LlamaPeer(sys.executable, "model.gguf", threads=1, extra_buffers=False)
    peer.run([1, 2], 1)
    peer.close()
    assert json.loads(llama.read_text())["extra_buffers"] is False
    monkeypatch.setenv("FAKE_LLAMA_FALLS", "1")
    peer = bench.peers.LlamaPeer(sys.executable, "model.gguf", threads=1)
    with pytest.raises(RuntimeError, match=r"with -6;.*--no-llama-extra-buffers"):
        peer.run([1, 2], 2)


def test_a_python_without_llama_is_named(bench: SimpleNamespace, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "fake" / "llama_cpp" / "__init__.py").write_text("raise ImportError('no llama.cpp here')")
    with pytest.raises(ValueError, match=r"`python`.*Install llama-cpp-python"):
        bench.peers.LlamaPeer(sys.executable, "model.gguf", threads=1)
    with pytest.raises(ValueError, match=r"`python`.*does not run"):
        bench.peers.LlamaPeer(tmp_path / "missing", "model.gguf", threads=1)


def test_the_float32_copy_is_written_once_and_whole(bench: SimpleNamespace, llama: Path, tmp_path: Path) -> None:
    copy = bench.peers.float32_copy(sys.executable, Path("model.gguf"), tmp_path / "cache")
    assert copy.read_bytes() == b"float32 of model.gguf"
    copy.write_bytes(b"kept")
    assert bench.peers.float32_copy(sys.executable, Path("model.gguf"), tmp_path / "cache").read_bytes() == b"kept"
    with pytest.raises(ValueError, match=r"could not write broken\.gguf as float32"):
        bench.peers.float32_copy(sys.executable, Path("broken.gguf"), tmp_path / "cache")
    assert not (tmp_path / "cache" / "broken.float32.gguf").exists()


def test_efficiency_gives_every_way_against_its_floor(
    bench: SimpleNamespace, pair: Any, llama: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    efficiency = bench.efficiency
    monkeypatch.setattr(efficiency.Pair, "load", classmethod(lambda cls, dtype: pair))
    monkeypatch.setattr(efficiency, "load_of_others", lambda: 0.0)
    monkeypatch.setattr(efficiency, "gguf_weight_bytes", lambda path: {"Q4_1": 5000, "F32": 120})
    arguments: dict[str, Any] = {
        "repeats": 3, "paths": "1,3", "prompt": 250, "path_tokens": 3, "conclusion_tokens": 2, "dtype": "float64",
        "llama_cpp_python": Path(sys.executable), "llama_threads": 1, "llama_float32": False, "output": tmp_path,
    }  # fmt: skip
    monkeypatch.setattr(efficiency, "gguf_file", lambda: Path("model.gguf"))
    peers: list[Any] = []

    def started(*args: Any, **options: Any) -> Any:
        peers.append(bench.peers.LlamaPeer(*args, **options))
        return peers[-1]

    monkeypatch.setattr(efficiency, "LlamaPeer", started)
    efficiency.main(**arguments)
    rows = json.loads((tmp_path / "efficiency_float64.json").read_text())["rows"]
    assert [row["paths"] for row in rows] == [1, 3]
    both = {"parallel", "sequential", "stock", "llama.cpp Q4_1"}
    assert [set(row["ways"]) for row in rows] == [both, both | {"batch rows"}]
    weights = bench.bandwidth.weight_bytes(pair.ours)
    for row in rows:
        stock = row["ways"]["stock"]["seconds"]
        for name, found in row["ways"].items():
            size = 5120 if "llama" in name else weights
            assert sum(found["weights"].values()) == size
            read = row["seconds_per_pass"][str(size)]
            assert len(found["seconds"]) == len(read) == 3
            floors = [found["passes"] * each for each in read]
            assert found["times_floor"] == pytest.approx(float(np.median(np.divide(found["seconds"], floors))))
            assert found["floor_seconds"] == pytest.approx(float(np.median(floors)))
            assert found["floor_ms_per_token"] == pytest.approx(1000 * float(np.median(floors)) / row["tokens"])
            assert found["tokens_per_second"] * found["latency"] == pytest.approx(row["tokens"])
            assert found["stock_times_slower"] == pytest.approx(float(np.median(np.divide(stock, found["seconds"]))))
    assert ElementTree.parse(tmp_path / "efficiency_float64.svg").getroot() is not None
    (last,) = {run["sampled"] for run in json.loads(llama.read_text())["runs"][-3:]}
    assert last == rows[-1]["tokens"]
    # Timed by itself, without the way there and back.
    assert [peer.seconds for peer in peers] == [rows[-1]["ways"]["llama.cpp Q4_1"]["seconds"]]

    monkeypatch.setattr(efficiency.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="matplotlib"):
        efficiency.main(**arguments)
