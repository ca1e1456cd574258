"""What the benchmarks of efficiency and growth count and compute; nothing here looks at how long anything took."""

import importlib
import json
import math
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from multiverse import MultiverseForCausalLM, add_multiverse_tokens
from multiverse.trainer.expression_trees import TreeOptions, predicted_steps
from multiverse.trainer.synthetic import generate_problems
from tiny import tiny_config, tiny_tokenizer
from transformers import LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("bandwidth", "batch_rows", "efficiency", "growth", "growth_picture", "peers", "workloads")

#: Stands for llama_cpp in the worker: counts what it is asked for, and writes one line of the kind that would break a
#: pipe for answers.
FAKE_LLAMA = """
import json, os, pathlib
LLAMA_FTYPE_ALL_F32 = 0
__version__ = "0.0"
LOG = pathlib.Path(os.environ["FAKE_LLAMA_LOG"])
class Llama:
    n_batch = 512
    def __init__(self, path, **options):
        self.log = {"path": path, "options": options, "runs": []}
        os.write(1, b"llama_model_loader: noise\\n")
    def n_vocab(self):
        return 50
    def reset(self):
        self.log["runs"].append({"evaluated": [], "sampled": 0})
    def eval(self, tokens):
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


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    """The benchmarks, which are programs of the repository and not of the package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        yield SimpleNamespace(**{name: importlib.import_module(f"benchmarks.{name}") for name in NAMES})


@pytest.fixture(scope="module")
def pair(bench: SimpleNamespace) -> Any:
    """The same random weights in both classes, in float64."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    ours = MultiverseForCausalLM(tiny_config("llama", len(tokenizer), **ends)).double().eval()
    add_multiverse_tokens(ours, tokenizer)
    stock = LlamaForCausalLM(tiny_config("llama", ours.config.vocab_size, **ends)).double().eval()
    stock.load_state_dict(ours.state_dict())
    return bench.workloads.Pair(ours, stock, tokenizer)


@pytest.fixture
def llama(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where the stand-in for llama.cpp says what it was asked for."""
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "llama_cpp.py").write_text(FAKE_LLAMA)
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


@settings(deadline=None, derandomize=True, max_examples=50)
@given(
    exponent=st.floats(-2, 3),
    factor=st.floats(1e-3, 1e3),
    sizes=st.lists(st.integers(1, 10_000), min_size=3, max_size=8, unique=True),
)
def test_a_power_law_is_found_again(bench: SimpleNamespace, exponent: float, factor: float, sizes: list[int]) -> None:
    law = bench.growth.fit_power_law(sizes, [factor * size**exponent for size in sizes])
    assert law.exponent == pytest.approx(exponent, abs=1e-6)
    assert law.factor == pytest.approx(factor, rel=1e-4)
    assert law.standard_error == pytest.approx(0, abs=1e-5)


def test_the_standard_error_by_hand(bench: SimpleNamespace) -> None:
    # Logarithms to base e of 1, e, e^2, e^3 against 0, 2, 1, 3: slope 4/5, residuals -0.3, 0.9, -0.9, 0.3.
    law = bench.growth.fit_power_law([math.e**x for x in range(4)], [math.e**y for y in (0, 2, 1, 3)])
    assert law.exponent == pytest.approx(0.8)
    assert law.factor == pytest.approx(math.e**0.3)
    assert law.standard_error == pytest.approx(math.sqrt((0.3**2 + 0.9**2 + 0.9**2 + 0.3**2) / 2 / 5))


