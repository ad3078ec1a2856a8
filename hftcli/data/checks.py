"""What can be known of data and model before any weights are loaded; `hft data`, a dry run and a round all ask here."""

from transformers import PreTrainedTokenizerBase

from hftcli.errors import DataError, ModelError
from hftcli.runs.records import DataReport


def check_positions(max_length: int, max_positions: int | None) -> None:
    """Raises: DataError: sequences would be longer than the model has positions for."""
    if max_positions is not None and max_length > max_positions:
        raise DataError(
            f"data.max_length is {max_length}, but the model has {max_positions} positions",
            f"set data.max_length to {max_positions} or less",
        )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, num_embeddings: int) -> None:
    """Raises: ModelError: it has no token to pad with, or one that the model has no embedding for."""
    if tokenizer.pad_token is None:
        raise ModelError(
            f"the tokenizer has no end token to stop with, and none to pad with: {tokenizer.name_or_path}",
            "name its eos_token in tokenizer_config.json",
        )
    if tokenizer.pad_token_id >= num_embeddings:
        raise ModelError(
            f"the tokenizer pads with {tokenizer.pad_token} (id {tokenizer.pad_token_id}), and the model has {num_embeddings} "
            "embeddings",
            "name a pad_token in tokenizer_config.json that the model knows, such as its eos_token",
        )


def check_token_ids(report: DataReport, tokenizer: PreTrainedTokenizerBase, num_embeddings: int) -> None:
    """Raises: DataError: prepared data hold a token that the model has no embedding for."""
    if report.max_token_id < num_embeddings:
        return
    [token] = tokenizer.convert_ids_to_tokens([report.max_token_id])
    raise DataError(
        f"{', '.join(source.path for source in report.sources)}: the rows hold the token {token!r} with id "
        f"{report.max_token_id}, and the model has {num_embeddings} embeddings",
        "take the tokenizer that belongs to the model, or give the model an embedding for it (resize_token_embeddings)",
    )
