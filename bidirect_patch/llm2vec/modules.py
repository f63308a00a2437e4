"""The two modules of a SentenceTransformer that encodes as LLM2Vec does. This module needs sentence-transformers 5.4 or newer."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from sentence_transformers.base.modules.input_module import InputModule
from sentence_transformers.base.modules.module import Module
from transformers import AutoTokenizer

from ..checkpoints.guard import opening_sinks
from ..checkpoints.marks import saved_sinks, was_marked
from ..errors import ConfigError
from ..patch import enable_bidirectional
from .decoder import load_decoder
from .encoder_settings import FILE_NAME, EncoderSettings, check_settings
from .reading import TextFormat, check_tokenizer, read, split_inputs


class LLM2VecTransformer(InputModule):
    """A decoder and its tokenizer, which reads instructions and texts as LLM2Vec does.

    Args:
        model: The decoder, without a head.
        tokenizer: Its tokenizer; from now on it pads on the left, with its end token.
        **settings: The fields of EncoderSettings.
    """

    config_file_name = FILE_NAME
    save_in_root = True

    def __init__(self, model: Any, tokenizer: Any, **settings: Any) -> None:
        super().__init__()
        check_settings(settings, "")
        self.settings = EncoderSettings(**settings)
        self.format = TextFormat.of(
            self.settings.model_name, getattr(model.config, "model_type", ""), self.settings.pooling_mode
        )
        check_tokenizer(tokenizer, self.format, self.settings.pooling_mode)
        self.model = model
        self.tokenizer = tokenizer

    @property
    def max_seq_length(self) -> int:
        """Tokens of an instruction and its text together."""
        return self.settings.max_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        check_settings({"max_length": value}, "")
        self.settings = EncoderSettings(**{**vars(self.settings), "max_length": value})

    def get_embedding_dimension(self) -> int:
        """The width of a token embedding."""
        width: int = self.model.config.hidden_size
        return width

    def preprocess(
        self, inputs: Sequence[Any], prompt: str | None = None, *, task: Any = None, max_length: int | None = None
    ) -> dict[str, torch.Tensor]:
        """Tokenize texts.

        Args:
            inputs: Texts, or pairs of an instruction and a text.
            prompt: The instruction of every text.
            task: Not used.
            max_length: Tokens of an instruction and its text together, in this call.

        Returns:
            What `reading.read` returns.

        Raises:
            ConfigError: An input is neither a text nor such a pair.
        """
        texts, instructions = split_inputs(inputs, prompt)
        settings = self.settings
        if max_length is not None:
            check_settings({"max_length": max_length}, "")
            settings = EncoderSettings(**{**vars(settings), "max_length": max_length})
        return read(self.tokenizer, self.format, settings, texts, instructions)

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Add `token_embeddings` to the features, of shape (texts, length, width)."""
        output = self.model(input_ids=features["input_ids"], attention_mask=features["attention_mask"], return_dict=True)
        features["token_embeddings"] = output.last_hidden_state
        return features

    def get_config_dict(self) -> dict[str, Any]:
        """The settings, as LLM2Vec writes them."""
        return self.settings.to_file()

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Write the model, the tokenizer and the settings to a folder."""
        self.model.save_pretrained(output_path, safe_serialization=safe_serialization)
        if self.tokenizer.is_fast:
            self.tokenizer.backend_tokenizer.no_truncation()  # the last batch left its length there
        self.tokenizer.save_pretrained(output_path)
        self.save_config(output_path)

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **options: Any) -> "LLM2VecTransformer":
        """Open what `save` wrote; bidirectional if it was so when it was saved."""
        places = ("token", "revision", "local_files_only")
        settings = cls.load_config(
            model_name_or_path,
            subfolder=subfolder,
            cache_folder=options.get("cache_folder"),
            **{name: options[name] for name in places if name in options},
        )
        hub = {name: options[name] for name in (*places, "trust_remote_code") if options.get(name)}
        hub |= {"subfolder": subfolder} if subfolder else {}
        hub |= {"cache_dir": options["cache_folder"]} if options.get("cache_folder") else {}
        model_kwargs = {**hub, **(options.get("config_kwargs") or {}), **(options.get("model_kwargs") or {})}
        with opening_sinks():
            model = load_decoder(model_name_or_path, "auto", **model_kwargs)
        if was_marked(model):
            enable_bidirectional(model, **saved_sinks(model)._asdict())
        given = options.get("processor_kwargs") or options.get("tokenizer_kwargs") or {}
        tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, **{**hub, **given})
        return cls(model, tokenizer, **settings)


class LLM2VecPooling(Module):
    """One embedding of a text's token embeddings, pooled as LLM2Vec does, in float32.

    Args:
        embedding_dimension: The width of a token embedding, and of the result.
        pooling_mode: "mean"; "weighted_mean", in which the n-th of the pooled tokens has weight n; "eos_token" and "last_token",
            the row's last token; "bos_token", the row's first beginning token.
        bos_token_id: The beginning token's id.
    """

    config_keys = ["embedding_dimension", "pooling_mode", "bos_token_id"]

    def __init__(self, embedding_dimension: int, pooling_mode: str, bos_token_id: int | None = None) -> None:
        super().__init__()
        check_settings({"pooling_mode": pooling_mode}, "")
        self.embedding_dimension = embedding_dimension
        self.pooling_mode = pooling_mode
        self.bos_token_id = bos_token_id

    def get_embedding_dimension(self) -> int:
        """The width of an embedding."""
        return self.embedding_dimension

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Add `sentence_embedding` to the features, float32 of shape (texts, width).

        Raises:
            ConfigError: The beginning token is to be pooled and a row has none.
        """
        hidden = features["token_embeddings"].float()
        if self.pooling_mode in ("eos_token", "last_token"):
            features["sentence_embedding"] = hidden[:, -1]
            return features
        if self.pooling_mode == "bos_token":
            weights = self._first_bos(features["input_ids"])
        elif self.pooling_mode == "weighted_mean":
            weights = features["pooling_mask"].cumsum(1) * features["pooling_mask"]
        else:
            pooled = features["pooling_mask"]
            weights = torch.where(pooled.any(1, keepdim=True), pooled, features["attention_mask"])  # an empty text
        weights = weights.to(hidden.dtype)
        weights = weights / weights.sum(1, keepdim=True).clamp(min=1)
        features["sentence_embedding"] = (weights.unsqueeze(1) @ hidden).squeeze(1)
        return features

    def _first_bos(self, ids: torch.Tensor) -> torch.Tensor:
        is_bos = ids.eq(-1 if self.bos_token_id is None else self.bos_token_id)
        if not bool(is_bos.any(1).all()):
            raise ConfigError("pooling_mode='bos_token' and a text without a beginning token: truncate on the right")
        return is_bos & (is_bos.cumsum(1) == 1)

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Write the settings to a folder."""
        os.makedirs(output_path, exist_ok=True)
        self.save_config(output_path)