def test_what_has_no_power_law_is_refused(bench: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="three points"):
        bench.growth.fit_power_law([1, 2], [1, 2])
    with pytest.raises(ValueError, match="three points"):
        bench.growth.fit_power_law([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="positive"):
        bench.growth.fit_power_law([1, 2, 3], [1, 0, 2])


def test_medians_of_the_rounds_are_fitted_and_the_largest_points_by_themselves(bench: SimpleNamespace) -> None:
    axis = bench.growth.Axis("a", "sizes", [1, 2, 4, 8, 16], None, {"cost": (0, 1, "so")})
    # Constant at first and linear later, with one wild round in three.
    curve = {1: 4.0, 2: 4.0, 4: 4.0, 8: 8.0, 16: 16.0}
    rounds = [{size: {"cost": (10 * size, times * cost)} for size, cost in curve.items()} for times in (1.0, 9.0, 0.5)]
    row = bench.growth.summarise(axis, rounds)
    found = row["series"]["cost"]
    assert (row["sizes"], found["sizes"]) == ([1, 2, 4, 8, 16], [10, 20, 40, 80, 160])
    assert found["medians"] == list(curve.values())
    assert found["values"][3] == [8.0, 72.0, 4.0]
    assert found["fit_of_largest"]["exponent"] == pytest.approx(1)
    assert 0.3 < found["fit"]["exponent"] < 0.7
    short = bench.growth.summarise(axis, [{size: costs for size, costs in rounds[0].items() if size < 4}])
    assert short["sizes"] == [1, 2]
    assert "fit" not in short["series"]["cost"]


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
    for run in log["runs"]:
        # An id that it does not know is its last one.
        assert run["evaluated"] == [[1, 49, *[3] * 600], [1], [2], [3]]
        assert run["sampled"] == 4


def test_a_python_without_llama_is_named(bench: SimpleNamespace, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "fake" / "llama_cpp.py").write_text("raise ImportError('no llama.cpp here')")
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


def test_steps_are_taken_while_all_paths_are_live(bench: SimpleNamespace, pair: Any) -> None:
    for paths in (1, 3, 12):
        times, first, last = bench.growth.forked_steps(pair, pair.prompt(400, paths), paths, 5)
        assert last - first == 5
        assert [b - a for a, b in zip(times.slots[first - 1 : last - 1], times.slots[first:last], strict=True)] == [
            paths
        ] * 5
    assert len(times.whole) == len(times.attention) == len(times.slots)
    assert all(0 < inside < whole for inside, whole in zip(times.attention, times.whole, strict=True))
    times = bench.growth.StepTimes([9.0, 4.0, 3.0, 8.0], [9.0, 1.0, 2.5, 2.0], [0] * 4)
    assert times.medians(1, 4) == {"step": 4000.0, "attention": 2000.0, "all else": 3000.0}


def test_the_clock_leaves_the_engine_as_it_was(bench: SimpleNamespace, pair: Any) -> None:
    growth = bench.growth
    before = growth.Engine._step, growth.attention.folded_attention
    with growth.step_clock() as times:
        report = pair.run_ours(pair.prompt(200, 2), 40, max_path_tokens=9).reports[0]
    assert len(times.whole) == report.sequential_steps
    assert times.slots[-1] == report.kv_slots
    with pytest.raises(KeyError), growth.step_clock():
        raise KeyError
    assert (growth.Engine._step, growth.attention.folded_attention) == before


def test_costs_are_set_against_what_they_grow_with(bench: SimpleNamespace, pair: Any) -> None:
    costs = bench.growth.prompt_case(pair, 300, 4, 3)
    goal = pair.tokenizer.encode("<Parallel>\n<Goal>\n" + "".join(
        f"<Outline>\n{number}: look\n</Outline>\n" for number in range(1, 5)) + "</Goal>")  # fmt: skip
    assert costs["prompt"][0] == 300 - len(goal)
    # A separator, four headers of four tokens, and what was sampled before: 2, 3 and 4 tokens a path.
    assert costs["step"][0] == 300 + 1 + 4 * 4 + 4 * 3
    assert set(costs) == {"prompt", "step", "attention", "all else"}
    assert {size for size, _ in bench.growth.branch_case(pair, 3, 300, 3).values()} == {3}
    assert {size for size, _ in bench.growth.batch_case(pair, 2, 3, 300, 3).values()} == {2}
    for depth in (1, 2):
        costs = bench.growth.depth_case(pair, depth)
        options = TreeOptions(depth=(depth, depth), branching=(2, 2), terms=(2, 2))
        (problem,) = generate_problems(1, 0, options)
        assert costs["steps"] == (depth, predicted_steps(problem.parallel(), pair.tokenizer, pair.ours.config))


def test_growth_keeps_what_it_has_and_draws_it(
    bench: SimpleNamespace, pair: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    growth = bench.growth
    monkeypatch.setattr(growth.Pair, "load", classmethod(lambda cls: pair))
    monkeypatch.setattr(growth, "load_of_others", lambda: 0.0)
    arguments: dict[str, Any] = {
        "repeats": 2, "steps": 3, "prompts": "256,512,1024", "branches": "1,2,4", "depths": "1,2,3",
        "batches": "1,2,3", "output": tmp_path,
    }  # fmt: skip
    broken = growth.depth_case

    def fails_at_two(pair: Any, depth: int) -> Any:
        if depth == 2:
            raise RuntimeError("out of memory")
        return broken(pair, depth)

    monkeypatch.setattr(growth, "depth_case", fails_at_two)
    with pytest.raises(RuntimeError, match="out of memory"):
        growth.main(**{**arguments, "prompts": ""})
    kept = json.loads((tmp_path / "growth.json").read_text())["rows"]
    assert [(row["axis"], row["sizes"]) for row in kept] == [("branches", [1, 2, 4]), ("depth", [1])]

    monkeypatch.setattr(growth, "depth_case", broken)
    growth.main(**arguments)
    rows = json.loads((tmp_path / "growth.json").read_text())["rows"]
    assert [row["axis"] for row in rows] == ["prompt", "branches", "depth", "batch"]
    for row in rows:
        assert len(row["sizes"]) == 3
        for found in row["series"].values():
            assert [len(values) for values in found["values"]] == [2, 2, 2]
            law = growth.fit_power_law(found["sizes"], found["medians"])
            assert found["fit"]["exponent"] == pytest.approx(law.exponent)
    assert ElementTree.parse(tmp_path / "growth.svg").getroot() is not None
    drawn = (tmp_path / "growth.svg").read_text()
    for row in rows:
        assert f"<!-- {row['axis']} -->" in drawn

    monkeypatch.setattr(growth.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="matplotlib"):
        growth.main(**arguments)


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

    def started(*args: Any) -> Any:
        peers.append(bench.peers.LlamaPeer(*args))
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
