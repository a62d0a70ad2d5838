"""Flags that choose who writes texts: a model in this process, or an OpenAI-compatible endpoint."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmrec.errors import RecipeError

if TYPE_CHECKING:
    from llmrec.llm.generating import Generator


def add_model_arguments(parser: ArgumentParser) -> None:
    """Flags of the model, of the endpoint and of decoding; the verb has --batch and --seed."""
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", metavar="NAME", help="local folder, name of `llmrec pull` or hub id; or see --endpoint"
    )
    model.add_argument("--revision", metavar="REV", help="commit, tag or branch of the hub")
    model.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="default: auto")
    model.add_argument("--quantize", choices=("4bit", "8bit"), help="smaller weights, by bitsandbytes")
    model.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (default: 256)")
    model.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    model.add_argument("--max-prompt-tokens", type=int, metavar="N", help="longest prompt (default: the model's own)")
    server = parser.add_argument_group("endpoint")
    server.add_argument("--endpoint", metavar="URL", help="OpenAI-compatible server, which knows --model")
    server.add_argument("--api-key-env", metavar="NAME", help="environment variable that holds the key")
    server.add_argument("--concurrency", type=int, default=8, metavar="N", help="requests at a time (default: 8)")
    server.add_argument("--requests-per-minute", type=int, metavar="N", help="the server's limit")
    server.add_argument("--tokens-per-minute", type=int, metavar="N", help="the server's limit")
    server.add_argument("--timeout", type=float, default=120.0, metavar="S", help="seconds without a byte (120)")
    server.add_argument("--retries", type=int, default=5, metavar="N", help="attempts after the first (default: 5)")
    server.add_argument(
        "--prefill", action="store_true", help="send the opening as the answer's beginning (vLLM) instead of asking"
    )
    server.add_argument("--price-in", type=float, metavar="P", help="price of a million tokens read")
    server.add_argument("--price-out", type=float, metavar="P", help="price of a million tokens written")


def check_model_flags(args: Namespace) -> None:
    """Refuse flags that cannot be meant together.

    Raises:
        RecipeError: Which, and what was expected.
    """
    if args.endpoint and not args.model:
        raise RecipeError("--endpoint needs --model, the name the server knows its model by")
    if args.endpoint and (args.quantize or args.revision):
        raise RecipeError("--quantize and --revision are of a model in this process; the endpoint has its own weights")
    lost = [name for name in ("prefill", "api_key_env", "price_in", "price_out") if getattr(args, name)]
    if lost and not args.endpoint:
        raise RecipeError(f"--{lost[0].replace('_', '-')} is of an endpoint; expected --endpoint URL with it")


def generator_of(args: Namespace, needed: Sequence[str]) -> Generator | None:
    """The generator the flags ask for, loaded; None where nobody needs one.

    Args:
        args: Flags of the verb.
        needed: Flags whose parts need a model, for the message.

    Raises:
        RecipeError: A model is needed and none is named, or an option is out of range.
        CheckpointError: The model cannot be loaded.
    """
    from llmrec.commands.output import note

    if not needed:
        if args.model:
            note("note: --model is not used, these summarizers need none")
        return None
    if not args.model:
        raise RecipeError(f"{' and '.join(needed)} needs a model: name one with --model NAME, or --endpoint URL too")
    decoding: dict[str, Any] = {
        "max_new_tokens": args.max_new_tokens, "max_prompt_tokens": args.max_prompt_tokens,
        "temperature": args.temperature, "seed": args.seed,
    }  # fmt: skip
    if args.endpoint:
        from llmrec.llm.endpoint import EndpointGenerator

        return EndpointGenerator(
            args.endpoint, args.model, api_key_env=args.api_key_env, max_concurrency=args.concurrency,
            requests_per_minute=args.requests_per_minute, tokens_per_minute=args.tokens_per_minute,
            timeout=args.timeout, retries=args.retries, price_in=args.price_in, price_out=args.price_out,
            opening="prefill" if args.prefill else "ask", **decoding,
        )  # fmt: skip
    from llmrec.llm.generating import load_generator

    note(f"loading {args.model}")
    return load_generator(
        args.model, dtype=args.dtype, quantize=args.quantize, revision=args.revision, batch_size=args.batch, **decoding
    )
