"""Find out what a classifier of texts takes and returns, and whether its tokenizer fits."""

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from bundle.build.inspect_classifier import check_scores, describe_scores
from bundle.build.inspect_model import BATCH, Found, Report, examine, failure_on, run
from bundle.build.new_model import NewModel
from bundle.build.user_modules import argument_names
from bundle.errors import BundleError
from bundle.paths import relative
from handlers.core.tokens import Argument, Padding, padding_of

LENGTHS = (512, 256, 128, 64, 32, 16)  # tokens of a text, in the order they are tried
SHORTEST = LENGTHS[-1]
TRIED_ENDS = 64  # different tokens that texts end with when they are filled up, to see whether that changes the outputs
ROLES: tuple[Argument, ...] = ("ids", "mask", "types")
IN_WORDS = {"ids": "token ids", "mask": "their mask", "types": "their types"}
NAMED: dict[str, Argument] = {"mask": "mask", "type": "types", "segment": "types"}  # parts of an argument's name
OTHERS = ("padding", "pad_mask", "position", "length", "offset")  # parts of the names of what the handler does not make


def inspect_texts(model: torch.jit.ScriptModule, new: NewModel, names: list[str] | None, report: Report) -> Found:
    """Find the longest text that a classifier takes, whether its tokenizer fits, and its classes.

    Raises:
        BundleError: the tokenizer is invalid, or has more tokens than the model; or the model takes something else
            than token ids, their mask and their types.
    """
    file = new.tokenizer
    assert file is not None, "the options were checked"
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as exc:  # the library raises no class of its own
        raise BundleError(f"{relative(file)} is not a tokenizer of the package tokenizers: {exc}") from exc
    takes = roles_of(model)
    report(f"takes {', '.join(IN_WORDS[each] for each in takes)}; {relative(file)} makes them")
    texts = Texts(model, takes)
    tokens = max(tokenizer.get_vocab().values()) + 1
    given = (tokenizer.truncation or {}).get("max_length")
    length, only = longest_text(texts, given)
    size = length if only else min(SHORTEST, length)
    if failure := failure_on(texts, (torch.full((1, size), tokens - 1), torch.ones(1, size, dtype=torch.int64))):
        raise BundleError(
            f"The model fails on token {tokens - 1}, although {relative(file)} has {tokens} tokens: it is the "
            "tokenizer of another model.",
            failure,
        )
    ids = torch.randint(0, tokens, (BATCH, size), generator=torch.Generator().manual_seed(0))
    outputs = examine(texts, (ids, torch.ones_like(ids)), check_scores, report)
    limit = min(filter(None, (given, length)))
    report(f"{tokens} tokens; texts are cut after {limit} tokens")
    settings: dict[str, tuple[object, str]] = {
        "top_k": (3, ""),
        "arguments": (list(takes), "what the module takes"),
        "max_tokens": (limit, "longer texts are truncated"),
    }
    padding = padding_of(tokenizer)
    if only:
        padded = fixed_padding(padding, length, file.name)
        report(f"runs on texts of {length} tokens only, so each text is filled up to {length} {in_words(padded)}")
        settings |= {"pad_id": (padded.token, "the token that fills up a text"), "pad_to": (length, "tokens")}
        batch_size = Found.batch_size
    else:
        more, batch_size = settle_padding(texts, tokens, limit, padding, report)
        settings |= more
    settings["outputs"] = (describe_scores(outputs, report), "")
    return Found(outputs.shape[1], settings, batch_size=batch_size)


class Texts(nn.Module):
    """A text classifier that takes token ids and their mask; it gives the model what that takes, in its order."""

    def __init__(self, model: nn.Module, takes: Sequence[Argument]):
        super().__init__()
        self.model = model
        self.takes = takes

    def forward(self, ids: Tensor, mask: Tensor) -> object:
        """Classify texts: ids and mask, int64 [N, T]. All tokens have the type 0, that of a first sentence."""
        made = {"ids": ids, "mask": mask, "types": torch.zeros_like(ids)}
        return self.model(*(made[each] for each in self.takes))


def roles_of(model: torch.jit.ScriptModule) -> list[Argument]:
    """Return what each argument of a model is: by its name, or else by its place.

    Raises:
        BundleError: an argument is something that the handler does not make.
    """
    names = argument_names(model)
    named = {name: role for name in names for part, role in NAMED.items() if part in name.lower()}
    unknown = [name for name in names if any(part in name.lower() for part in OTHERS)]
    if unknown or len(names) > len(ROLES) or len(set(named.values())) < len(named):
        raise BundleError(
            f"The model takes {', '.join(names)}. The handler makes token ids, their mask (1 for a token, 0 for "
            "padding) and their types, each int64 [N, T]. Wrap the model in a module that takes these, and script the "
            "module."
        )
    others = (role for role in ROLES if role not in named.values())
    return [named[name] if name in named else next(others) for name in names]


