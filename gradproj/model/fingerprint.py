"""Hash everything of the model that a row depends on: weights, config, adapter, tokenizer."""

import hashlib
import json
from typing import Any

import torch

from gradproj.corpus.tokenization import Tokenization
from gradproj.errors import ConfigError, settings_mismatch
from gradproj.model.chat import chat_template
from gradproj.model.checkpoint import ModelFiles
from gradproj.model.document_tokens import DocumentRules
from gradproj.model.loading import load_model, load_model_config


def model_identity(files: ModelFiles, tokenizer: Any) -> dict[str, str]:
    """Return the fingerprints that identify a model, by the flags that chose it."""
    return {
        "--model (weights)": weights_fingerprint(files),
        "--model (config)": config_fingerprint(load_model_config(files)),
        "--model (adapter)": adapter_fingerprint(files),
        "--tokenizer": tokenizer_fingerprint(tokenizer),
    }


def weights_fingerprint(files: ModelFiles) -> str:
    """Hash the checkpoint's weight files, or the values of random weights."""
    digest = hashlib.sha256()
    if files.config.init == "random":
        for name, tensor in sorted(load_model(files, torch.device("cpu")).state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()[:32]
    for path in files.weights:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]


def adapter_fingerprint(files: ModelFiles) -> str:
    """Hash a PEFT adapter's settings and a checkpoint's own code; empty if there is neither."""
    if files.model_dir is None:
        return ""
    content: list[object] = []
    if files.base_dir is not None:
        settings = json.loads((files.model_dir / "adapter_config.json").read_text("utf-8"))
        for key in ("base_model_name_or_path", "inference_mode", "peft_version", "revision"):
            settings.pop(key, None)
        content.append(settings)
    if files.config.trust_remote_code:
        content += [
            [path.name, path.read_text("utf-8")] for path in sorted(files.model_dir.glob("*.py"))
        ]
    return _hash(content) if content else ""


def config_fingerprint(model_config: Any) -> str:
    """Hash the config's entries that affect the computation, so without paths and versions."""
    content = model_config.to_dict()
    for key in ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures"):
        content.pop(key, None)
    return _hash(content)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash how the tokenizer splits text and which special tokens it adds."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        # These two are set by calls, not by the tokenizer's files.
        content.pop("padding", None)
        content.pop("truncation", None)
    else:
        settings = {
            k: v for k, v in tokenizer.init_kwargs.items() if "file" not in k and "path" not in k
        }
        content = [tokenizer.get_vocab(), settings]
    return _hash([content, tokenizer.special_tokens_map])


def tokenization_of(
    tokenizer: Any, special_tokens: str, rules: DocumentRules, name: str = ""
) -> Tokenization:
    """Return what the token ids of documents depend on."""
    template = chat_template(tokenizer, rules.chat_template)
    return Tokenization(
        tokenizer=tokenizer_fingerprint(tokenizer),
        special_tokens=special_tokens,
        loss_on=rules.loss_on,
        chat_template="" if template is None else _hash(template),
        name=name,
    )


def check_corpus_tokenizer(
    corpus: Tokenization | None,
    tokenizer: Any,
    rules: DocumentRules | None = None,
    special_tokens: str | None = None,
    flag: str = "--shards",
) -> None:
    """Compare a run's tokenizer and rules with those of a corpus that was tokenized ahead.

    Args:
        corpus: None fits every run.
        tokenizer: the run's.
        rules: the run's; None for a run that has none.
        special_tokens: the run's; None does not compare them.
        flag: names the corpus in the message.

    Raises:
        ConfigError: they differ; lists the differences.
    """
    if corpus is None:
        return
    ours = tokenization_of(tokenizer, special_tokens or "", rules or DocumentRules()).settings()
    if special_tokens is None:
        del ours["--special_tokens"]
    if rules is None:
        del ours["--loss_on"]
    if rules is None or not corpus.chat_template:  # without a template it has no conversation
        del ours["--chat_template"]
    mismatch = settings_mismatch(
        f"{flag}: this corpus was tokenized ahead, by {corpus.name}, and not as this run does it",
        corpus.settings(),
        ours,
        "Give the tokenizer and the rules of the corpus, or prepare it again with those of the run",
        labels=("corpus", "this run"),
    )
    if mismatch:
        raise ConfigError(mismatch)


def _hash(content: object) -> str:
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
