"""llama.cpp behind a pipe, timed inside: run by a Python that has `llama_cpp`, and imports nothing else.

`python llama_worker.py MODEL.gguf THREADS CONTEXT EXTRA_BUFFERS`, the last 1 or 0, answers each line
`{"ids": [...], "tokens": n}` of its input, which asks for `n` greedy tokens after a prompt, with
`{"seconds": ..., "tokens": n, "passes": ...}`; the first line says that the model is there.
`python llama_worker.py --float32 MODEL.gguf COPY.gguf` writes the same weights as float32.
"""

import json
import os
import sys
import time

import llama_cpp
import llama_cpp.llama_cpp


def answer(model: "llama_cpp.Llama", ids: list[int], tokens: int) -> dict[str, float]:
    """Makes `tokens` tokens one after another, whatever they are, the end of sequence included."""
    start = time.perf_counter()
    model.reset()
    model.eval(ids)
    passes = -(-len(ids) // model.n_batch)
    made = [model.sample(temp=0.0)]
    while len(made) < tokens:
        model.eval(made[-1:])
        passes += 1
        made.append(model.sample(temp=0.0))
    return {"seconds": time.perf_counter() - start, "tokens": len(made), "passes": passes}


def write_float32(source: str, target: str) -> None:
    """Writes a GGUF file anew with all its weights in float32."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = llama_cpp.LLAMA_FTYPE_ALL_F32
    parameters.allow_requantize = True
    parameters.nthread = 1
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), parameters):
        raise RuntimeError(f"llama.cpp could not write {source} as float32.")


def serve(path: str, threads: int, context: int, extra_buffers: int) -> None:
    """Answers until the input ends."""
    defaults = llama_cpp.llama_cpp.llama_model_default_params

    def parameters() -> "llama_cpp.llama_cpp.llama_model_params":
        chosen = defaults()
        chosen.use_extra_bufts = bool(extra_buffers)
        return chosen

    # `Llama` has no argument for it.
    llama_cpp.llama_cpp.llama_model_default_params = parameters
    # llama.cpp prints where it likes; the answers keep a pipe of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    model = llama_cpp.Llama(
        path,
        n_ctx=context,
        n_threads=threads,
        n_threads_batch=threads,
        n_gpu_layers=0,
        verbose=False,
    )
    ready = {"vocabulary": model.n_vocab(), "version": llama_cpp.__version__}
    print(json.dumps(ready), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(model, **json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "--float32":
        write_float32(*sys.argv[2:])
    else:
        serve(sys.argv[1], *map(int, sys.argv[2:]))
