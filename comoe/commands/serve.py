"""Serve exports over HTTP: predictions, explanations and embeddings, and a page to try them.

    comoe serve runs/starter/export
    comoe serve news=runs/a/export news=runs/b/export --port 8080 --watch 60

Several exports of one NAME are revisions of it; the last answers where a request names none. The
server answers to this machine only, unless it has a token. SIGHUP reads exports that were replaced,
SIGTERM finishes what runs and ends.
"""

import os
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from comoe.commands.arguments import add_backend, need_extra, new_parser, number, whole
from comoe.commands.guard import guarded
from comoe.config.plugins import add_plugins


def parser() -> ArgumentParser:
    """The command line."""
    # fmt: off
    found = new_parser("serve", __doc__)
    add = found.add_argument
    add("exports", nargs="+", metavar="[NAME=]EXPORT", help="folder of an export (name: that of its run)")
    add("--host", default="127.0.0.1", help="address to listen at; others than loopback want a token")
    add("--port", type=whole(0, 65_535), default=8000, help="0 chooses a free one")
    add("--token-file", type=Path, metavar="FILE",
        help="holds the bearer token that requests must have (default: the variable COMOE_TOKEN, else none)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto is a GPU where there is one")
    add("--watch", type=number, default=0.0, metavar="SECONDS",
        help="look for replaced exports so often (0: at SIGHUP)")
    add("--batch-tokens", type=whole(1), default=1024, help="tokens of a forward pass, padding counted")
    add("--batch-wait", type=number, default=5.0, metavar="MS",
        help="a post waits so long for others to share its pass")
    add("--max-bytes", type=whole(1), default=1 << 20, help="bytes of a request (413)")
    add("--max-posts", type=whole(1), default=256, help="posts of a request (413)")
    add("--max-gradients", type=whole(1), default=16, help="posts of a request explained by gradients (413)")
    add("--max-characters", type=whole(1), default=20_000, help="characters of a post (413)")
    add("--queue", type=whole(1), default=1024, help="posts that wait for a model; more are refused (429)")
    add("--requests", type=whole(1), default=256, help="requests at once; more are refused (429)")
    add("--timeout", type=number, default=30.0, metavar="SECONDS", help="from a request to its answer (504)")
    add("--log-posts", action="store_true", help="write posts and predictions into the log")
    add("--no-verify", action="store_true", help="read exports without comparing their digests")
    # fmt: on
    add_backend(found)
    add_plugins(found)
    return found


@guarded("serve")
def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and serve."""
    options = parser().parse_args(argv)
    need_extra("serve", "serve")

    from comoe.serving.limits import Limits
    from comoe.serving.run import Address, read_token, serve

    token = read_token(options.token_file, os.environ.get("COMOE_TOKEN"))
    limits = Limits(**{name: getattr(options, name) for name in Limits.__slots__})
    serve(
        options.exports, Address(options.host, options.port, token), limits=limits, watch=options.watch,
        log_posts=options.log_posts, device=options.device, verify=not options.no_verify,
        backend=options.backend, threads=options.threads,
    )  # fmt: skip
