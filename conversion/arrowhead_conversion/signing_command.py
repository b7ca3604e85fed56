# SPDX-License-Identifier: Apache-2.0
"""`arrowhead sign`. Signatures are held against a public key by `verify` and `serve`."""

from __future__ import annotations

from pathlib import Path

import click

from arrowhead_conversion.command import repository_option

SIGN_EXAMPLES = """
\b
Examples:
  arrowhead sign --new-key release.pem         (once: release.pem is secret, release.pem.pub is not)
  arrowhead verify minilm                      (what is signed should be right)
  arrowhead sign minilm --key release.pem
  arrowhead verify minilm --public-key release.pem.pub
  arrowhead serve --public-key release.pem.pub
"""


@click.command(epilog=SIGN_EXAMPLES)
@click.argument("name", required=False)
@click.option("--version", type=click.IntRange(min=1), help="Which one.  [default: the live one]")
@click.option(
    "--key", type=click.Path(path_type=Path), help="File of the private key, in PEM, mode 600."
)
@click.option(
    "--new-key",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Make a pair of keys, FILE and FILE.pub, and sign nothing.",
)
@repository_option
def sign(
    name: str | None, version: int | None, key: Path | None, new_key: Path | None, repository: Path
) -> None:
    """Sign a version of the model NAME.

    Signed are all its files, code included, and its configuration, but for what `promote`,
    `rollback` and `configure` set. A server with --public-key serves nothing else. Keep the private
    key away from the server and from whoever may write the repository.
    """
    from tqdm import tqdm

    from arrowhead_conversion import signing

    if new_key is not None:
        if name is not None or key is not None:
            raise click.UsageError("--new-key makes keys and signs nothing; leave NAME and --key")
        public = signing.new_key(new_key)
        click.echo(f"{new_key} is the private key: keep it secret\n{public} is the public one")
        return
    if name is None or key is None:
        raise click.UsageError("name what to sign and with what: arrowhead sign NAME --key FILE")
    with tqdm(desc="reading", unit="B", unit_scale=True, disable=None) as bar:
        signed, keyid = signing.sign(repository, name, version, key, bar.update)
    click.echo(f"{name} version {signed} is signed with the key {keyid[:16]}")