def longest_text(texts: Texts, given: int | None) -> tuple[int, bool]:
    """Return the longest text that the model runs on, in tokens, and whether it runs on no other length.

    Args:
        given: the greatest length of its tokenizer, which is tried beside the usual ones.

    Raises:
        BundleError: it runs on no text, or on some lengths, and not on short ones.
    """
    tried = sorted({*LENGTHS, *([given] if given else [])}, reverse=True)
    ones = {length: torch.ones(1, length, dtype=torch.int64) for length in tried}
    runs = [length for length in tried if failure_on(texts, (ones[length], ones[length])) is None]
    if not runs:
        run(texts, (ones[SHORTEST], ones[SHORTEST]))  # its error is the message
    if tried[-1] not in runs:
        if len(runs) == 1:
            return runs[0], True
        raise BundleError(
            f"The model runs on texts of {runs[0]} tokens, and not on shorter ones: it was traced with this length. "
            "Script it, or trace it so that the length can change."
        )
    return runs[0], False


# --- padding ---------------------------------------------------------------------------------------------------------


def in_words(padding: Padding) -> str:
    return f"with token {padding.token}" + (" on the left" if padding.left else "")


def fixed_padding(padding: Padding, length: int, file: str) -> Padding:
    """Check the padding of a model that takes texts of one length only.

    Raises:
        BundleError: the tokenizer does not say which token fills up a text.
    """
    if padding.token is None:
        raise BundleError(
            f"The model runs on texts of {length} tokens only, and {file} does not say which token fills up shorter "
            f"ones. Call tokenizer.enable_padding(pad_id=..., pad_token=..., length={length}), and save it again."
        )
    return padding


def settle_padding(
    texts: Texts, tokens: int, limit: int, padding: Padding, report: Report
) -> tuple[dict[str, tuple[object, str]], int]:
    """Return the settings of the padding, and the greatest batch in which no text changes another one's answer.

    Args:
        tokens: the number of tokens.
        limit: the longest text, in tokens.
        padding: as the tokenizer declares it.
    """
    token = padding.token or 0
    changes = depends_on_padding(texts, tokens, limit, token, padding.left)
    settings: dict[str, tuple[object, str]] = {}
    if padding.token is not None or not changes:
        settings["pad_id"] = token, "the token that fills up the shorter texts of a batch"
    if padding.least:
        declared = f"the tokenizer fills up each text to {padding.least} tokens"
        if changes:
            report(f"{declared}, and so does the handler, because the model's outputs change with it")
            settings["max_tokens"] = min(limit, padding.least), "longer texts are truncated"
            return settings, Found.batch_size
        report(f"{declared}; the model's outputs are the same without it, so texts are filled up to the longest only")
        settings["pad_to"] = 0, f"not to the tokenizer's {padding.least} tokens: the answers are the same"
    if not changes:
        report(f"shorter texts of a batch are filled up {in_words(Padding(token, left=padding.left))}")
        return settings, Found.batch_size
    report(
        "its outputs for a text change if the text is filled up, so texts run one after the other "
        "(batchSize: 1): a batch of N takes N times as long as one text. Let it use the mask"
        + ("" if padding.token is not None else ", or save the tokenizer with its padding (tokenizer.enable_padding)")
    )
    return settings, 1


def depends_on_padding(texts: Texts, tokens: int, limit: int, padding: int, left: bool) -> bool:
    """Return whether the scores of a text change by more than rounding does, when it is filled up.

    Texts with many different last and first tokens are tried: some models look only at these.
    """
    generator = torch.Generator().manual_seed(0)
    count = min(tokens, TRIED_ENDS)
    length = max(1, min(SHORTEST, limit // 2))
    ids = torch.randint(0, tokens, (count, length), generator=generator)
    ids[:, 0 if left else -1] = torch.randperm(tokens, generator=generator)[:count]
    mask = torch.ones_like(ids)
    missing = min(length, limit - length)
    sides = (missing, 0) if left else (0, missing)
    filled = nn.functional.pad(ids, sides, value=padding), nn.functional.pad(mask, sides)

    def scores(*batch: Tensor) -> Tensor:
        """Return the scores of each text alone, because some modules take no batch."""
        return torch.cat(
            [check_scores(run(texts, tuple(t[i : i + 1] for t in batch)), 1) for i in range(len(batch[0]))]
        )

    return not torch.allclose(scores(*filled), scores(ids, mask), rtol=1e-3, atol=1e-3)
